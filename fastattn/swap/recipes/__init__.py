"""One file per model family, imported when a model of the family is met, or when a swapped one is unpickled."""

from __future__ import annotations

from importlib import import_module

from torch import nn

from fastattn.swap.recipe import Recipe

_FAMILIES = {
    "torch.nn.modules.activation": "fastattn.swap.recipes.torch_nn",
    "torch.nn.modules.normalization": "fastattn.swap.recipes.torch_nn",
    "torch.nn.modules.transformer": "fastattn.swap.recipes.torch_nn",
    "transformers.models.bert.modeling_bert": "fastattn.swap.recipes.bert",
}


def recipe_for(module_class: type[nn.Module]) -> Recipe | None:
    """The recipe for exactly this class, or None."""
    family = _FAMILIES.get(module_class.__module__)
    return None if family is None else import_module(family).RECIPES.get(module_class)
