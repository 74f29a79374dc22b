"""The encoder layer operator, with its fake tensor and vmap rule. It is for inference: it has no backward.

fastattn::encoder_layer_forward takes the lowered mask as flat tensors and numbers, as the attention operators do.
Shapes and results: `fastattn.backends.protocol`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.masks.lowered import FLAT_FIELDS, LoweredMask, unflatten
from fastattn.ops.attention import MASK_SCHEMA, contiguous_mask, fold_mask
from fastattn.ops.library import InDims, VmapResult, dense, fold_dim, is_mapped, register
from fastattn.packed import check_bounds
from fastattn.problems import EncoderLayerProblem

_TENSORS = 17  # x, and after it the weights and biases


def problem_fields(
    x: Tensor, w1: Tensor, mask: LoweredMask, packed: bool, heads: int, activation: str, norm_first: bool
) -> tuple[Any, ...]:
    """The fields of this call's EncoderLayerProblem, in order."""
    return (
        x.device.type,
        x.dtype,
        1 if packed else x.shape[0],
        x.shape[-2],
        heads,
        x.shape[-1],
        w1.shape[0],
        activation,
        norm_first,
        packed,
        mask.key_start is not None or mask.key_end is not None,
        mask.band_left is not None or mask.band_right is not None,
        0 if mask.intervals is None else mask.intervals.shape[0],
        mask.dense is not None,
        mask.key_bits is not None,
        mask.blocks is not None,
    )


def _forward(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    wv: Tensor,
    bv: Tensor | None,
    wo: Tensor,
    bo: Tensor | None,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    *rest: Any,
) -> Tensor:
    heads, scale, activation, norm_first, eps1, eps2, backend = rest[FLAT_FIELDS:]
    if cu_seqlens is not None:
        check_bounds("cu_seqlens", cu_seqlens, "x", x.shape[0], every_row=True)
        mask = LoweredMask()
    else:
        full = (x.shape[0], heads, x.shape[1], x.shape[1])
        mask = contiguous_mask(unflatten(rest[:FLAT_FIELDS]), full)
    fields = problem_fields(x, w1, mask, cu_seqlens is not None, heads, activation, norm_first)
    y: Tensor = dispatch.choose(EncoderLayerProblem, fields, backend).encoder_layer_forward(
        dense(x),
        dense(wq),
        dense(bq),
        dense(wk),
        dense(bk),
        dense(wv),
        dense(bv),
        dense(wo),
        dense(bo),
        dense(norm1_weight),
        dense(norm1_bias),
        dense(w1),
        dense(b1),
        dense(w2),
        dense(b2),
        dense(norm2_weight),
        dense(norm2_bias),
        dense(cu_seqlens),
        mask,
        heads,
        scale,
        activation,
        norm_first,
        eps1,
        eps2,
    )
    return y


def _fake_forward(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fold_forward(size: int, dims: InDims, args: tuple[Any, ...]) -> VmapResult | None:
    """x's mapped dimension joins its batch, unless a weight is mapped or the rows are packed."""
    if args[_TENSORS] is not None or is_mapped(dims, *range(1, _TENSORS)):
        return None
    first, last = _TENSORS + 1, _TENSORS + 1 + FLAT_FIELDS
    x = fold_dim(args[0], dims[0], size)
    batch = x.shape[0] // size
    mask = fold_mask(size, batch, dims[first:last], args[first:last])
    if mask is None:
        return None
    y = encoder_layer_forward(x, *args[1:first], *mask, *args[last:])
    return y.unflatten(0, (size, batch)), 0


encoder_layer_forward = register(
    "encoder_layer_forward",
    "(Tensor x, Tensor wq, Tensor? bq, Tensor wk, Tensor? bk, Tensor wv, Tensor? bv, Tensor wo, Tensor? bo, "
    "Tensor? norm1_weight, Tensor? norm1_bias, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? norm2_weight, "
    f"Tensor? norm2_bias, Tensor? cu_seqlens, {MASK_SCHEMA}, SymInt heads, float scale, str activation, "
    "bool norm_first, float eps1, float eps2, str backend) -> Tensor",
    _forward,
    _fake_forward,
    _fold_forward,
)
