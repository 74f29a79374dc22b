"""Recipes: torch.nn's, one file; and those that recognise a class by what its forward does, one file per kind of block.

The files are imported when a model is swapped, or when a swapped one is unpickled.
"""

from __future__ import annotations

from importlib import import_module

from torch import nn

from fastattn.swap.recipe import Recipe


def recipe_for(module_class: type[nn.Module]) -> Recipe | None:
    """The recipe for exactly this class, or None."""
    known: dict[type[nn.Module], Recipe] = import_module("fastattn.swap.recipes.torch_nn").RECIPES
    return known.get(module_class) or import_module("fastattn.swap.recognised").recipe_for(module_class)
