"""Attention forward: out = softmax(scale q k^T, softcapped, + bias, masked; one extra logit for a sink) v, and its
log-sum-exp.

Contract
    q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv), out (B, Hq, Sq, Dv), lse (B, Hq, Sq) float32. One of
    float32, bfloat16 and float16; any strides, with a contiguous last dimension; D and Dv from 1 to 256; query head h
    reads key head h // group. The mask is that of mask.py; biases are any (B, Hq, Sq, Skv) by strides and functions of
    the distance from query to key (tile.py, scores_of); dropout is that of fastattn.reference.philox. A packed batch is
    one entry of q, k, v and out whose rows cu_seqlens divides into sequences; rows of none are not written.

Numerics
    Scores, softmax and sums in float32; weights are rounded to the dtype of v for their product, but for heads of
    up to 16 columns. A query that sees no key gives 0 and -inf. Keys that form A hides are read as 0, whatever is
    stored there.

Algorithm
    Online softmax (Milakov & Gimelshein 2018; Dao et al. 2022): a program keeps a tile of queries and walks the key
    tiles that it sees, first the full ones, in a loop without mask code, then the partial ones.

Measured
    H100 80GB HBM3, Triton 3.6, bfloat16, 16,384 tokens a call, TFLOP/s at 4,096 positions, full / causal, beside
    torch's FlashAttention-2 of the same run (kernels-before.json in bench/results/nvidia-h100-80gb-hbm3-2026-11-26, and
    kernels.json for what came of it):
    d64   436 / 295 beside 292 / 281; causal 409 once 128 registers let two blocks share a multiprocessor
    d128  434 / 414 beside 329 / 296
    d256  333 / 333 beside 325 / 285; full 474 with tiles of 64 keys in two stages
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.attention.mask import VARYING, band_at, sequence_of, visible_keys, visible_pairs
from fastattn.kernels.attention.tile import (
    accumulate,
    base_of,
    exp_distance,
    load_rows,
    plan_keys,
    products,
    scheduled,
    scores_of,
    store_rows,
    tile_at,
    tile_of_rank,
    unit_of,
)
from fastattn.kernels.numerics import LOG2E
from fastattn.kernels.philox import dropout_tile


@triton.jit(do_not_specialize=VARYING)
def attention_forward_kernel(
    q, q_b, q_h, q_s, k, k_b, k_h, k_s, v, v_b, v_h, v_s, out, out_b, out_h, out_s, lse, lse_b, lse_h,
    key_start, key_end, key_bits, words, key_flags, flags_b, flags_k, band_low, band_high,
    intervals, by_interval, intervals_b, intervals_h, block_ids, ids_b, ids_h, ids_q, bitmaps,
    dense, dense_b, dense_h, dense_q, dense_k,
    tiles, full_counts, partial_counts, order, plan_b, plan_h,
    bias, bias_b, bias_h, bias_q, bias_k, table, table_h, table_first, table_last, slopes, slopes_b,
    cu_q, cu_k, rows_q, rows_k, sinks, seed_pointer, threshold, keep_scale,
    batches, heads_q, group, len_q, len_k, section, scale, softcap,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LISTED: tl.constexpr, LAST_FIRST: tl.constexpr,
    HAS_BAND: tl.constexpr, INTERVALS: tl.constexpr, TOP_LEFT: tl.constexpr, FOLDED: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (batch entry, query head, query tile)."""
    key_mask = (key_start, key_end, key_bits, words, key_flags, flags_b, flags_k)
    plan = (tiles, full_counts, partial_counts, order, plan_b, plan_h)
    packed = (cu_q, cu_k, rows_q, rows_k)
    tiles_q, tiles_k = tl.cdiv(len_q, BLOCK_Q), tl.cdiv(len_k, BLOCK_K)
    entry, rank = scheduled(batches * heads_q, tiles_q, section)
    batch, head = entry // heads_q, entry % heads_q
    tile_q = tile_of_rank(rank, plan, batch, head, tiles_q, LISTED, LAST_FIRST)
    start_q, start_k, len_q, len_k, ends = sequence_of(packed, batch, len_q, len_k)
    band_low, band_high = band_at(packed, band_low, band_high, ends)
    pair_mask = (band_low, band_high, intervals, by_interval, intervals_b, intervals_h, block_ids, ids_b, ids_h, ids_q,
                 bitmaps, dense, dense_b, dense_h, dense_q, dense_k)  # fmt: skip
    origin = ends
    if TOP_LEFT:
        origin = ends * 0
    bias_of = (bias, bias_b, bias_h, bias_q, bias_k, table, table_h, table_first, table_last, slopes, slopes_b,
               origin)  # fmt: skip
    first_q = tile_q * BLOCK_Q
    rows = first_q + tl.arange(0, BLOCK_Q)
    within = rows < len_q
    head_kv = head // group
    q_base = base_of(q, batch, q_b, head, q_h, start_q, q_s, DIM)
    k_base = base_of(k, batch, k_b, head_kv, k_h, start_k, k_s, DIM)
    v_base = base_of(v, batch, v_b, head_kv, v_h, start_k, v_s, DIM_V)
    q_one, q_two = load_rows(q_base, first_q, q_s, within, BLOCK_Q, DIM, WIDE, REST)
    unit = unit_of(scale, FOLDED)
    if seed_pointer is not None:
        seed = tl.load(seed_pointer)

    highest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    one = tl.zeros((BLOCK_Q, WIDE_V), tl.float32)
    two = one
    if REST_V > 0:
        two = tl.zeros((BLOCK_Q, REST_V), tl.float32)
    full, partial, low, full_low, full_high, position = plan_keys(
        key_mask, pair_mask, plan, batch, head, tile_q, tiles_q, tiles_k, len_q, len_k, LISTED, HAS_BAND, BLOCK_Q,
        BLOCK_K,
    )  # fmt: skip
    for PARTIAL in tl.static_range(2):
        for i in range(partial if PARTIAL else full):
            tile_k = tile_at(i, plan, low, full_low, full_high, position, tiles_k, PARTIAL, LISTED)
            first_k = tile_k * BLOCK_K
            keys = first_k + tl.arange(0, BLOCK_K)
            seen = None
            if PARTIAL:
                seen = visible_keys(key_mask, batch, keys, len_k)
            k_one, k_two = load_rows(k_base, first_k, k_s, seen, BLOCK_K, DIM, WIDE, REST)
            product = products(q_one, q_two, k_one, k_two, REST, PRECISION)
            score, slope = scores_of(
                product, bias_of, batch, head, rows[:, None], keys[None, :], len_q, len_k, scale, softcap,
                FOLDED, SOFTCAP,
            )  # fmt: skip
            if PARTIAL:
                pairs = visible_pairs(
                    seen[None, :], pair_mask, batch, head, rows[:, None], keys[None, :], first_k // 64, len_q, len_k,
                    HAS_BAND, INTERVALS,
                )  # fmt: skip
                score = tl.where(pairs, score, -float("inf"))
            before = highest
            highest = tl.maximum(highest, tl.max(score, 1))
            base = highest
            if PARTIAL or bias is not None or table is not None:
                base = tl.where(highest == -float("inf"), 0.0, highest)  # -inf - -inf would be NaN
            if FOLDED:
                base *= unit
            correction = exp_distance(before, base, unit, FOLDED)
            weight = exp_distance(score, base[:, None], unit, FOLDED)
            total = total * correction + tl.sum(weight, 1)
            if seed_pointer is not None:
                weight *= dropout_tile(seed, rows, entry, first_k, threshold, keep_scale, BLOCK_K)
            one *= correction[:, None]
            if REST_V > 0:
                two *= correction[:, None]
            v_one, v_two = load_rows(v_base, first_k, v_s, seen, BLOCK_K, DIM_V, WIDE_V, REST_V)
            one, two = accumulate(one, two, weight, v_one, v_two, REST_V, PRECISION)

    natural = highest
    if FOLDED:
        natural = highest * scale
    divisor = total
    if sinks is not None:
        divisor += tl.exp2((tl.load(sinks + head) - natural) * LOG2E)
    norm = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, divisor))
    one *= norm[:, None]
    if REST_V > 0:
        two *= norm[:, None]
    out_base = base_of(out, batch, out_b, head, out_h, start_q, out_s)
    store_rows(out_base, first_q, out_s, within, one, two, BLOCK_Q, DIM_V, WIDE_V, REST_V)
    log_sum = natural + tl.log(tl.where(total == 0.0, 1.0, total))
    lse_base = base_of(lse, batch, lse_b, head, lse_h, start_q, 1)
    tl.store(lse_base + rows, tl.where(total == 0.0, -float("inf"), log_sum), mask=within)
