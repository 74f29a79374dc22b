"""Attention over a key-value cache on csrc/cuda/attention. Arguments and results: fastattn.backends.protocol."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.backends.codes import DTYPES
from fastattn.backends.cuda.library import device_reasons, load, multiprocessors, place
from fastattn.backends.parts import cut, keys_seen
from fastattn.backends.views import address, broadcast_view, distance_arguments, empty_out
from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import LoweredMask
from fastattn.problems import AttentionProblem, DecodeProblem

_DTYPES = (torch.bfloat16, torch.float16)
_MAX_DIM = 256
_MAX_LENGTH = 2**30  # positions and band limits are added in int32
_TILE_KEYS = 64  # what parts are multiples of: the largest tile of csrc/cuda/attention/sm80_decode.cuh
_FEW_ROWS = 16
_BLOCKS_PER_PROCESSOR = 2  # what the shared memory of compute capability 8.0 holds of head dim 128; unmeasured


def input_reasons(what: str, problem: AttentionProblem | DecodeProblem) -> list[str]:
    """Why the kernels of attention or decoding refuse the device, dtypes, head dims or lengths of a problem."""
    reasons = device_reasons(problem.device_type)
    if problem.dtype not in _DTYPES:
        reasons.append(f"the CUDA {what} takes bfloat16 and float16, and q is {problem.dtype}")
    if problem.bias is not None and problem.bias not in DTYPES:
        reasons.append(f"the CUDA {what} takes a bias of float32, bfloat16 and float16, and bias is {problem.bias}")
    for name, dim in (("D", problem.dim_qk), ("Dv", problem.dim_v)):
        if not 1 <= dim <= _MAX_DIM:
            reasons.append(f"the CUDA {what} takes head dims of 1 to {_MAX_DIM}, and {name} is {dim}")
    for name, length in (("Sq", problem.len_q), ("Skv", problem.len_k)):
        if length >= _MAX_LENGTH:
            reasons.append(f"the CUDA {what} takes fewer than 2**30 positions, and {name} is {length}")
    return reasons


def decode_reasons(problem: DecodeProblem) -> list[str]:
    """Why a decoding problem is refused; empty when it runs."""
    return input_reasons("decoding", problem)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    mask: LoweredMask,
    bias: LoweredBias,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """See the protocol. Lengths are clamped to the cache, entries of block_table to its pages.

    RuntimeError with the call, the CUDA error and the shapes where a launch fails.
    """
    batch, heads, len_q, dim = q.shape
    dim_v = v_cache.shape[3]
    if block_table is None:
        heads_kv, room, pages = k_cache.shape[1], k_cache.shape[2], (0, 0, 0)
    else:
        page_size, heads_kv = k_cache.shape[1], k_cache.shape[2]
        room, pages = block_table.shape[1] * page_size, (block_table.data_ptr(), block_table.shape[1], page_size)
    out = empty_out(q, dim_v)
    lse = q.new_empty(batch, heads, len_q, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    blocks = batch * heads_kv * _row_tiles(heads // heads_kv * len_q, max(dim, dim_v))
    wanted = _BLOCKS_PER_PROCESSOR * multiprocessors(q)
    parts, part_keys = cut(blocks, keys_seen(room, len_q, mask), _TILE_KEYS, wanted)
    sums, statistics = (None if parts == 1 else lse.new_empty(parts, lse.numel(), n) for n in (dim_v, 2))
    intervals, dense = mask.intervals, bias.dense
    if intervals is not None:
        intervals = intervals.expand(-1, batch, heads, len_q, 2)
    if dense is not None:
        dense = dense.expand(batch, heads, len_q, room)
    sinks = None if sinks is None else sinks.float()
    load().attention_decode(
        dtype=DTYPES[q.dtype],
        sizes=(batch, heads, heads_kv, len_q, dim, dim_v, room),
        q=broadcast_view(q),
        k=broadcast_view(k_cache),
        v=broadcast_view(v_cache),
        out=broadcast_view(out),
        lse=lse.data_ptr(),
        entries=k_cache.shape[0],
        cache_lengths=cache_lengths.data_ptr(),
        pages=pages,
        band=(mask.band_left, mask.band_right),
        intervals=None if intervals is None else (intervals.data_ptr(), *intervals.stride()[:4]),
        n_intervals=0 if intervals is None else intervals.shape[0],
        bias=broadcast_view(dense),
        bias_dtype=0 if dense is None else DTYPES[dense.dtype],
        distance=distance_arguments(bias),
        sinks=address(sinks),
        scale=scale,
        softcap=softcap,
        parts=(parts, part_keys, address(sums), address(statistics)),
        **place(q),
    )
    return out, lse


def _row_tiles(rows: int, dim: int) -> int:
    """Blocks that share the rows of a head group, as csrc/cuda/attention/sm80_decode_dtype.cuh chooses them."""
    return 1 if rows <= _FEW_ROWS else -(-rows // (64 if dim <= 128 else 32))
