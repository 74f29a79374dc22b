"""The attention operators, their fake tensors and vmap rules, and the autograd.Function over them.

fastattn::attention_forward and attention_backward take the lowered mask as flat tensors and numbers. The dense mask,
the bias and the intervals have 1 or the full size in each dimension. Shapes and results: `fastattn.backends.protocol`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.masks.lowered import LoweredMask
from fastattn.ops.library import (
    InDims,
    VmapResult,
    dense,
    differentiate_once,
    fold_dim,
    in_layout_of,
    is_mapped,
    register,
    unit_stride,
)
from fastattn.problems import AttentionProblem
from fastattn.reference.attention import accumulate_dtype

MASK_SCHEMA = (
    "Tensor? key_start, Tensor? key_end, SymInt band_offset, SymInt? band_left, SymInt? band_right, "
    "Tensor? intervals, Tensor? dense_mask"
)
_EXTRAS = (
    f"{MASK_SCHEMA}, Tensor? bias, Tensor? sinks, Tensor? dropout_seed, float scale, float softcap, float dropout_p"
)


def problem_fields(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LoweredMask,
    bias: Tensor | None,
    sinks: Tensor | None,
    softcap: float,
    dropout_p: float,
    requires_grad: bool,
    bias_requires_grad: bool,
    deterministic: bool,
) -> tuple[Any, ...]:
    """The fields of this call's AttentionProblem, in order."""
    batch, heads_q, len_q, dim = q.shape
    _, heads_kv, len_k, dim_v = v.shape
    return (
        q.device.type,
        q.dtype,
        batch,
        heads_q,
        heads_kv,
        len_q,
        len_k,
        dim,
        dim_v,
        mask.key_start is not None or mask.key_end is not None,
        mask.band_left is not None or mask.band_right is not None,
        0 if mask.intervals is None else mask.intervals.shape[0],
        mask.dense is not None,
        None if bias is None else bias.dtype,
        bias_requires_grad,
        softcap != 0.0,
        sinks is not None,
        dropout_p != 0.0,
        requires_grad,
        deterministic,
    )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    band_offset: int,
    band_left: int | None,
    band_right: int | None,
    intervals: Tensor | None,
    dense_mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    requires_grad: bool,
    bias_requires_grad: bool,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    full = (*q.shape[:3], k.shape[2])
    mask = lowered_mask(key_start, key_end, band_offset, band_left, band_right, intervals, dense_mask, full)
    sinks = dense(sinks)
    fields = problem_fields(
        q, k, v, mask, bias, sinks, softcap, dropout_p, requires_grad, bias_requires_grad, deterministic
    )
    chosen = dispatch.choose(AttentionProblem, fields, backend)
    out, lse = chosen.attention_forward(
        unit_stride(q), unit_stride(k), unit_stride(v), mask, bias, sinks, dropout_seed, scale, softcap, dropout_p
    )
    return out, lse


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_start: Tensor | None,
    key_end: Tensor | None,
    band_offset: int,
    band_left: int | None,
    band_right: int | None,
    intervals: Tensor | None,
    dense_mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    bias_requires_grad: bool,
    sinks_requires_grad: bool,
    deterministic: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    full = (*q.shape[:3], k.shape[2])
    mask = lowered_mask(key_start, key_end, band_offset, band_left, band_right, intervals, dense_mask, full)
    sinks = dense(sinks)
    fields = problem_fields(q, k, v, mask, bias, sinks, softcap, dropout_p, True, bias_requires_grad, deterministic)
    chosen = dispatch.choose(AttentionProblem, fields, backend)
    dq, dk, dv, dbias, dsinks = chosen.attention_backward(
        unit_stride(grad_out),
        dense(grad_lse),
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        unit_stride(out),
        dense(lse),
        mask,
        bias,
        sinks,
        dropout_seed,
        scale,
        softcap,
        dropout_p,
        bias_requires_grad,
        sinks_requires_grad,
        deterministic,
    )
    return in_layout_of(dq, q), in_layout_of(dk, k), in_layout_of(dv, v), dbias, dsinks


def lowered_mask(
    key_start: Tensor | None,
    key_end: Tensor | None,
    offset: int,
    left: int | None,
    right: int | None,
    intervals: Tensor | None,
    dense_mask: Tensor | None,
    full: tuple[int, int, int, int],
) -> LoweredMask:
    """The mask as a backend gets it: tensors contiguous, the dense one expanded with strides 0 to (B, Hq, Sq, Skv)."""
    if dense_mask is not None:
        dense_mask = dense_mask.expand(full)
    return LoweredMask(dense(key_start), dense(key_end), offset, left, right, dense(intervals), dense_mask)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, len_q, _ = q.shape
    out = q.new_empty(batch, len_q, heads, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, len_q, dtype=accumulate_dtype(q.dtype))


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias, sinks = rest[9], rest[10]
    bias_requires_grad, sinks_requires_grad = rest[15], rest[16]
    compute = accumulate_dtype(q.dtype)
    dbias = q.new_empty(bias.shape if bias is not None and bias_requires_grad else (0,), dtype=compute)
    dsinks = q.new_empty(sinks.shape if sinks is not None and sinks_requires_grad else (0,), dtype=compute)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias, dsinks


def fold_mask(size: int, batch: int, dims: InDims, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """The mask's arguments, key_start to dense_mask, with the mapped dimension folded into their batch dimension."""
    key_start, key_end, offset, left, right, intervals, dense_mask = tensors
    if key_start is not None:
        key_start = fold_dim(key_start, dims[0], size)
    if key_end is not None:
        key_end = fold_dim(key_end, dims[1], size)
    if intervals is not None:
        intervals = _fold_broadcast(intervals, dims[5], size, batch, at=1)
    if dense_mask is not None:
        dense_mask = _fold_broadcast(dense_mask, dims[6], size, batch)
    return key_start, key_end, offset, left, right, intervals, dense_mask


def _fold_broadcast(tensor: Tensor, dim: int | None, size: int, batch: int, at: int = 0) -> Tensor:
    """As fold_dim, for a tensor whose batch dimension `at` may be 1: that stays 1 where no entry differs."""
    if dim is None:
        return tensor if tensor.shape[at] == 1 else fold_dim(tensor, None, size, at)
    lifted = tensor.movedim(dim, at)
    full = [*lifted.shape[: at + 1], batch, *lifted.shape[at + 2 :]]
    return lifted.expand(full).flatten(at, at + 1)


def _fold_forward(size: int, dims: InDims, args: tuple[Any, ...]) -> VmapResult | None:
    if args[15] > 0.0 or is_mapped(dims, 11, 12):  # dropout counts batch entries; sinks and seeds have no batch
        return None
    q, k, v = (fold_dim(args[i], dims[i], size) for i in range(3))
    batch = q.shape[0] // size
    mask = fold_mask(size, batch, dims[3:10], args[3:10])
    bias = None if args[10] is None else _fold_broadcast(args[10], dims[10], size, batch)
    results = attention_forward(q, k, v, *mask, bias, *args[11:])
    return tuple(t.unflatten(0, (size, batch)) for t in results), (0, 0)


def _fold_backward(size: int, dims: InDims, args: tuple[Any, ...]) -> VmapResult | None:
    bias, sinks_requires_grad, bias_requires_grad = args[14], args[21], args[20]
    if args[19] > 0.0 or is_mapped(dims, 15, 16) or sinks_requires_grad:
        return None
    grad_lse = None if args[1] is None else fold_dim(args[1], dims[1], size)
    grad_out, *inputs = (fold_dim(args[i], dims[i], size) for i in (0, *range(2, 7)))
    batch = grad_out.shape[0] // size
    mask = fold_mask(size, batch, dims[7:14], args[7:14])
    rows, bias_dim = 0, dims[14]
    if bias is not None:
        if bias_requires_grad and bias_dim is None:
            bias, bias_dim = bias.expand(size, *bias.shape), 0  # a gradient per entry
        rows = bias.shape[1 if bias_dim == 0 else 0]
        bias = _fold_broadcast(bias, bias_dim, size, batch)
    results = attention_backward(grad_out, grad_lse, *inputs, *mask, bias, *args[15:])
    dq, dk, dv = (t.unflatten(0, (size, batch)) for t in results[:3])
    dbias, dsinks = results[3:]
    if not bias_requires_grad:
        return (dq, dk, dv, dbias, dsinks), (0, 0, 0, None, None)
    dbias = dbias.unflatten(0, (size, batch))
    if rows == 1:
        dbias = dbias.sum(dim=1, keepdim=True)
    return (dq, dk, dv, dbias, dsinks), (0, 0, 0, 0, None)


attention_forward = register(
    "attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {_EXTRAS}, bool requires_grad, bool bias_requires_grad, bool deterministic, "
    "str backend) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _fold_forward,
)
attention_backward = register(
    "attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_EXTRAS}, bool bias_requires_grad, bool sinks_requires_grad, bool deterministic, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _fold_backward,
)


class Attention(torch.autograd.Function):
    """attention_forward with gradients; the arguments are the operator's, in its order."""

    generate_vmap_rule = True  # the operators have vmap rules of their own

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        out, lse = attention_forward(*args)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, key_start, key_end, offset, left, right, intervals, dense_mask, bias, sinks, seed = inputs[:13]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, *output, key_start, key_end, intervals, dense_mask, bias, sinks, seed)
        ctx.band = (offset, left, right)
        ctx.numbers = inputs[13:16]
        ctx.deterministic, ctx.backend = inputs[18:20]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, key_start, key_end, intervals, dense_mask, bias, sinks, seed = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        bias_requires_grad, sinks_requires_grad = ctx.needs_input_grad[10], ctx.needs_input_grad[11]
        dq, dk, dv, dbias, dsinks = differentiate_once(
            attention_backward,
            grad_out,
            grad_lse,
            q,
            k,
            v,
            out,
            lse,
            key_start,
            key_end,
            *ctx.band,
            intervals,
            dense_mask,
            bias,
            sinks,
            seed,
            *ctx.numbers,
            bias_requires_grad,
            sinks_requires_grad,
            ctx.deterministic,
            ctx.backend,
        )
        return (
            dq,
            dk,
            dv,
            *(None,) * 7,
            dbias.to(bias.dtype) if bias_requires_grad else None,
            dsinks.to(sinks.dtype) if sinks_requires_grad else None,
            *(None,) * 8,
        )
