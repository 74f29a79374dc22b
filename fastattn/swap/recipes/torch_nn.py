"""torch.nn: LayerNorm and RMSNorm. The forwards are those of fastattn.nn."""

from __future__ import annotations

from torch import nn

from fastattn.nn import norm
from fastattn.swap.recipe import Recipe
from fastattn.swap.swapped import Swapped


class LayerNorm(Swapped, norm.LayerNorm):
    """A swapped nn.LayerNorm."""

    fastattn_original = nn.LayerNorm


class RMSNorm(Swapped, norm.RMSNorm):
    """A swapped nn.RMSNorm."""

    fastattn_original = nn.RMSNorm


RECIPES = {
    nn.LayerNorm: Recipe(LayerNorm, kernels={"norms": "layer_norm"}, takes=("self", "input")),
    nn.RMSNorm: Recipe(RMSNorm, kernels={"norms": "rms_norm"}, takes=("self", "x")),
}
