"""The decode operator: attention over a key-value cache. Inference only, so that it has no backward.

fastattn::attention_decode_forward; shapes and results: `fastattn.backends.protocol`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn import dispatch
from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import LoweredMask
from fastattn.ops.library import InDims, VmapResult, dense, register, unit_stride
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
    fields = (
        q.device.type,
        q.dtype,
        *q.shape,
        k_cache.shape[1 if block_table is None else 2],
        v_cache.shape[3],
        block_table is not None,
        band_left is not None or band_right is not None,
        0 if intervals is None else intervals.shape[0],
        None if bias is None else bias.dtype,
        table is not None,
        slopes is not None,
        softcap != 0.0,
        sinks is not None,
    )
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


def _fake_forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, len_q, _ = q.shape
    out = q.new_empty(batch, len_q, heads, v_cache.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, len_q, dtype=accumulate_dtype(q.dtype))


def _fold(size: int, dims: InDims, args: tuple[Any, ...]) -> VmapResult | None:
    return None  # caches are too large to copy: one call per entry


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
