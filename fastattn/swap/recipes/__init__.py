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
    "transformers.models.gemma.modeling_gemma": "fastattn.swap.recipes.gemma",
    "transformers.models.gpt2.modeling_gpt2": "fastattn.swap.recipes.gpt2",
    "transformers.models.llama.modeling_llama": "fastattn.swap.recipes.llama",
    "transformers.models.mistral.modeling_mistral": "fastattn.swap.recipes.mistral",
    "transformers.models.qwen2.modeling_qwen2": "fastattn.swap.recipes.qwen2",
    "transformers.models.qwen3.modeling_qwen3": "fastattn.swap.recipes.qwen3",
}


def recipe_for(module_class: type[nn.Module]) -> Recipe | None:
    """The recipe for exactly this class, or None."""
    family = _FAMILIES.get(module_class.__module__)
    return None if family is None else import_module(family).RECIPES.get(module_class)
