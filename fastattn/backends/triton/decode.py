"""Launches the kernels of fastattn.kernels.attention.decode. Arguments and results: fastattn.backends.protocol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.backends.parts import cut, keys_seen
from fastattn.backends.triton.launch import architecture, dot_precision, launch, multiprocessors
from fastattn.backends.triton.plan import FAR, bias_arguments, interval_arguments, near
from fastattn.backends.views import empty_out
from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import LoweredMask
from fastattn.problems import AttentionProblem, DecodeProblem

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_DIM = 256
_MAX_LENGTH = 2**30  # positions and band limits are added in int32
MAX_ENTRIES = 2**16  # of a grid's second dimension
_MAX_ROWS = (2**16 - 1) * 16  # in tiles of at least 16, of a grid's third dimension
_PROGRAMS_PER_PROCESSOR = 2
_PROCESSORS = 3  # to plan for in the interpreter, so that a cache has several parts there


def input_reasons(what: str, problem: AttentionProblem | DecodeProblem) -> list[str]:
    """Why the kernels of attention or decoding refuse the dtypes, head dims or lengths of a problem."""
    reasons = []
    for name, dtype in (("q", problem.dtype), ("bias", problem.bias)):
        if dtype is not None and dtype not in _DTYPES:
            shown = str(dtype).removeprefix("torch.")
            reasons.append(f"the Triton {what} takes float32, bfloat16 and float16, and {name} is {shown}")
    for name, dim in (("D", problem.dim_qk), ("Dv", problem.dim_v)):
        if not 1 <= dim <= _MAX_DIM:
            reasons.append(f"the Triton {what} takes head dims of 1 to {_MAX_DIM}, and {name} is {dim}")
    for name, length in (("Sq", problem.len_q), ("Skv", problem.len_k)):
        if length >= _MAX_LENGTH:
            reasons.append(f"the Triton {what} takes fewer than 2**30 positions, and {name} is {length}")
    return reasons


def decode_reasons(problem: DecodeProblem) -> list[str]:
    """Why the kernels refuse a problem, whatever its device."""
    reasons = input_reasons("decoding", problem)
    if problem.batch * problem.heads_kv >= MAX_ENTRIES:
        reasons.append(f"the Triton decoding takes fewer than 2**16 of B x Hkv, not {problem.batch * problem.heads_kv}")
    rows = problem.heads_q // max(problem.heads_kv, 1) * problem.len_q
    if rows > _MAX_ROWS:
        reasons.append(f"the Triton decoding takes up to {_MAX_ROWS} queries of one key head, not {rows}")
    return reasons


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
    """See the protocol."""
    from fastattn.kernels.attention.decode import attention_combine_kernel, attention_decode_kernel
    from fastattn.kernels.tiles import bytes_of_pairs, decode_tile

    batch, heads, len_q, dim = q.shape
    dim_v = v_cache.shape[3]
    out = empty_out(q, dim_v)
    lse = q.new_empty(batch, heads, len_q, dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    cache = _cache_arguments(k_cache, v_cache, block_table)
    heads_kv, room = cache["heads_kv"], cache["room"]
    rows = heads // heads_kv * len_q
    pair_bytes = bytes_of_pairs(bias.dense, bias.table)
    tile = decode_tile(architecture(q.device), rows, max(dim, dim_v), q.element_size(), pair_bytes)
    tiles = -(-rows // tile.block_q)
    wanted = _PROGRAMS_PER_PROCESSOR * (multiprocessors(q.device) or _PROCESSORS)
    parts, part_keys = cut(batch * heads_kv * tiles, keys_seen(room, len_q, mask), tile.block_k, wanted)
    whole = parts == 1
    sums, highests, totals = (None if whole else lse.new_empty(parts, lse.numel() * n) for n in (dim_v, 1, 1))
    shared: dict[str, Any] = {
        "out": out,
        **_strides("out", out, (0, 1, 2)),
        "lse": lse,
        "sums": sums,
        "highests": highests,
        "totals": totals,
        "sinks": None if sinks is None else sinks.float(),
        "heads_q": heads,
        "len_q": len_q,
        "parts": parts,
        "DIM_V": dim_v,
        "WIDE_V": _wide(dim_v),
    }
    full = (batch, heads, len_q, room)
    biased = any(t is not None for t in (bias.dense, bias.table, bias.slopes))
    arguments = shared | cache | interval_arguments(mask) | bias_arguments(bias, full)
    arguments |= {
        "band_low": -FAR if mask.band_left is None else near(-mask.band_left),
        "band_high": FAR if mask.band_right is None else near(mask.band_right),
        "HAS_BAND": mask.band_left is not None or mask.band_right is not None,
        "q": q,
        **_strides("q", q, (0, 1, 2)),
        "cache_lengths": cache_lengths,
        "group": heads // heads_kv,
        "rows": rows,
        "part_keys": part_keys,
        "scale": scale,
        "softcap": softcap,
        "DIM": dim,
        "WIDE": _wide(dim),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "WHOLE": whole,
        "FOLDED": scale > 0.0 and softcap == 0.0 and not biased,
        "SOFTCAP": softcap != 0.0,
        "PRECISION": dot_precision(),
    }
    launch(attention_decode_kernel, (parts, batch * heads_kv, tiles), arguments, **tile.options(plain=False))
    if not whole:
        together = shared | {"rows": lse.numel(), "BLOCK_Q": 4}
        launch(attention_combine_kernel, (-(-lse.numel() // 4),), together, num_warps=4, num_stages=1)
    return out, lse


def _cache_arguments(k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> dict[str, Any]:
    """Where keys and values lie, in one piece or, with a block table, in pages; room: how many positions there are."""
    if block_table is None:
        order, heads_kv, room, page_size, table_b = (0, 1, 2), k_cache.shape[1], k_cache.shape[2], 1, 0
    else:
        page_size, heads_kv = k_cache.shape[1], k_cache.shape[2]
        order, table_b = (0, 2, 1), block_table.shape[1]
        room = table_b * page_size
    return {
        "k": k_cache,
        **_strides("k", k_cache, order),
        "v": v_cache,
        **_strides("v", v_cache, order),
        "block_table": block_table,
        "table_b": table_b,
        "page_size": page_size,
        "heads_kv": heads_kv,
        "room": room,
    }


def _strides(name: str, tensor: Tensor, order: tuple[int, int, int]) -> dict[str, int]:
    """Strides of batch (or page), head and row."""
    return {f"{name}_{letter}": tensor.stride(d) for letter, d in zip("bhs", order, strict=True)}


def _wide(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())
