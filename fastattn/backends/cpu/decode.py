"""Attention over a key-value cache on csrc/cpu/attention/decode.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.backends.codes import DTYPES
from fastattn.backends.cpu.library import native
from fastattn.backends.views import address, distance_arguments, empty_out, view
from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import LoweredMask


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor | None,
    block_table: Tensor | None,
    mask: LoweredMask,
    bias: LoweredBias,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """As in the protocol; cache_lengths None: the caches are full."""
    batch, heads, len_q, dim = q.shape
    if block_table is None:
        heads_kv, room, pages = k_cache.shape[1], k_cache.shape[2], (0, 0, 0)
    else:
        page_size, heads_kv = k_cache.shape[1], k_cache.shape[2]
        room, pages = block_table.shape[1] * page_size, (block_table.data_ptr(), block_table.shape[1], page_size)
    out = empty_out(q, v_cache.shape[3])
    lse = torch.empty(batch, heads, len_q, dtype=torch.float32)
    sinks = None if sinks is None else sinks.float()
    intervals = mask.intervals
    if intervals is not None:
        intervals = intervals.expand(-1, batch, heads, -1, -1)
    dense = bias.dense
    if dense is not None:
        dense = dense.expand(batch, heads, len_q, room)
    native().attention_decode(
        DTYPES[q.dtype],
        torch.get_num_threads(),
        (batch, heads, heads_kv, len_q, dim, v_cache.shape[3], room),
        view(q),
        view(k_cache),
        view(v_cache),
        view(out),
        lse.data_ptr(),
        address(cache_lengths),
        pages,
        (mask.band_left, mask.band_right),
        None if intervals is None else (intervals.data_ptr(), *intervals.stride()[:4]),
        0 if intervals is None else intervals.shape[0],
        view(dense),
        0 if dense is None else DTYPES[dense.dtype],
        distance_arguments(bias),
        address(sinks),
        scale,
        softcap,
    )
    return out, lse
