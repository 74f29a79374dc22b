"""The attention operators, their fake tensors and vmap rules, and the autograd.Function over them.

fastattn::attention_forward and attention_backward take the lowered mask and bias and the packing as flat tensors and
numbers. The dense mask, the dense bias and the intervals have 1 or the full size in each dimension. Shapes and results:
`fastattn.backends.protocol`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.backends import reference
from fastattn.biases.lowered import NO_BIAS, LoweredBias
from fastattn.masks.lowered import FLAT_FIELDS, NOTHING_HIDDEN, Blocks, LoweredMask, flatten, unflatten
from fastattn.ops.formulas import Results, differentiable, of_reference, register_formulas
from fastattn.ops.library import (
    InDims,
    VmapResult,
    apply,
    dense,
    fold_broadcast,
    fold_dim,
    in_layout_of,
    invoke,
    is_mapped,
    is_watched,
    register,
    register_exported,
    unit_stride,
)
from fastattn.packed import Packed, check_bounds
from fastattn.problems import AttentionProblem
from fastattn.reference.attention import accumulate_dtype

MASK_SCHEMA = (
    "Tensor? key_start, Tensor? key_end, SymInt band_offset, SymInt? band_left, SymInt? band_right, "
    "Tensor? intervals, Tensor? dense_mask, Tensor? key_bits, Tensor? bounds, Tensor? row_ptr, Tensor? col, "
    "Tensor? block_id, Tensor? bitmaps, Tensor? col_ptr, Tensor? row, Tensor? row_id"
)
BIAS_SCHEMA = "Tensor? bias, Tensor? table, SymInt table_first, Tensor? slopes, bool top_left"
_EXTRAS = (
    f"{MASK_SCHEMA}, {BIAS_SCHEMA}, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_len_q, SymInt max_len_k, "
    "Tensor? sinks, Tensor? dropout_seed, float scale, float softcap, float dropout_p"
)
_EXTRAS_LENGTH = FLAT_FIELDS + 5 + 4 + 5
_QKV = 3  # of the forward's arguments: q, k, v, then the extras, then flags
_BIAS = _QKV + FLAT_FIELDS
_PACKED = _BIAS + 5
_SINKS = _PACKED + 4
_FLAGS = _QKV + _EXTRAS_LENGTH
_BACKWARD = 4  # the backward's arguments before the extras beyond those of the forward: grad_out, grad_lse, out, lse
_CONTIGUOUS = ("key_start", "key_end", "intervals", "key_bits", "bounds")
_BLOCKS = LoweredMask._fields.index("blocks")


class Extras(NamedTuple):
    """The arguments of both operators that are not q, k, v, gradients or flags."""

    mask: LoweredMask
    bias: LoweredBias
    packed: Packed | None
    sinks: Tensor | None
    seed: Tensor | None
    scale: float
    softcap: float
    dropout_p: float

    def backend_arguments(self, q: Tensor, k: Tensor) -> tuple[Any, ...]:
        """As a backend gets them."""
        mask, bias, packed, sinks, *others = self
        if mask is not NOTHING_HIDDEN:
            mask = contiguous_mask(mask, self.full(q, k))
        if packed is not None:
            cu_seqlens_q, cu_seqlens_k, *longest = packed
            packed = Packed(cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), *longest)
        return mask, contiguous_bias(bias), packed, dense(sinks), *others

    def full(self, q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
        """B, Hq, Sq, Skv, in a packed batch those of a padded one."""
        batch, heads, len_q, _ = q.shape
        packed = self.packed
        return (batch, heads, len_q, k.shape[2]) if packed is None else (packed.batch, heads, *packed[2:])


def flatten_extras(call: Extras) -> tuple[Any, ...]:
    """As the operators take them."""
    mask, bias, packed, *others = call
    return *flatten(mask), *bias, *(packed or (None, None, 0, 0)), *others


def parse_extras(flat: Sequence[Any]) -> Extras:
    """The inverse of `flatten_extras`."""
    cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k, *rest = flat[FLAT_FIELDS + 5 :]
    packed = None if cu_seqlens_q is None else Packed(cu_seqlens_q, cu_seqlens_k, max_len_q, max_len_k)
    return Extras(unflatten(flat[:FLAT_FIELDS]), LoweredBias(*flat[FLAT_FIELDS : FLAT_FIELDS + 5]), packed, *rest)


def problem_fields(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Extras,
    flags: Sequence[bool],
) -> tuple[Any, ...]:
    """The fields of this call's AttentionProblem, in order. flags: requires_grad, bias_requires_grad,
    table_requires_grad, slopes_requires_grad, deterministic."""
    requires_grad, *of_bias, deterministic = flags
    mask, bias = call.mask, call.bias
    batch, heads_q, len_q, len_k = call.full(q, k)
    return (
        q.device.type,
        q.dtype,
        batch,
        heads_q,
        k.shape[1],
        len_q,
        len_k,
        q.shape[3],
        v.shape[3],
        mask.key_start is not None or mask.key_end is not None,
        mask.band_left is not None or mask.band_right is not None,
        0 if mask.intervals is None else mask.intervals.shape[0],
        mask.dense is not None,
        mask.key_bits is not None,
        mask.blocks is not None,
        None if bias.dense is None else bias.dense.dtype,
        bias.table is not None,
        bias.slopes is not None,
        *of_bias,
        call.packed is not None,
        call.softcap != 0.0,
        call.sinks is not None,
        call.dropout_p != 0.0,
        requires_grad,
        deterministic,
    )


def attend(q: Tensor, k: Tensor, v: Tensor, call: Extras, flags: Sequence[bool], backend: str) -> tuple[Tensor, Tensor]:
    """out and lse, through autograd where flags[0] says so, and by the operator where anyone watches."""
    tracked = flags[0]
    if not (tracked or torch.compiler.is_compiling() or is_watched((q, k, v, *_values(call)))):
        return run_forward(q, k, v, call, flags, backend)
    args = (q, k, v, *flatten_extras(call), *flags, backend)
    out, lse = apply(Attention, *args) if tracked else attention_forward(*args)
    return out, lse


def _values(call: Extras) -> tuple[Any, ...]:
    """What may be a tensor, among other values."""
    mask, bias, packed, sinks, seed, *_ = call
    if mask is NOTHING_HIDDEN and bias is NO_BIAS and packed is None:
        return sinks, seed
    return flatten_extras(call)


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, call: Extras, flags: Sequence[bool], backend: str
) -> tuple[Tensor, Tensor]:
    """The forward on the backend that takes it."""
    if call.packed is not None:
        check_bounds("cu_seqlens_q", call.packed.cu_seqlens_q, "q", q.shape[2], every_row=False)
        check_bounds("cu_seqlens_k", call.packed.cu_seqlens_k, "k", k.shape[2], every_row=False)
    chosen = dispatch.choose(AttentionProblem, problem_fields(q, k, v, call, flags), backend)
    arguments = call.backend_arguments(q, k)
    out, lse = chosen.attention_forward(unit_stride(q), unit_stride(k), unit_stride(v), *arguments)
    return out, lse


def _forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return run_forward(q, k, v, parse_extras(rest[:_EXTRAS_LENGTH]), rest[_EXTRAS_LENGTH:-1], rest[-1])


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call, flags = parse_extras(rest[:_EXTRAS_LENGTH]), rest[_EXTRAS_LENGTH:-1]
    *of_biases, _, deterministic = flags
    chosen = dispatch.choose(
        AttentionProblem, problem_fields(q, k, v, call, (True, *of_biases, deterministic)), rest[-1]
    )
    dq, dk, dv, *others = chosen.attention_backward(
        unit_stride(grad_out),
        dense(grad_lse),
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        unit_stride(out),
        dense(lse),
        *call.backend_arguments(q, k),
        *flags,
    )
    return in_layout_of(dq, q), in_layout_of(dk, k), in_layout_of(dv, v), *others


def contiguous_mask(mask: LoweredMask, full: tuple[int, int, int, int]) -> LoweredMask:
    """The mask as a backend gets it: tensors contiguous, the dense one expanded with strides 0 to (B, Hq, Sq, Skv)."""
    copies: dict[str, Any] = {name: dense(t) for name in _CONTIGUOUS if (t := getattr(mask, name)) is not None}
    if mask.dense is not None:
        copies["dense"] = mask.dense.expand(full)
    if mask.blocks is not None:
        copies["blocks"] = Blocks._make(map(dense, mask.blocks))
    return mask._replace(**copies) if copies else mask


def contiguous_bias(bias: LoweredBias) -> LoweredBias:
    """The bias as a backend gets it."""
    if bias.table is None and bias.slopes is None:
        return bias
    return bias._replace(table=dense(bias.table), slopes=dense(bias.slopes))


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, len_q, _ = q.shape
    out = q.new_empty(batch, len_q, heads, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, len_q, dtype=accumulate_dtype(q.dtype))


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    extras = rest[2 : 2 + _EXTRAS_LENGTH]
    bias, table, _, slopes, _ = extras[FLAT_FIELDS : FLAT_FIELDS + 5]
    sinks = extras[_SINKS - _QKV]
    compute = accumulate_dtype(q.dtype)
    asked = zip((bias, table, slopes, sinks), rest[2 + _EXTRAS_LENGTH :], strict=False)
    others = [q.new_empty(t.shape if t is not None and wanted else (0,), dtype=compute) for t, wanted in asked]
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *others  # type: ignore[return-value]


def fold_mask(size: int, batch: int, dims: InDims, flat: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The mask's arguments with the mapped dimension folded into their batch dimension; None where the blocks are
    mapped, which have no such dimension."""
    if is_mapped(dims, *range(_BLOCKS, FLAT_FIELDS)):
        return None
    mask = unflatten(flat)
    at = dict(zip(LoweredMask._fields, dims, strict=False))

    def per_entry(name: str) -> Tensor | None:
        tensor = getattr(mask, name)
        return None if tensor is None else fold_dim(tensor, at[name], size)

    def broadcast(name: str, axis: int) -> Tensor | None:
        tensor = getattr(mask, name)
        return None if tensor is None else fold_broadcast(tensor, at[name], size, batch, axis)

    blocks = mask.blocks
    if blocks is not None:  # further batch entries point at the blocks of the first
        blocks = blocks._replace(
            row_ptr=fold_broadcast(blocks.row_ptr, None, size, batch),
            col_ptr=fold_broadcast(blocks.col_ptr, None, size, batch),
        )
    folded = mask._replace(
        key_start=per_entry("key_start"),
        key_end=per_entry("key_end"),
        intervals=broadcast("intervals", 1),
        dense=broadcast("dense", 0),
        key_bits=per_entry("key_bits"),
        bounds=broadcast("bounds", 1),
        blocks=blocks,
    )
    return flatten(folded)


def _fold_bias(size: int, batch: int, dims: InDims, flat: Sequence[Any]) -> list[Any]:
    """The bias' arguments with the mapped dimension folded into their batch dimension."""
    folded = list(flat)
    for at in (0, 3):  # dense, slopes
        folded[at] = None if flat[at] is None else fold_broadcast(flat[at], dims[at], size, batch)
    return folded


def _cannot_fold(dims: InDims, args: tuple[Any, ...]) -> bool:
    """Whether one call cannot stand for all entries, given the arguments as in the forward: dropout counts batch
    entries; tables, sinks and seeds have none, and packed batches and slopes of their own no room for more."""
    return (
        args[_FLAGS - 1] > 0.0 or args[_PACKED] is not None or is_mapped(dims, _BIAS + 1, _BIAS + 3, _SINKS, _SINKS + 1)
    )


def _fold_forward(size: int, dims: InDims, args: tuple[Any, ...]) -> VmapResult | None:
    if _cannot_fold(dims, args):
        return None
    q, k, v = (fold_dim(args[i], dims[i], size) for i in range(_QKV))
    batch = q.shape[0] // size
    mask = fold_mask(size, batch, dims[_QKV:_BIAS], args[_QKV:_BIAS])
    if mask is None:
        return None
    bias = _fold_bias(size, batch, dims[_BIAS:_PACKED], args[_BIAS:_PACKED])
    results = attention_forward(q, k, v, *mask, *bias, *args[_PACKED:])
    return tuple(t.unflatten(0, (size, batch)) for t in results), (0, 0)


def _fold_backward(size: int, dims: InDims, args: tuple[Any, ...]) -> VmapResult | None:
    skipped = (0, 1, 5, 6)  # grad_out, grad_lse, out, lse

    def as_forward(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(value for i, value in enumerate(values) if i not in skipped)

    own, own_dims = as_forward(args), as_forward(dims)
    bias_requires_grad, *others_require_grad = own[_FLAGS : _FLAGS + 4]
    if _cannot_fold(own_dims, own) or any(others_require_grad):
        return None
    grad_lse = None if args[1] is None else fold_dim(args[1], dims[1], size)
    grad_out, *inputs = (fold_dim(args[i], dims[i], size) for i in (0, *range(2, _QKV + _BACKWARD)))
    batch = grad_out.shape[0] // size
    mask = fold_mask(size, batch, own_dims[_QKV:_BIAS], own[_QKV:_BIAS])
    if mask is None:
        return None
    given, bias_dims = list(own[_BIAS:_PACKED]), list(own_dims[_BIAS:_PACKED])
    rows = 0
    if given[0] is not None:
        if bias_requires_grad and bias_dims[0] is None:
            given[0], bias_dims[0] = given[0].expand(size, *given[0].shape), 0  # a gradient per entry
        rows = given[0].shape[1 if bias_dims[0] == 0 else 0]
    bias = _fold_bias(size, batch, tuple(bias_dims), given)
    results = attention_backward(grad_out, grad_lse, *inputs, *mask, *bias, *own[_PACKED:])
    dq, dk, dv = (t.unflatten(0, (size, batch)) for t in results[:3])
    dbias, *others = results[3:]
    bias_dim = None
    if bias_requires_grad:
        dbias, bias_dim = dbias.unflatten(0, (size, batch)), 0
        if rows == 1:
            dbias = dbias.sum(dim=1, keepdim=True)
    return (dq, dk, dv, dbias, *others), (0, 0, 0, bias_dim, *(None,) * len(others))


attention_forward = register(
    "attention_forward",
    f"(Tensor q, Tensor k, Tensor v, {_EXTRAS}, bool requires_grad, bool bias_requires_grad, "
    "bool table_requires_grad, bool slopes_requires_grad, bool deterministic, str backend) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _fold_forward,
)
attention_backward = register(
    "attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_EXTRAS}, bool bias_requires_grad, bool table_requires_grad, bool slopes_requires_grad, "
    "bool sinks_requires_grad, bool deterministic, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _fold_backward,
)

_TENSORS = [i for i, type_ in enumerate(_EXTRAS.split(", ")) if type_.startswith("Tensor")]
_NUMBERS = [i for i in range(_EXTRAS_LENGTH) if i not in _TENSORS]


class Attention(torch.autograd.Function):
    """attention_forward with gradients; the arguments are the operator's, in its order."""

    generate_vmap_rule = True  # the operators have vmap rules of their own

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        out, lse = invoke(attention_forward, *args)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        extras = inputs[_QKV:_FLAGS]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:_QKV], *output, *(extras[i] for i in _TENSORS))
        ctx.numbers = [extras[i] for i in _NUMBERS]
        ctx.deterministic, ctx.backend = inputs[_FLAGS + 4 :]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        extras: list[Any] = [None] * _EXTRAS_LENGTH
        for places, values in ((_TENSORS, tensors), (_NUMBERS, ctx.numbers)):
            for i, value in zip(places, values, strict=True):
                extras[i] = value
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        learned = (_BIAS, _BIAS + 1, _BIAS + 3, _SINKS)
        wanted = [ctx.needs_input_grad[i] for i in learned]
        dq, dk, dv, *others = differentiable(
            attention_backward,
            grad_out,
            grad_lse,
            q,
            k,
            v,
            out,
            lse,
            *extras,
            *wanted,
            ctx.deterministic,
            ctx.backend,
        )
        grads: list[Any] = [dq, dk, dv, *(None,) * (_EXTRAS_LENGTH + 6)]
        for i, grad, needed in zip(learned, others, wanted, strict=True):
            if needed:
                grads[i] = grad.to(extras[i - _QKV].dtype)
        return tuple(grads)


def _forward_formula(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Results:
    call = parse_extras(rest[:_EXTRAS_LENGTH])
    return of_reference(reference.attention_forward)(q, k, v, *_formula_arguments(call, q, k), rest[-1])


def _backward_formula(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> Results:
    call, flags = parse_extras(rest[:_EXTRAS_LENGTH]), rest[_EXTRAS_LENGTH:]
    given = grad_out, grad_lse, q, k, v, out, lse
    return of_reference(reference.attention_backward)(*given, *_formula_arguments(call, q, k), *flags)


def _formula_arguments(call: Extras, q: Tensor, k: Tensor) -> tuple[Any, ...]:
    """As `Extras.backend_arguments`, but what is differentiated is not copied."""
    mask, *others = call
    return contiguous_mask(mask, call.full(q, k)), *others


register_exported(Attention, attention_forward, visible=2)
register_formulas(
    Attention,
    forward=(attention_forward, _forward_formula),
    backward=(attention_backward, _backward_formula),
    recomputed=(5, 6),  # out, lse
)
