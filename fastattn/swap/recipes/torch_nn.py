"""torch.nn: norms, MultiheadAttention, and the encoder and decoder. The forwards are those of fastattn.nn.

nn.Transformer and nn.TransformerDecoder only call their children, and need no recipe.
"""

from __future__ import annotations

from torch import nn

from fastattn.nn import attention, decoder, encoder, norm
from fastattn.nn.activations import why_not_activation
from fastattn.nn.checks import why_not_dropout, why_not_linear
from fastattn.nn.norm import why_not_layer_norm
from fastattn.swap.recipe import Check, Recipe, always
from fastattn.swap.recipes import free_linear
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


class TransformerEncoderLayer(Swapped, encoder.TransformerEncoderLayer):
    """A swapped nn.TransformerEncoderLayer."""

    fastattn_original = nn.TransformerEncoderLayer


class TransformerEncoder(Swapped, encoder.TransformerEncoder):
    """A swapped nn.TransformerEncoder."""

    fastattn_original = nn.TransformerEncoder


class TransformerDecoderLayer(Swapped, decoder.TransformerDecoderLayer):
    """A swapped nn.TransformerDecoderLayer."""

    fastattn_original = nn.TransformerDecoderLayer


# Attention is a part of the layers, though a child with a recipe of its own does it: torch's layers, left as they are,
# would not call that child in inference.
_LAYER_KERNELS = {"attention": "attention block", "norms": "dropout_add_layer_norm", "ffns": "ffn"}
_FEED_FORWARD = (
    ("linear1", "ffns", why_not_linear),
    ("linear2", "ffns", why_not_linear),
    ("dropout", "ffns", why_not_dropout),
    ("activation", "ffns", why_not_activation),
)


def _residual_blocks(count: int) -> tuple[tuple[str, str, Check], ...]:
    """The norms and dropouts norm1, dropout1, norm2, ..."""
    checks: tuple[tuple[str, Check], ...] = (("norm", why_not_layer_norm), ("dropout", why_not_dropout))
    return tuple((f"{name}{i}", "norms", check) for i in range(1, count + 1) for name, check in checks)


RECIPES = {
    nn.TransformerEncoder: Recipe(
        TransformerEncoder,
        kernels=dict.fromkeys(_LAYER_KERNELS, "rows without padding"),
        takes=("self", "src", "mask", "src_key_padding_mask", "is_causal"),
    ),
    nn.TransformerEncoderLayer: Recipe(
        TransformerEncoderLayer,
        kernels=_LAYER_KERNELS,
        takes=("self", "src", "src_mask", "src_key_padding_mask", "is_causal"),
        children=always(*_FEED_FORWARD, *_residual_blocks(2)),
    ),
    nn.TransformerDecoderLayer: Recipe(
        TransformerDecoderLayer,
        kernels=_LAYER_KERNELS,
        takes=(
            "self",
            "tgt",
            "memory",
            "tgt_mask",
            "memory_mask",
            "tgt_key_padding_mask",
            "memory_key_padding_mask",
            "tgt_is_causal",
            "memory_is_causal",
        ),
        children=always(*_FEED_FORWARD, *_residual_blocks(3)),
    ),
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
    nn.Linear: free_linear.recipe(free_linear.Linear),
}
