"""The decode operator: attention over a key-value cache. Inference only, so that it has no backward.

fastattn::attention_decode_forward; shapes and results: `fastattn.backends.protocol`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn import dispatch
from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import LoweredMask
from fastattn.ops.library import (
    InDims,
    VmapResult,
    dense,
    fold_broadcast,
    fold_dim,
    lift,
    register,
    unit_stride,
)
from fastattn.problems import DecodeProblem
from fastattn.reference.attention import accumulate_dtype


def _forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    band_left: int | None,
    band_right: int | None,
    intervals: Tensor | None,
    bias: Tensor | None,
    table: Tensor | None,
    table_first: int,
    slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, heads_q, len_q, dim_qk = q.shape
    is_paged = block_table is not None
    fields = (
        q.device.type,
        q.dtype,
        batch,
        heads_q,
        k_cache.shape[2 if is_paged else 1],
        len_q,
        room_of(k_cache, block_table),
        dim_qk,
        v_cache.shape[3],
        is_paged,
        band_left is not None or band_right is not None,
        0 if intervals is None else intervals.shape[0],
        None if bias is None else bias.dtype,
        table is not None,
        slopes is not None,
        softcap != 0.0,
        sinks is not None,
    )
    _check_places(k_cache, cache_lengths, block_table)
    out, lse = dispatch.choose(DecodeProblem, fields, backend).attention_decode(
        unit_stride(q),
        unit_stride(k_cache),
        unit_stride(v_cache),
        dense(cache_lengths),
        dense(block_table),
        LoweredMask(band_left=band_left, band_right=band_right, intervals=dense(intervals)),
        LoweredBias(bias, dense(table), table_first, dense(slopes)),
        dense(sinks),
        scale,
        softcap,
    )
    return out, lse


def _check_places(k_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None) -> None:
    """ValueError where a sequence is longer than its cache or uses a page that there is not: a kernel would read
    elsewhere.

    Looked at on the host's own tensors only: in a traced call they have no values, on a GPU reading them would wait.
    """
    if cache_lengths.device.type != "cpu" or cache_lengths.numel() == 0:
        return
    pages, page = k_cache.shape[0], k_cache.shape[1]
    shortest, longest = map(int, cache_lengths.aminmax())
    check_lengths(shortest, longest, room_of(k_cache, block_table))
    if block_table is None or block_table.numel() == 0:
        return
    first, last = map(int, block_table.aminmax())
    if first >= 0 and last < pages:
        return
    for b, length in enumerate(cache_lengths.tolist()):  # what lies past a sequence's end may be anything
        used = block_table[b, : -(-length // max(page, 1))].tolist()
        wrong = [n for n in used if not 0 <= n < pages]
        if wrong:
            raise ValueError(
                f"block_table[{b}] names page {wrong[0]}, but the cache has {pages}: pass 0 to {pages - 1}"
            )


def room_of(k_cache: Tensor, block_table: Tensor | None) -> int:
    """How many keys a sequence may have."""
    return k_cache.shape[2] if block_table is None else block_table.shape[1] * k_cache.shape[1]


def check_lengths(shortest: int, longest: int, room: int) -> None:
    """ValueError where a sequence does not fit into its cache."""
    if shortest < 0 or longest > room:
        raise ValueError(
            f"cache_lengths holds {shortest if shortest < 0 else longest}, but the cache has room for {room} keys: "
            f"pass 0 to {room} for each sequence"
        )


def _fake_forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, len_q, _ = q.shape
    out = q.new_empty(batch, len_q, heads, v_cache.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, len_q, dtype=accumulate_dtype(q.dtype))


def _fold(size: int, dims: InDims, args: tuple[Any, ...]) -> VmapResult | None:
    """One call with all entries in its batch, unless it would copy a cache, or pages, tables or sinks are mapped, which
    have no batch dimension."""
    q, k, v, lengths, block_table, left, right, intervals, bias, table, first, slopes, sinks, *numbers = args
    of_q, of_k, of_v, of_lengths, of_pages, _, _, of_intervals, of_bias, of_table, _, of_slopes, of_sinks, *_ = dims
    if of_table is not None or of_sinks is not None:
        return None
    if block_table is None:
        k, v = lift(k, of_k, size), lift(v, of_v, size)
        if not (_is_one_batch(k) and _is_one_batch(v)):
            return None
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    elif of_k is not None or of_v is not None:
        return None
    else:
        block_table = fold_dim(block_table, of_pages, size)
    q, lengths = fold_dim(q, of_q, size), fold_dim(lengths, of_lengths, size)
    batch = q.shape[0] // size
    if intervals is not None:
        intervals = fold_broadcast(intervals, of_intervals, size, batch, at=1)
    if bias is not None:
        bias = fold_broadcast(bias, of_bias, size, batch)
    if slopes is not None:
        slopes = fold_broadcast(slopes, of_slopes, size, batch)
    of_mask_and_bias = (left, right, intervals, bias, table, first, slopes)
    out, lse = attention_decode_forward(q, k, v, lengths, block_table, *of_mask_and_bias, sinks, *numbers)
    return (out.unflatten(0, (size, batch)), lse.unflatten(0, (size, batch))), (0, 0)


def _is_one_batch(cache: Tensor) -> bool:
    """Whether the first two dimensions are one in memory, so that merging them copies nothing."""
    (size, batch), (step, within) = cache.shape[:2], cache.stride()[:2]
    return size == 1 or batch == 1 or step == batch * within


attention_decode_forward = register(
    "attention_decode_forward",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lengths, Tensor? block_table, SymInt? band_left, "
    "SymInt? band_right, Tensor? intervals, Tensor? bias, Tensor? table, SymInt table_first, Tensor? slopes, "
    "Tensor? sinks, float scale, float softcap, str backend) "
    "-> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _fold,
)
