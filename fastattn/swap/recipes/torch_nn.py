"""torch.nn: LayerNorm, RMSNorm and MultiheadAttention. The forwards are those of fastattn.nn."""

from __future__ import annotations

from torch import nn

from fastattn.nn import attention, norm
from fastattn.swap.recipe import Recipe
from fastattn.swap.swapped import Swapped


class LayerNorm(Swapped, norm.LayerNorm):
    """A swapped nn.LayerNorm."""

    fastattn_original = nn.LayerNorm


class RMSNorm(Swapped, norm.RMSNorm):
    """A swapped nn.RMSNorm."""

    fastattn_original = nn.RMSNorm


class MultiheadAttention(Swapped, attention.MultiheadAttention):
    """A swapped nn.MultiheadAttention."""

    fastattn_original = nn.MultiheadAttention


RECIPES = {
    nn.MultiheadAttention: Recipe(
        MultiheadAttention,
        kernels={"attention": "attention", "linears": "linear (q, k, v, out)"},
        takes=(
            "self",
            "query",
            "key",
            "value",
            "key_padding_mask",
            "need_weights",
            "attn_mask",
            "average_attn_weights",
            "is_causal",
        ),
        core="attention",
    ),
    nn.LayerNorm: Recipe(LayerNorm, kernels={"norms": "layer_norm"}, takes=("self", "input")),
    nn.RMSNorm: Recipe(RMSNorm, kernels={"norms": "rms_norm"}, takes=("self", "x")),
}
