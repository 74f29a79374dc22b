"""Attention backward: gradients of q, of k and v, and of the sinks. No atomics: the same bits every run.

    p = softmax(s), with the sink in its denominator;  dp = dropout'(grad_out v^T);  delta = sum over keys of p dp
    ds = p (dp - delta) + grad_lse softmax(s), the last one without the sink
    grad_q = scale ds k,  grad_k = scale ds^T q,  grad_v = dropout(p)^T grad_out
    grad_sink = - sum over queries of p_sink delta
With a softcap ds is also multiplied by 1 - tanh^2; biases get it as it was before.

Contract
    Tensors as in forward.py; grad_out and out have any strides with a contiguous last dimension, lse is the forward's.
    norm and centre, float32 (B, Hq, Sq), are written by the queries kernel and read by the others, run after it.

Numerics
    With e = exp(s - lse) a row's terms are p = e norm and ds = e (dp norm - centre). From a float32 lse and a rounded
    out alone, norm = 1 and centre = sum(grad_out out) would put errors of their own into p and ds: lse has lost log n
    where every score is finfo.min, and a rounded out moves delta by more than ds itself where one key has all the
    weight. So the queries kernel sums e and e dp over its keys, which gives both exactly. The product with k has by
    then been taken with the estimates; a wrong norm is a factor of the row, corrected afterwards, and only where the
    estimated centre was off by more than rounding ds costs anyway (half inputs, rows with one or two keys that matter)
    is the tile walked a second time. Heads of up to 16 columns always are. Beside a sink the gradient of lse, which is
    without it, has another factor: with both, float32 is walked again as well.

Algorithm
    queries: a program keeps a query tile and walks the key tiles it sees, three products each. keys: a program keeps a
    key tile and walks the query tiles that see it, head after head of its group, four products each, transposed so that
    p and ds are left operands as they stand. Gradients of biases: bias.py.

Measured
    H100 80GB HBM3, Triton 3.6, bfloat16, 16,384 tokens a call at 4,096 positions, full, ms, beside torch's
    FlashAttention-2 (bench/results/nvidia-h100-80gb-hbm3-2026-11-26: kernels-before.json, then kernels.json):
    d64   7.87, then 4.87 with keys in tiles of 32 x 128 and queries in 64 x 64 on four warps; beside 4.92
    d128  5.43, then 4.38 with keys in tiles of 32 x 64 and queries in 64 x 64 on four warps; beside 4.64
    d256  13.5, then 9.70 by the queries' tile or 11.7 by the keys', each alone; beside 5.41
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.attention.mask import (
    VARYING,
    band_at,
    sequence_of,
    visible_keys,
    visible_pairs,
)
from fastattn.kernels.attention.tile import (
    accumulate,
    base_of,
    exp_distance,
    exponent_base,
    load_rows,
    plan_keys,
    plan_queries,
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
def attention_queries_kernel(
    q, q_b, q_h, q_s, k, k_b, k_h, k_s, v, v_b, v_h, v_s, out, out_b, out_h, out_s, lse, lse_b, lse_h,
    grad_out, grad_out_b, grad_out_h, grad_out_s, grad_lse, grad_q, grad_q_b, grad_q_h, grad_q_s,
    norm_out, centre_out, sink_terms,
    key_start, key_end, key_bits, words, key_flags, flags_b, flags_k, band_low, band_high,
    intervals, by_interval, intervals_b, intervals_h, block_ids, ids_b, ids_h, ids_q, bitmaps,
    dense, dense_b, dense_h, dense_q, dense_k,
    tiles, full_counts, partial_counts, order, plan_b, plan_h,
    bias, bias_b, bias_h, bias_q, bias_k, table, table_h, table_first, table_last, slopes, slopes_b,
    cu_q, cu_k, rows_q, rows_k, sinks, seed_pointer, threshold, keep_scale,
    batches, heads_q, group, len_q, len_k, section, scale, softcap, tolerance,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LISTED: tl.constexpr, LAST_FIRST: tl.constexpr,
    HAS_BAND: tl.constexpr, INTERVALS: tl.constexpr, TOP_LEFT: tl.constexpr, FOLDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """grad_q, norm, centre and the sinks' terms, by query tile. With CHECKED a tile is walked again where its estimated
    centre is off by more than `tolerance` of the largest row of |ds|."""
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
    k_base = base_of(k, batch, k_b, head // group, k_h, start_k, k_s, DIM)
    v_base = base_of(v, batch, v_b, head // group, v_h, start_k, v_s, DIM_V)
    q_base = base_of(q, batch, q_b, head, q_h, start_q, q_s, DIM)
    g_base = base_of(grad_out, batch, grad_out_b, head, grad_out_h, start_q, grad_out_s, DIM_V)
    o_base = base_of(out, batch, out_b, head, out_h, start_q, out_s, DIM_V)
    q_one, q_two = load_rows(q_base, first_q, q_s, within, BLOCK_Q, DIM, WIDE, REST)
    g_one, g_two = load_rows(g_base, first_q, grad_out_s, within, BLOCK_Q, DIM_V, WIDE_V, REST_V)
    o_one, o_two = load_rows(o_base, first_q, out_s, within, BLOCK_Q, DIM_V, WIDE_V, REST_V)
    delta = tl.sum(g_one.to(tl.float32) * o_one.to(tl.float32), 1)
    if REST_V > 0:
        delta += tl.sum(g_two.to(tl.float32) * o_two.to(tl.float32), 1)
    row = batch.to(tl.int64) * lse_b + head.to(tl.int64) * lse_h + start_q + rows
    log_sum = tl.load(lse + row, mask=within, other=-float("inf"))
    unit = unit_of(scale, FOLDED)
    base = exponent_base(log_sum, unit, FOLDED)
    sink = tl.zeros((BLOCK_Q,), tl.float32)  # e of the sink
    if sinks is not None:
        sink = tl.where(log_sum == -float("inf"), 0.0, tl.exp2((tl.load(sinks + head) - log_sum) * LOG2E))
    of_lse = tl.zeros((BLOCK_Q,), tl.float32)
    if grad_lse is not None:
        of_lse = tl.load(grad_lse + row, mask=within & (log_sum != -float("inf")), other=0.0)
    norm = 1.0 / (1.0 + sink)
    centre = norm * delta - of_lse
    if seed_pointer is not None:
        seed = tl.load(seed_pointer)

    full, partial, low, full_low, full_high, position = plan_keys(
        key_mask, pair_mask, plan, batch, head, tile_q, tiles_q, tiles_k, len_q, len_k, LISTED, HAS_BAND, BLOCK_Q,
        BLOCK_K,
    )  # fmt: skip
    one = tl.zeros((BLOCK_Q, WIDE), tl.float32)
    two = one
    if REST > 0:
        two = tl.zeros((BLOCK_Q, REST), tl.float32)
    walks = len_q * 0 + 1
    if CHECKED:
        walks = len_q * 0 + 2
    while walks > 0:
        one = tl.zeros((BLOCK_Q, WIDE), tl.float32)
        if REST > 0:
            two = tl.zeros((BLOCK_Q, REST), tl.float32)
        else:
            two = one
        total = tl.zeros((BLOCK_Q,), tl.float32)
        moment = tl.zeros((BLOCK_Q,), tl.float32)
        size = tl.zeros((BLOCK_Q,), tl.float32)
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
                        seen[None, :], pair_mask, batch, head, rows[:, None], keys[None, :], first_k // 64, len_q,
                        len_k, HAS_BAND, INTERVALS,
                    )  # fmt: skip
                    score = tl.where(pairs, score, -float("inf"))
                e = exp_distance(score, base[:, None], unit, FOLDED)
                v_one, v_two = load_rows(v_base, first_k, v_s, seen, BLOCK_K, DIM_V, WIDE_V, REST_V)
                grad_weight = products(g_one, g_two, v_one, v_two, REST_V, PRECISION)
                if seed_pointer is not None:
                    grad_weight *= dropout_tile(seed, rows, entry, first_k, threshold, keep_scale, BLOCK_K)
                grad_score = e * (grad_weight * norm[:, None] - centre[:, None])
                total += tl.sum(e, 1)
                moment += tl.sum(e * grad_weight, 1)
                if CHECKED:
                    size += tl.sum(tl.abs(grad_score), 1)
                if SOFTCAP:
                    grad_score *= slope
                one, two = accumulate(one, two, grad_score, k_one, k_two, REST, PRECISION)
        sees = total > 0.0
        exact_norm = tl.where(sees, 1.0 / (tl.where(sees, total, 1.0) + sink), 0.0)
        delta = exact_norm * moment
        exact_centre = exact_norm * delta - of_lse / tl.where(sees, total, 1.0)
        factor = tl.where(norm > 0.0, exact_norm / tl.where(norm > 0.0, norm, 1.0), 1.0)
        if CHECKED:
            gap = tl.max(tl.abs(exact_centre - factor * centre) * total, 0)
            is_off = gap > tolerance * tl.max(size * factor, 0)
            walks = tl.where(is_off, walks - 1, 0)
        else:
            walks = walks - 1
        norm, centre = exact_norm, exact_centre
        one *= (factor * scale)[:, None]
        if REST > 0:
            two *= (factor * scale)[:, None]
        else:
            two = one

    grad_base = base_of(grad_q, batch, grad_q_b, head, grad_q_h, start_q, grad_q_s)
    store_rows(grad_base, first_q, grad_q_s, within, one, two, BLOCK_Q, DIM, WIDE, REST)
    tl.store(norm_out + row, norm, mask=within)
    tl.store(centre_out + row, centre, mask=within)
    if sink_terms is not None:
        tl.store(sink_terms + row, tl.where(norm > 0.0, -sink * norm * delta, 0.0), mask=within)


@triton.jit(do_not_specialize=VARYING)
def attention_keys_kernel(
    q, q_b, q_h, q_s, k, k_b, k_h, k_s, v, v_b, v_h, v_s, lse, lse_b, lse_h, norm_out, centre_out,
    grad_out, grad_out_b, grad_out_h, grad_out_s,
    grad_k, grad_k_b, grad_k_h, grad_k_s, grad_v, grad_v_b, grad_v_h, grad_v_s,
    key_start, key_end, key_bits, words, key_flags, flags_b, flags_k, band_low, band_high,
    intervals, by_interval, intervals_b, intervals_h, block_ids, ids_b, ids_h, ids_q, bitmaps,
    dense, dense_b, dense_h, dense_q, dense_k,
    tiles, full_counts, partial_counts, order, plan_b, plan_h,
    bias, bias_b, bias_h, bias_q, bias_k, table, table_h, table_first, table_last, slopes, slopes_b,
    cu_q, cu_k, rows_q, rows_k, seed_pointer, threshold, keep_scale,
    batches, heads_q, group, len_q, len_k, section, scale, softcap,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LISTED: tl.constexpr,
    HAS_BAND: tl.constexpr, INTERVALS: tl.constexpr, TOP_LEFT: tl.constexpr, FOLDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v. One program per (batch entry, key head, key tile); its tiles are keys x queries."""
    key_mask = (key_start, key_end, key_bits, words, key_flags, flags_b, flags_k)
    plan = (tiles, full_counts, partial_counts, order, plan_b, plan_h)
    packed = (cu_q, cu_k, rows_q, rows_k)
    tiles_q, tiles_k = tl.cdiv(len_q, BLOCK_Q), tl.cdiv(len_k, BLOCK_K)
    heads_kv = heads_q // group
    entry_kv, rank = scheduled(batches * heads_kv, tiles_k, section)
    batch, head_kv = entry_kv // heads_kv, entry_kv % heads_kv
    tile_k = tile_of_rank(rank, plan, batch, head_kv * group, tiles_k, LISTED, False)
    start_q, start_k, len_q, len_k, ends = sequence_of(packed, batch, len_q, len_k)
    band_low, band_high = band_at(packed, band_low, band_high, ends)
    pair_mask = (band_low, band_high, intervals, by_interval, intervals_b, intervals_h, block_ids, ids_b, ids_h, ids_q,
                 bitmaps, dense, dense_b, dense_h, dense_q, dense_k)  # fmt: skip
    origin = ends
    if TOP_LEFT:
        origin = ends * 0
    bias_of = (bias, bias_b, bias_h, bias_q, bias_k, table, table_h, table_first, table_last, slopes, slopes_b,
               origin)  # fmt: skip
    first_k = tile_k * BLOCK_K
    keys = first_k + tl.arange(0, BLOCK_K)
    seen = visible_keys(key_mask, batch, keys, len_k)
    k_base = base_of(k, batch, k_b, head_kv, k_h, start_k, k_s, DIM)
    v_base = base_of(v, batch, v_b, head_kv, v_h, start_k, v_s, DIM_V)
    k_one, k_two = load_rows(k_base, first_k, k_s, seen, BLOCK_K, DIM, WIDE, REST)
    v_one, v_two = load_rows(v_base, first_k, v_s, seen, BLOCK_K, DIM_V, WIDE_V, REST_V)
    unit = unit_of(scale, FOLDED)
    if seed_pointer is not None:
        seed = tl.load(seed_pointer)

    dk_one = tl.zeros((BLOCK_K, WIDE), tl.float32)
    dk_two = dk_one
    if REST > 0:
        dk_two = tl.zeros((BLOCK_K, REST), tl.float32)
    dv_one = tl.zeros((BLOCK_K, WIDE_V), tl.float32)
    dv_two = dv_one
    if REST_V > 0:
        dv_two = tl.zeros((BLOCK_K, REST_V), tl.float32)
    for member in range(group):
        head = head_kv * group + member
        entry = batch * heads_q + head
        q_base = base_of(q, batch, q_b, head, q_h, start_q, q_s, DIM)
        g_base = base_of(grad_out, batch, grad_out_b, head, grad_out_h, start_q, grad_out_s, DIM_V)
        first_row = batch.to(tl.int64) * lse_b + head.to(tl.int64) * lse_h + start_q
        full, partial, low, full_low, full_high, position = plan_queries(
            key_mask, pair_mask, plan, batch, head, tile_k, tiles_k, tiles_q, len_q, len_k, LISTED, HAS_BAND,
            BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        for PARTIAL in tl.static_range(2):
            for i in range(partial if PARTIAL else full):
                first_q = tile_at(i, plan, low, full_low, full_high, position, tiles_q, PARTIAL, LISTED) * BLOCK_Q
                rows = first_q + tl.arange(0, BLOCK_Q)
                within = rows < len_q
                q_one, q_two = load_rows(q_base, first_q, q_s, within, BLOCK_Q, DIM, WIDE, REST)
                g_one, g_two = load_rows(g_base, first_q, grad_out_s, within, BLOCK_Q, DIM_V, WIDE_V, REST_V)
                row = first_row + rows
                log_sum = tl.load(lse + row, mask=within, other=-float("inf"))
                norm = tl.load(norm_out + row, mask=within, other=0.0)
                centre = tl.load(centre_out + row, mask=within, other=0.0)
                product = products(k_one, k_two, q_one, q_two, REST, PRECISION)
                score, slope = scores_of(
                    product, bias_of, batch, head, rows[None, :], keys[:, None], len_q, len_k, scale, softcap,
                    FOLDED, SOFTCAP,
                )  # fmt: skip
                if PARTIAL:
                    pairs = visible_pairs(
                        seen[:, None], pair_mask, batch, head, rows[None, :], keys[:, None], first_k // 64, len_q,
                        len_k, HAS_BAND, INTERVALS,
                    )  # fmt: skip
                    score = tl.where(pairs, score, -float("inf"))
                e = exp_distance(score, exponent_base(log_sum, unit, FOLDED)[None, :], unit, FOLDED)
                weight = e * norm[None, :]
                grad_weight = products(v_one, v_two, g_one, g_two, REST_V, PRECISION)
                if seed_pointer is not None:
                    keep = tl.trans(dropout_tile(seed, rows, entry, first_k, threshold, keep_scale, BLOCK_K))
                    weight *= keep
                    grad_weight *= keep
                dv_one, dv_two = accumulate(dv_one, dv_two, weight, g_one, g_two, REST_V, PRECISION)
                grad_score = e * (grad_weight * norm[None, :] - centre[None, :])
                if SOFTCAP:
                    grad_score *= slope
                dk_one, dk_two = accumulate(dk_one, dk_two, grad_score, q_one, q_two, REST, PRECISION)

    exists = keys < len_k
    dk_one *= scale
    if REST > 0:
        dk_two *= scale
    dk_base = base_of(grad_k, batch, grad_k_b, head_kv, grad_k_h, start_k, grad_k_s)
    dv_base = base_of(grad_v, batch, grad_v_b, head_kv, grad_v_h, start_k, grad_v_s)
    store_rows(dk_base, first_k, grad_k_s, exists, dk_one, dk_two, BLOCK_K, DIM, WIDE, REST)
    store_rows(dv_base, first_k, grad_v_s, exists, dv_one, dv_two, BLOCK_K, DIM_V, WIDE_V, REST_V)
