"""Attention on csrc/cpu/attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.backends.codes import DTYPES
from fastattn.backends.cpu.decode import attention_decode
from fastattn.backends.cpu.library import dropout_arguments, native
from fastattn.backends.few import as_decoding
from fastattn.backends.views import (
    address,
    broadcast_view,
    copied,
    distance_arguments,
    empty_out,
    mask_arguments,
    view,
    writable,
)
from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import LoweredMask
from fastattn.packed import Packed

OFTEN = 256
"""Queries that read a row of keys or values, from which on a copy of scattered rows costs less than reading them does.
Of 512 to 1,024 queries, heads side by side: 1.2 to 1.4 times as fast forward, copies included, with 128 queries equal,
with 16 two thirds (float32, D 64 and 128, 2 cores of an AMD EPYC (Zen 3, AVX2, VM), 2026-11-26)."""


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
    batch, heads, len_q, _ = q.shape
    decoding = as_decoding(mask, bias, len_q, k.shape[2], q.device) if packed is None and dropout_p == 0.0 else None
    if decoding is not None:
        return attention_decode(q, k, v, None, None, *decoding, sinks, scale, softcap)
    k, v = _gathered(k, v, q, mask, packed)
    out = empty_out(q, v.shape[3])
    lse = torch.empty(batch, heads, len_q, dtype=torch.float32)
    sinks = None if sinks is None else sinks.float()
    call = _call_arguments(q, k, v, out, lse, mask, bias, packed, sinks, dropout_seed, scale, softcap, dropout_p)
    native().attention_forward(*call)
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
    deterministic: bool,  # every sum of these kernels has a fixed order
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    wide = [writable(grad) for grad in (dq, dk, dv)]
    k, v = _gathered(k, v, q, mask, packed)
    sinks = None if sinks is None else sinks.float()
    dbias = torch.zeros(bias.dense.shape if bias.dense is not None and bias_requires_grad else 0, dtype=torch.float32)
    dtable = torch.empty(bias.table.shape if bias.table is not None and table_requires_grad else 0, dtype=torch.float32)
    dslopes = torch.empty(
        bias.slopes.shape if bias.slopes is not None and slopes_requires_grad else 0, dtype=torch.float32
    )
    dsinks = torch.empty(q.shape[1] if sinks_requires_grad else 0, dtype=torch.float32)
    call = _call_arguments(q, k, v, out, lse, mask, bias, packed, sinks, dropout_seed, scale, softcap, dropout_p)
    native().attention_backward(
        *call,
        *_views(packed, grad_out),
        address(grad_lse),
        *_views(packed, *wide),
        broadcast_view(dbias if bias_requires_grad else None),
        *map(address, (dtable, dslopes, dsinks)),
    )
    return *copied(wide, (dq, dk, dv)), dbias, dtable, dslopes, dsinks


def _gathered(k: Tensor, v: Tensor, q: Tensor, mask: LoweredMask, packed: Packed | None) -> tuple[Tensor, Tensor]:
    """Keys and values with the rows of a head side by side where they are read often.

    Rows far apart, as (B, S, H, D) has them, share few sets of the caches, and the hardware does not foresee them.
    """
    if mask.intervals is not None or mask.blocks is not None:
        return k, v  # how many queries see a key is not known here
    readers = q.shape[2] if packed is None else packed.max_len_q
    if mask.band_left is not None:
        readers = min(readers, mask.band_left + 1 + (readers if mask.band_right is None else mask.band_right))
    if readers * (q.shape[1] // max(k.shape[1], 1)) < OFTEN:
        return k, v
    return _side_by_side(k), _side_by_side(v)


def _side_by_side(tensor: Tensor) -> Tensor:
    """A tensor (B, H, S, D), or a copy whose rows follow each other; an expanded one stays as small as it is.

    float32 rows of 128 or 256 lie a cache line further apart: read by columns, they would share few sets of the level-1
    cache (2% of a call, same machine and day).
    """
    is_expanded = any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    if is_expanded or tensor.stride(2) == tensor.shape[3]:
        return tensor
    *lead, dim = tensor.shape
    if tensor.dtype != torch.float32 or dim % 128:
        return tensor.contiguous()
    return tensor.new_empty(*lead, dim + 16)[..., :dim].copy_(tensor)


def _views(packed: Packed | None, *tensors: Tensor) -> tuple[tuple[int, ...] | None, ...]:
    """Tensors with rows of queries or keys: in a packed batch all sequences count from the one entry they are in."""
    return tuple(map(view if packed is None else broadcast_view, tensors))


def _call_arguments(
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
) -> tuple[Any, ...]:
    batch, heads_q, len_q, dim_qk = q.shape
    _, heads_kv, len_k, dim_v = v.shape
    places = (0, 0, 0, 0)
    if packed is not None:
        places = (packed.cu_seqlens_q.data_ptr(), packed.cu_seqlens_k.data_ptr(), len_q, len_k)
        batch, len_q, len_k = packed.batch, packed.max_len_q, packed.max_len_k
    dense = None if bias.dense is None else bias.dense.expand(batch, heads_q, len_q, len_k)
    return (
        DTYPES[q.dtype],
        torch.get_num_threads(),
        (batch, heads_q, heads_kv, len_q, len_k, dim_qk, dim_v),
        places,
        *_views(packed, q, k, v, out),
        lse.data_ptr(),
        mask_arguments(mask, batch, heads_q),
        broadcast_view(dense),
        0 if dense is None else DTYPES[dense.dtype],
        distance_arguments(bias),
        address(sinks),
        scale,
        softcap,
        dropout_arguments(dropout_seed, dropout_p),
    )
