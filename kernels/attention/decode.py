"""Attention over a key-value cache: few queries a sequence against many keys, whose time is that of reading the cache.

Contract
    q (B, Hq, Sq, D), out (B, Hq, Sq, Dv), lse (B, Hq, Sq) float32. The cache is (B, Hkv, S, D) and (B, Hkv, S, Dv), or
    lies in pages, (pages, page size, Hkv, D): block_table (B, n) names those of each sequence in order. cache_lengths
    (B,) int32 counts the keys in use, those of the queries included: query i sits at position length - Sq + i. What
    lies behind them is never used. One of float32, bfloat16 and float16; any strides, with a contiguous last dimension;
    D and Dv from 1 to 256. Band, intervals and biases as in forward.py, the band about the query's position.

Numerics
    As in forward.py, but that weights of half tensors are multiplied in two parts, what rounding takes off being the
    second: the products of few rows cost little, and with one query of one value column there are no others whose
    errors would make up for those of rounded weights. A query that sees no key gives 0 and -inf.

Algorithm
    The queries of a head group are the rows of one tile, so that each key is read once for all of them. The keys that
    the band leaves of a sequence are cut into parts, one a program, so that a few sequences keep every multiprocessor
    busy; each part makes its own softmax, and a second kernel puts them together in order (Flash-Decoding, Dao et al.
    2023). With one part the first kernel finishes alone.

Measured
    H100 80GB HBM3, Triton 3.6, bfloat16, 16 sequences x 12 heads x 64, 2,048 keys cached: 0.052 ms, 1.64 TB/s; torch's
    fastest, cuDNN, 0.055 in the same run (bench/results/nvidia-h100-80gb-hbm3-2026-11-26). On an H200 all of 2,000
    random cases were within the parity rule, 2026-11-27.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.attention.mask import VARYING, interval_of
from fastattn.kernels.attention.tile import exp_distance, scores_of, unit_of
from fastattn.kernels.numerics import LOG2E, dot, dot_add, narrow


@triton.jit
def rows_at(base, offsets, within, DIM: tl.constexpr, WIDE: tl.constexpr):
    """(rows, WIDE) from these offsets on; 0 past column DIM and where `within` is False."""
    columns = tl.arange(0, WIDE)
    mask = within[:, None] & (columns < DIM)[None, :]
    return tl.load(base + offsets[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def places(block_table, table_b, page_size, batch, keys, within, by_batch, by_key):
    """Offsets (int64) of the rows of keys in a cache, or in its pages, whose first stride is by_batch."""
    if block_table is None:
        return batch.to(tl.int64) * by_batch + keys.to(tl.int64) * by_key
    else:
        page = tl.load(block_table + batch.to(tl.int64) * table_b + keys // page_size, mask=within, other=0)
        return page.to(tl.int64) * by_batch + (keys % page_size).to(tl.int64) * by_key


@triton.jit(do_not_specialize=(*VARYING, "rows", "parts", "part_keys", "page_size", "table_b", "room"))
def attention_decode_kernel(
    q, q_b, q_h, q_s, k, k_b, k_h, k_s, v, v_b, v_h, v_s, out, out_b, out_h, out_s, lse, sums, highests, totals,
    cache_lengths, block_table, table_b, page_size, band_low, band_high, intervals, by_interval, intervals_b,
    intervals_h, bias, bias_b, bias_h, bias_q, bias_k, table, table_h, table_first, table_last, slopes, slopes_b, sinks,
    heads_q, heads_kv, group, len_q, rows, room, parts, part_keys, scale, softcap,
    DIM: tl.constexpr, WIDE: tl.constexpr, DIM_V: tl.constexpr, WIDE_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BAND: tl.constexpr, INTERVALS: tl.constexpr,
    WHOLE: tl.constexpr, FOLDED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (part, batch entry and key head, tile of the rows of a head group). WHOLE: of one part, it writes
    the result; else sums (parts, B, Hq, Sq, Dv), highests and totals (parts, B, Hq, Sq) float32."""
    part, entry = tl.program_id(0), tl.program_id(1)
    batch, head_kv = entry // heads_kv, entry % heads_kv
    row = tl.program_id(2) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    within = row < rows
    row = tl.minimum(row, rows - 1)
    head, query = head_kv * group + row // len_q, row % len_q
    length = tl.maximum(tl.minimum(tl.load(cache_lengths + batch), room), 0)
    origin = length - len_q
    begin, end = length * 0, length
    if HAS_BAND:
        begin = tl.maximum(begin, origin + band_low)
        end = tl.minimum(end, length + band_high)
    begin += part * part_keys
    end = tl.minimum(end, begin + part_keys)

    q_at = batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h + query.to(tl.int64) * q_s
    q_tile = rows_at(q, q_at, within, DIM, WIDE)
    k_base, v_base = k + head_kv.to(tl.int64) * k_h, v + head_kv.to(tl.int64) * v_h
    bias_of = (bias, bias_b, bias_h, bias_q, bias_k, table, table_h, table_first, table_last, slopes, slopes_b,
               origin)  # fmt: skip
    unit = unit_of(scale, FOLDED)
    highest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    summed = tl.zeros((BLOCK_Q, WIDE_V), tl.float32)
    for i in range(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_K)):
        keys = begin + i * BLOCK_K + tl.arange(0, BLOCK_K)
        there = keys < end
        k_at = places(block_table, table_b, page_size, batch, keys, there, k_b, k_s)
        k_tile = rows_at(k_base, k_at, there, DIM, WIDE)
        product = dot(q_tile, tl.trans(k_tile), PRECISION)
        score, _ = scores_of(
            product, bias_of, batch, head[:, None], query[:, None], keys[None, :], len_q, end, scale, softcap,
            FOLDED, SOFTCAP,
        )  # fmt: skip
        seen = there[None, :] & within[:, None]
        if HAS_BAND:
            distance = keys[None, :] - query[:, None] - origin
            seen = seen & (distance >= band_low) & (distance <= band_high)
        if INTERVALS > 0:
            inside = query[:, None] < 0
            for r in tl.static_range(INTERVALS):
                first, last = interval_of(
                    intervals, r, by_interval, intervals_b, intervals_h, batch, head[:, None], query[:, None], len_q
                )  # fmt: skip
                inside = inside | ((keys[None, :] >= first) & (keys[None, :] < last))
            seen = seen & inside
        score = tl.where(seen, score, -float("inf"))
        before = highest
        highest = tl.maximum(highest, tl.max(score, 1))
        base = tl.where(highest == -float("inf"), 0.0, highest)  # -inf - -inf would be NaN
        if FOLDED:
            base *= unit
        correction = exp_distance(before, base, unit, FOLDED)
        weight = exp_distance(score, base[:, None], unit, FOLDED)
        total = total * correction + tl.sum(weight, 1)
        v_at = places(block_table, table_b, page_size, batch, keys, there, v_b, v_s)
        v_tile = rows_at(v_base, v_at, there, DIM_V, WIDE_V)
        if bias is not None or INTERVALS > 0:  # what nobody sees may hold NaN
            # Not in the mask of the load: one that waits for a product cannot be pipelined on Hopper.
            v_tile = tl.where((tl.max(score, 0) > -float("inf"))[:, None], v_tile, tl.zeros_like(v_tile))
        summed *= correction[:, None]
        rounded = narrow(weight, v_tile.dtype)
        if v_tile.dtype != tl.float32:
            summed = dot_add(narrow(weight - rounded.to(tl.float32), v_tile.dtype), v_tile, summed, PRECISION)
        summed = dot_add(rounded, v_tile, summed, PRECISION)

    natural = highest
    if FOLDED:
        natural = highest * scale
    columns = tl.arange(0, WIDE_V)
    stored = within[:, None] & (columns < DIM_V)[None, :]
    at = (batch * heads_q + head).to(tl.int64) * len_q + query
    if WHOLE:
        norm, log_sum = finished(natural, total, head, sinks)
        out_at = batch.to(tl.int64) * out_b + head.to(tl.int64) * out_h + query.to(tl.int64) * out_s
        value = narrow(summed * norm[:, None], out.dtype.element_ty)
        tl.store(out + out_at[:, None] + columns[None, :], value, mask=stored)
        tl.store(lse + at, log_sum, mask=within)
    else:
        at += part.to(tl.int64) * tl.num_programs(1).to(tl.int64) * rows
        tl.store(sums + at[:, None] * DIM_V + columns[None, :], summed, mask=stored)
        tl.store(highests + at, natural, mask=within)
        tl.store(totals + at, total, mask=within)


@triton.jit(do_not_specialize=("len_q", "rows", "parts"))
def attention_combine_kernel(
    sums, highests, totals, out, out_b, out_h, out_s, lse, sinks, heads_q, len_q, rows, parts,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """The parts put together, in order; one program per BLOCK_Q rows of (B, Hq, Sq)."""
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    within = row < rows
    columns = tl.arange(0, WIDE_V)
    stored = within[:, None] & (columns < DIM_V)[None, :]
    highest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    summed = tl.zeros((BLOCK_Q, WIDE_V), tl.float32)
    for part in range(parts):
        at = part * rows.to(tl.int64) + row
        before = highest
        own = tl.load(highests + at, mask=within, other=-float("inf"))
        highest = tl.maximum(highest, own)
        base = tl.where(highest == -float("inf"), 0.0, highest)
        correction, share = tl.exp2((before - base) * LOG2E), tl.exp2((own - base) * LOG2E)
        total = total * correction + tl.load(totals + at, mask=within, other=0.0) * share
        value = tl.load(sums + at[:, None] * DIM_V + columns[None, :], mask=stored, other=0.0)
        summed = summed * correction[:, None] + value * share[:, None]
    head, query = row // len_q % heads_q, row % len_q
    norm, log_sum = finished(highest, total, tl.where(within, head, 0), sinks)
    batch = row // (heads_q * len_q)
    out_at = batch.to(tl.int64) * out_b + head.to(tl.int64) * out_h + query.to(tl.int64) * out_s
    value = narrow(summed * norm[:, None], out.dtype.element_ty)
    tl.store(out + out_at[:, None] + columns[None, :], value, mask=stored)
    tl.store(lse + row, log_sum, mask=within)


@triton.jit
def finished(highest, total, head, sinks):
    """What the sums of a row are multiplied with, and its log-sum-exp; highest in natural units."""
    divisor = total
    if sinks is not None:
        divisor += tl.exp2((tl.load(sinks + head) - highest) * LOG2E)
    norm = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, divisor))
    log_sum = highest + tl.log(tl.where(total == 0.0, 1.0, total))
    return norm, tl.where(total == 0.0, -float("inf"), log_sum)
