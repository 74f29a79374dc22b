"""An encoder layer in inference as one operator, where every child would do nothing but the plain operation."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from fastattn.functional import encoder_layer
from fastattn.masks import Mask
from fastattn.nn.activations import activation_name
from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.checks import (
    why_not_dropout,
    why_not_head_dim,
    why_not_input,
    why_not_linear,
    why_not_tensor,
    why_not_unwatched,
)
from fastattn.nn.counting import note_call
from fastattn.nn.fused import Fused, stands_for
from fastattn.nn.norm import why_not_layer_norm
from fastattn.ops.library import tracks_gradients


class WholeLayer(NamedTuple):
    """What `fastattn.encoder_layer` needs of a layer."""

    attention: MultiheadAttention
    tensors: tuple[Tensor | None, ...]
    """The weights and biases in the order of `encoder_layer`."""
    options: dict[str, Any]

    def run(self, x: Tensor, *, mask: Mask | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """x (B, S, E), or packed rows (T, E) with cu_seqlens, through the layer; the attention counts as called."""
        note_call(self.attention)
        return encoder_layer(x, *self.tensors, mask=mask, cu_seqlens=cu_seqlens, **self.options)  # type: ignore[arg-type]


def whole_layer(layer: nn.Module, x: Tensor) -> WholeLayer | None:
    """The layer as one operator on x (..., E), or None: in training, where a gradient is needed, under autocast, beside
    a child that must be called, and on a GPU, where no native backend has the operator."""
    if not isinstance(layer, Fused) or layer.fastattn_off:
        return None
    backend = layer.fastattn_backend
    if not stands_for(layer, nn.TransformerEncoderLayer):
        return None
    if not may_be_one_call(x):
        return None
    attention, linears, norms = layer.self_attn, (layer.linear1, layer.linear2), (layer.norm1, layer.norm2)
    dropouts = (layer.dropout, layer.dropout1, layer.dropout2)
    activation = activation_name(layer.activation)
    if (
        activation is None
        or not _is_plain(attention, backend)
        or (attention.training and attention.dropout > 0.0)
        or any(why_not_linear(child) is not None for child in linears)
        or any(why_not_layer_norm(child) is not None for child in norms)
        or any(why_not_dropout(child) is not None for child in dropouts)
        or any(dropout.training and dropout.p > 0.0 for dropout in dropouts)
    ):
        return None
    pairs = (attention.out_proj, norms[0], *linears, norms[1])
    tensors = (*_projections(attention), *(tensor for child in pairs for tensor in (child.weight, child.bias)))
    if attention.embed_dim != x.shape[-1] or not fits(x, tensors):
        return None
    options = {
        "heads": attention.num_heads,
        "activation": activation,
        "norm_first": layer.norm_first,
        "eps1": norms[0].eps,
        "eps2": norms[1].eps,
        "backend": backend,
    }
    return WholeLayer(attention, tensors, options)


def may_be_one_call(x: Tensor) -> bool:
    """Whether the operator takes a layer's input: elsewhere than on CPUs no native backend has it, and the children are
    faster; under autocast they choose their dtypes."""
    return why_not_input(x) is None and x.is_cpu and not torch.is_autocast_enabled("cpu")


def fits(x: Tensor, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether weights and biases are of the input's dtype and lie on the CPU, and no gradient is needed."""
    dtype = x.dtype
    return all(t is None or (t.dtype is dtype and t.is_cpu) for t in tensors) and not tracks_gradients(x, *tensors)


def _is_plain(attention: nn.Module, backend: str | None) -> TypeGuard[MultiheadAttention]:
    """Whether the attention is fastattn's and would do nothing but project and attend."""
    if not isinstance(attention, MultiheadAttention) or not stands_for(attention, nn.MultiheadAttention):
        return False
    projection = attention.out_proj
    return (
        not attention.fastattn_off
        and attention.fastattn_backend == backend
        and why_not_unwatched(attention) is None
        and attention._qkv_same_embed_dim
        and attention.bias_k is None
        and attention.bias_v is None
        and not attention.add_zero_attn
        and why_not_head_dim(attention.head_dim) is None
        and all(
            why_not_tensor("", tensor) is None
            for tensor in (attention.in_proj_weight, attention.in_proj_bias, projection.weight, projection.bias)
        )
    )


def _projections(attention: MultiheadAttention) -> tuple[Tensor | None, ...]:
    """Weight and bias of q, k and v: views."""
    weights = attention.in_proj_weight.chunk(3)
    biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    return tuple(tensor for pair in zip(weights, biases, strict=True) for tensor in pair)
