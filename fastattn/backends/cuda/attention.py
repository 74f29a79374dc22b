"""Attention on csrc/cuda/attention. Arguments and results are those of fastattn.backends.protocol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.backends.codes import DTYPES
from fastattn.backends.cuda.decode import attention_decode, input_reasons
from fastattn.backends.cuda.library import dropout_arguments, kernels, load, place
from fastattn.backends.few import as_decoding
from fastattn.backends.views import (
    address,
    broadcast_view,
    copied,
    distance_arguments,
    empty_out,
    mask_arguments,
    writable,
)
from fastattn.biases.lowered import LoweredBias
from fastattn.masks.intervals import row_bounds
from fastattn.masks.lowered import LoweredMask
from fastattn.packed import Packed
from fastattn.problems import AttentionProblem

# Narrower heads do not average the rounding of single weights; for wider ones the kernels lack registers.
_MIN_GRADIENT_DIM, _MAX_GRADIENT_DIM = 17, 192


def attention_reasons(problem: AttentionProblem) -> list[str]:
    """Why an attention problem is refused; empty when it runs."""
    reasons = input_reasons("attention", problem)
    if problem.bias_requires_grad or problem.table_requires_grad or problem.slopes_requires_grad:
        reasons.append("the CUDA attention has no gradient of biases")
    dims = problem.dim_qk, problem.dim_v
    if problem.requires_grad and (min(dims) < _MIN_GRADIENT_DIM or max(dims) > _MAX_GRADIENT_DIM):
        reasons.append(
            f"the CUDA attention has gradients of head dims from {_MIN_GRADIENT_DIM} to {_MAX_GRADIENT_DIM}, "
            f"not of {dims[0]} and {dims[1]}"
        )
    return reasons


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LoweredMask,
    bias: LoweredBias,
    packed: Packed | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Sq, Dv), a transposed view of (B, Sq, Hq, Dv) memory; lse (B, Hq, Sq) float32. For a packed batch B
    is 1 and Sq all rows.

    RuntimeError with the call, the CUDA error and the shapes where the launch fails.
    """
    batch, heads, rows, _ = q.shape
    decoding = as_decoding(mask, bias, rows, k.shape[2], q.device) if packed is None and dropout_p == 0.0 else None
    if decoding is not None:
        lengths = torch.full((batch,), k.shape[2], dtype=torch.int32, device=q.device)
        return attention_decode(q, k, v, lengths, None, *decoding, sinks, scale, softcap)
    out = empty_out(q, v.shape[3])
    lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    if packed is not None and packed.batch == 0:  # all rows are of no sequence
        return out.zero_(), lse.fill_(-torch.inf)
    sinks = None if sinks is None else sinks.float()
    arguments = _arguments(q, k, v, out, lse, mask, bias, packed, sinks, dropout_seed, scale, softcap, dropout_p)
    load().attention_forward(**arguments)
    return out, lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: LoweredMask,
    bias: LoweredBias,
    packed: Packed | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    bias_requires_grad: bool,
    table_requires_grad: bool,
    slopes_requires_grad: bool,
    sinks_requires_grad: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the protocol; biases have no gradients here. Every sum has a fixed order, `deterministic` or not.

    RuntimeError with the call, the CUDA error and the shapes where a launch fails.
    """
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    nothing = lse.new_empty(0)
    dq, dk, dv = written = [writable(grad) for grad in grads]
    if packed is not None or lse.numel() == 0:  # what belongs to no sequence, or is seen by no query
        for grad in written:
            grad.zero_()
    if lse.numel() == 0 or (packed is not None and 0 in (packed.batch, packed.max_len_q)):
        dsinks = lse.new_zeros(q.shape[1] if sinks_requires_grad else 0)
        return *copied(written, grads), nothing, nothing, nothing, dsinks
    norm, centre = torch.empty_like(lse), torch.empty_like(lse)
    sink_terms = torch.zeros_like(lse) if sinks_requires_grad else None
    if mask.intervals is not None and mask.bounds is None:
        mask = mask._replace(bounds=row_bounds(mask.intervals))
    sinks = None if sinks is None else sinks.float()
    arguments = _arguments(q, k, v, out, lse, mask, bias, packed, sinks, dropout_seed, scale, softcap, dropout_p)
    load().attention_backward(
        **arguments,
        transpose=_transpose(mask, arguments["sizes"][0], q.shape[1]),
        grad_out=broadcast_view(grad_out),
        grad_q=broadcast_view(dq),
        grad_k=broadcast_view(dk),
        grad_v=broadcast_view(dv),
        grad_lse=address(grad_lse),
        norm=norm.data_ptr(),
        centre=centre.data_ptr(),
        sink_terms=address(sink_terms),
        tolerance=torch.finfo(q.dtype).eps / 4,
    )
    dsinks = nothing if sink_terms is None else sink_terms.sum(dim=(0, 2))
    return *copied(written, grads), nothing, nothing, nothing, dsinks


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: LoweredMask,
    bias: LoweredBias,
    packed: Packed | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> dict[str, Any]:
    """What the module's forward and backward take alike; the tensors have to outlive the call."""
    batch, heads_q, len_q, dim_qk = q.shape
    _, heads_kv, len_k, dim_v = v.shape
    places = (0, 0, 0, 0)
    if packed is not None:
        places = (packed.cu_seqlens_q.data_ptr(), packed.cu_seqlens_k.data_ptr(), len_q, len_k)
        batch, len_q, len_k = packed.batch, packed.max_len_q, packed.max_len_k
    dense = None if bias.dense is None else bias.dense.expand(batch, heads_q, len_q, len_k)
    blocks = mask.blocks
    return {
        "kernels": kernels(),
        "dtype": DTYPES[q.dtype],
        "sizes": (batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v),
        "packed": places,
        "q": broadcast_view(q),
        "k": broadcast_view(k),
        "v": broadcast_view(v),
        "out": broadcast_view(out),
        "lse": lse.data_ptr(),
        "mask": mask_arguments(mask, batch, heads_q),
        "n_blocks": 0 if blocks is None else blocks.col.numel(),
        "n_bitmaps": 0 if blocks is None else blocks.bitmaps.shape[0],
        "bias": broadcast_view(dense),
        "bias_dtype": 0 if dense is None else DTYPES[dense.dtype],
        "distance": distance_arguments(bias),
        "sinks": address(sinks),
        "scale": scale,
        "softcap": softcap,
        "dropout": dropout_arguments(dropout_seed, dropout_p),
        **place(q),
    }


def _transpose(mask: LoweredMask, batch: int, heads: int) -> tuple[Any, ...]:
    """How the mask reads by keys: the bounds of its intervals, and the columns of its blocks."""
    bounds, blocks = mask.bounds, mask.blocks
    if bounds is not None:
        bounds = bounds.expand(bounds.shape[0], batch, heads, -1, 4)
    columns: tuple[Any, int, int] = (None, 0, 0)
    if blocks is not None:
        columns = (broadcast_view(blocks.col_ptr), address(blocks.row), address(blocks.row_id))
    return (None if bounds is None else (bounds.data_ptr(), *bounds.stride()[:4]), *columns)
