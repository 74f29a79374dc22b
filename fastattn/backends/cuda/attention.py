"""Attention forward on csrc/cuda/attention. Arguments and results are those of fastattn.backends.protocol."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.backends.codes import DTYPES
from fastattn.backends.cuda.library import device_reasons, dropout_arguments, load, place
from fastattn.backends.views import address, broadcast_view, distance_arguments, empty_out, mask_arguments
from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import LoweredMask
from fastattn.packed import Packed
from fastattn.problems import AttentionProblem

_MAX_DIM = 256
_DTYPES = (torch.bfloat16, torch.float16)


def attention_reasons(problem: AttentionProblem) -> list[str]:
    """Why an attention problem is refused; empty when it runs."""
    reasons = device_reasons(problem.device_type)
    if problem.dtype not in _DTYPES:
        reasons.append(f"the CUDA attention takes bfloat16 and float16, and q is {problem.dtype}")
    if problem.requires_grad:
        reasons.append("the CUDA attention has no backward")
    if not (1 <= problem.dim_qk <= _MAX_DIM and 1 <= problem.dim_v <= _MAX_DIM):
        reasons.append(
            f"the CUDA attention takes head dims of 1 to {_MAX_DIM}, not {problem.dim_qk} and {problem.dim_v}"
        )
    if max(problem.len_q, problem.len_k) >= 2**30:
        reasons.append(
            f"the CUDA attention takes fewer than 2**30 queries and keys, not {problem.len_q} and {problem.len_k}"
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
    batch, heads_q, len_q, dim_qk = q.shape
    _, heads_kv, len_k, dim_v = v.shape
    out = empty_out(q, dim_v)
    lse = q.new_empty(batch, heads_q, len_q, dtype=torch.float32)
    places = (0, 0, 0, 0)
    if packed is not None:
        if packed.batch == 0:  # all rows are of no sequence
            return out.zero_(), lse.fill_(-torch.inf)
        places = (packed.cu_seqlens_q.data_ptr(), packed.cu_seqlens_k.data_ptr(), len_q, len_k)
        batch, len_q, len_k = packed.batch, packed.max_len_q, packed.max_len_k
    sinks = None if sinks is None else sinks.float()
    dense = None if bias.dense is None else bias.dense.expand(batch, heads_q, len_q, len_k)
    blocks = mask.blocks
    load().attention_forward(
        dtype=DTYPES[q.dtype],
        sizes=(batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v),
        packed=places,
        q=broadcast_view(q),
        k=broadcast_view(k),
        v=broadcast_view(v),
        out=broadcast_view(out),
        lse=lse.data_ptr(),
        mask=mask_arguments(mask, batch, heads_q),
        n_blocks=0 if blocks is None else blocks.col.numel(),
        n_bitmaps=0 if blocks is None else blocks.bitmaps.shape[0],
        bias=broadcast_view(dense),
        bias_dtype=0 if dense is None else DTYPES[dense.dtype],
        distance=distance_arguments(bias),
        sinks=address(sinks),
        scale=scale,
        softcap=softcap,
        dropout=dropout_arguments(dropout_seed, dropout_p),
        **place(q),
    )
    return out, lse
