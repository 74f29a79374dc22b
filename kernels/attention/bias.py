"""Gradients of biases: of a dense one, of a table by distance, of ALiBi's slopes. No atomics: the same bits every run.

    grad_dense = ds          grad_table[clamp(d - first)] = sum of ds          grad_slopes = sum of -|d| ds
with ds as in backward.py, before the softcap, and d the distance from query to key; each summed over what shares it.

Contract
    Tensors as in backward.py, whose queries kernel has run: lse, norm and centre, float32 (B, Hq, Sq). Partial sums are
    float32 and are added by the host.

Algorithm
    dense: a program keeps a tile of the bias and walks the batch entries, heads and tiles that share it, two products
    each; where these are many and tiles few, several programs write parts. distance: a program takes query tiles of the
    heads that share a row of the table, and walks their key tiles from left to right. A tile of ds, its rows rotated
    until diagonals are columns, gives two pieces of sums by distance: one that the tile on its left began, and one that
    the next tile ends. So every distance is added once per query tile to the program's own row of the table; those
    beyond its ends are kept in registers.

Measured
    correct on an H100 in random cases, not timed there by itself; compiled for sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.attention.mask import (
    VARYING,
    band_at,
    range_of_keys,
    sequence_of,
    visible_keys,
    visible_pairs,
)
from fastattn.kernels.attention.tile import (
    base_of,
    exp_distance,
    exponent_base,
    load_rows,
    products,
    scores_of,
    unit_of,
)
from fastattn.kernels.philox import dropout_tile


@triton.jit
def _score_gradient(
    query_tile, keys_at, key_mask, pair_mask, bias_of, dropout, batch, head, entry, rows, tile_k, len_q, len_k,
    scale, softcap,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_BAND: tl.constexpr, INTERVALS: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ds of a tile, float32 (queries, keys). query_tile: pieces of q and grad_out; base, norm and centre of rows."""
    q_one, q_two, g_one, g_two, base, norm, centre = query_tile
    k_base, k_s, v_base, v_s = keys_at
    seed_pointer, threshold, keep_scale = dropout
    first_k = tile_k * BLOCK_K
    keys = first_k + tl.arange(0, BLOCK_K)
    seen = visible_keys(key_mask, batch, keys, len_k)
    k_one, k_two = load_rows(k_base, first_k, k_s, seen, BLOCK_K, DIM, WIDE, REST)
    v_one, v_two = load_rows(v_base, first_k, v_s, seen, BLOCK_K, DIM_V, WIDE_V, REST_V)
    product = products(q_one, q_two, k_one, k_two, REST, PRECISION)
    score, slope = scores_of(
        product, bias_of, batch, head, rows[:, None], keys[None, :], len_q, len_k, scale, softcap, False, SOFTCAP
    )  # fmt: skip
    visible = visible_pairs(
        seen[None, :], pair_mask, batch, head, rows[:, None], keys[None, :], first_k // 64, len_q, len_k,
        HAS_BAND, INTERVALS,
    )  # fmt: skip
    e = exp_distance(tl.where(visible, score, -float("inf")), base[:, None], unit_of(scale, False), False)
    grad_weight = products(g_one, g_two, v_one, v_two, REST_V, PRECISION)
    if seed_pointer is not None:
        grad_weight *= dropout_tile(tl.load(seed_pointer), rows, entry, first_k, threshold, keep_scale, BLOCK_K)
    return e * (grad_weight * norm[:, None] - centre[:, None])


@triton.jit(do_not_specialize=VARYING)
def attention_bias_kernel(
    q, q_b, q_h, q_s, k, k_b, k_h, k_s, v, v_b, v_h, v_s, lse, lse_b, lse_h, norm_out, centre_out,
    grad_out, grad_out_b, grad_out_h, grad_out_s, grad_bias, states,
    key_start, key_end, key_bits, words, key_flags, flags_b, flags_k, band_low, band_high,
    intervals, by_interval, intervals_b, intervals_h, block_ids, ids_b, ids_h, ids_q, bitmaps,
    dense, dense_b, dense_h, dense_q, dense_k, plan_b, plan_h,
    bias, bias_b, bias_h, bias_q, bias_k, table, table_h, table_first, table_last, slopes, slopes_b,
    cu_q, cu_k, rows_q, rows_k, seed_pointer, threshold, keep_scale,
    heads_q, group, len_q, len_k, scale, softcap,
    bias_batches, bias_heads, bias_len_q, bias_len_k, bias_tiles_q, bias_tiles_k, pairs, shared_heads,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LISTED: tl.constexpr,
    HAS_BAND: tl.constexpr, INTERVALS: tl.constexpr, TOP_LEFT: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, SUMS_Q: tl.constexpr, SUMS_K: tl.constexpr,
):  # fmt: skip
    """grad_bias (parts, *bias.shape) float32. Program (bias entry and tile, part) adds up pairs of batch entry and head
    part, part + parts, ... of the `pairs` that share the bias entry, and all tiles along dimensions of size 1 (SUMS_Q,
    SUMS_K)."""
    key_mask = (key_start, key_end, key_bits, words, key_flags, flags_b, flags_k)
    packed = (cu_q, cu_k, rows_q, rows_k)
    dropout = (seed_pointer, threshold, keep_scale)
    tiles_q, tiles_k = tl.cdiv(len_q, BLOCK_Q), tl.cdiv(len_k, BLOCK_K)
    bias_tiles = bias_tiles_q * bias_tiles_k
    bias_entry, bias_tile = tl.program_id(0) // bias_tiles, tl.program_id(0) % bias_tiles
    own_q, own_k = bias_tile // bias_tiles_k, bias_tile % bias_tiles_k
    begin_q, end_q = own_q, own_q + 1
    if SUMS_Q:
        end_q = tiles_q
    begin_k, end_k = own_k, own_k + 1
    if SUMS_K:
        end_k = tiles_k

    total = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for pair in range(tl.program_id(1), pairs, tl.num_programs(1)):
        batch = pair // shared_heads + bias_entry // bias_heads
        head = pair % shared_heads + bias_entry % bias_heads
        entry = batch * heads_q + head
        start_q, start_k, there_q, there_k, ends = sequence_of(packed, batch, len_q, len_k)
        low_limit, high_limit = band_at(packed, band_low, band_high, ends)
        pair_mask = (low_limit, high_limit, intervals, by_interval, intervals_b, intervals_h, block_ids, ids_b, ids_h,
                     ids_q, bitmaps, dense, dense_b, dense_h, dense_q, dense_k)  # fmt: skip
        origin = ends
        if TOP_LEFT:
            origin = ends * 0
        bias_of = (bias, bias_b, bias_h, bias_q, bias_k, table, table_h, table_first, table_last, slopes, slopes_b,
                   origin)  # fmt: skip
        q_base = base_of(q, batch, q_b, head, q_h, start_q, q_s, DIM)
        k_base = base_of(k, batch, k_b, head // group, k_h, start_k, k_s, DIM)
        v_base = base_of(v, batch, v_b, head // group, v_h, start_k, v_s, DIM_V)
        keys_at = (k_base, k_s, v_base, v_s)
        g_base = base_of(grad_out, batch, grad_out_b, head, grad_out_h, start_q, grad_out_s, DIM_V)
        first_row = batch.to(tl.int64) * lse_b + head.to(tl.int64) * lse_h + start_q
        for tile_q in range(begin_q, end_q):
            first_q = tile_q * BLOCK_Q
            rows = first_q + tl.arange(0, BLOCK_Q)
            within = rows < there_q
            row = first_row + rows
            base = exponent_base(tl.load(lse + row, mask=within, other=-float("inf")), 1.0, False)
            norm = tl.load(norm_out + row, mask=within, other=0.0)
            centre = tl.load(centre_out + row, mask=within, other=0.0)
            q_one, q_two = load_rows(q_base, first_q, q_s, within, BLOCK_Q, DIM, WIDE, REST)
            g_one, g_two = load_rows(g_base, first_q, grad_out_s, within, BLOCK_Q, DIM_V, WIDE_V, REST_V)
            query_tile = (q_one, q_two, g_one, g_two, base, norm, centre)
            low, full_low, full_high, high = range_of_keys(
                key_mask, pair_mask, batch, first_q, there_q, there_k, HAS_BAND, BLOCK_Q, BLOCK_K
            )  # fmt: skip
            for tile_k in range(tl.maximum(begin_k, low), tl.minimum(end_k, high)):
                visited = tile_k >= low
                if LISTED:
                    at = ((batch * plan_b + head * plan_h) * tiles_q + tile_q).to(tl.int64) * tiles_k + tile_k
                    visited = tl.load(states + at) > 0
                if visited:
                    total += _score_gradient(
                        query_tile, keys_at, key_mask, pair_mask, bias_of, dropout, batch, head, entry, rows,
                        tile_k, there_q, there_k, scale, softcap, DIM, WIDE, REST, DIM_V, WIDE_V, REST_V,
                        BLOCK_K, HAS_BAND, INTERVALS, SOFTCAP, PRECISION,
                    )  # fmt: skip

    target = (
        grad_bias + (tl.program_id(1).to(tl.int64) * bias_batches * bias_heads + bias_entry) * bias_len_q * bias_len_k
    )
    rows = own_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    keys = own_k * BLOCK_K + tl.arange(0, BLOCK_K)
    if SUMS_Q:
        if SUMS_K:
            tl.store(target, tl.sum(tl.sum(total, 1), 0))
        else:
            tl.store(target + keys, tl.sum(total, 0), mask=keys < len_k)
    else:
        if SUMS_K:
            tl.store(target + rows, tl.sum(total, 1), mask=rows < len_q)
        else:
            at = target + rows.to(tl.int64)[:, None] * bias_len_k + keys[None, :]
            tl.store(at, total, mask=(rows < len_q)[:, None] & (keys < len_k)[None, :])


@triton.jit(do_not_specialize=VARYING)
def attention_distance_kernel(
    q, q_b, q_h, q_s, k, k_b, k_h, k_s, v, v_b, v_h, v_s, lse, lse_b, lse_h, norm_out, centre_out,
    grad_out, grad_out_b, grad_out_h, grad_out_s, table_sums, slope_sums, states,
    key_start, key_end, key_bits, words, key_flags, flags_b, flags_k, band_low, band_high,
    intervals, by_interval, intervals_b, intervals_h, block_ids, ids_b, ids_h, ids_q, bitmaps,
    dense, dense_b, dense_h, dense_q, dense_k, plan_b, plan_h,
    bias, bias_b, bias_h, bias_q, bias_k, table, table_h, table_first, table_last, slopes, slopes_b,
    cu_q, cu_k, rows_q, rows_k, seed_pointer, threshold, keep_scale,
    heads_q, group, len_q, len_k, scale, softcap,
    items, shared_heads,
    DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    DIM_V: tl.constexpr, WIDE_V: tl.constexpr, REST_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, LISTED: tl.constexpr,
    HAS_BAND: tl.constexpr, INTERVALS: tl.constexpr, TOP_LEFT: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, SUMS_TABLE: tl.constexpr, SUMS_SLOPES: tl.constexpr,
):  # fmt: skip
    """table_sums (parts, table rows, columns) float32, zero so far, and slope_sums (B, Hq, query tiles). Program (table
    row, part) takes items part, part + parts, ... of the `items`, each a batch entry, one of the heads that share the
    row, and a query tile. BLOCK_Q <= BLOCK_K."""
    key_mask = (key_start, key_end, key_bits, words, key_flags, flags_b, flags_k)
    packed = (cu_q, cu_k, rows_q, rows_k)
    dropout = (seed_pointer, threshold, keep_scale)
    tiles_q, tiles_k = tl.cdiv(len_q, BLOCK_Q), tl.cdiv(len_k, BLOCK_K)
    steps = tl.arange(0, BLOCK_K)
    turned = tl.arange(0, BLOCK_Q)[:, None] + steps[None, :]  # of a rotated row: the column an element came from
    own_row = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (table_last + 1)
    below = tl.zeros((BLOCK_K,), tl.float32)
    above = tl.zeros((BLOCK_K,), tl.float32)
    for item in range(tl.program_id(1), items, tl.num_programs(1)):
        tile_q, pair = item % tiles_q, item // tiles_q
        batch = pair // shared_heads
        head = pair % shared_heads + tl.program_id(0)
        entry = batch * heads_q + head
        start_q, start_k, there_q, there_k, ends = sequence_of(packed, batch, len_q, len_k)
        low_limit, high_limit = band_at(packed, band_low, band_high, ends)
        pair_mask = (low_limit, high_limit, intervals, by_interval, intervals_b, intervals_h, block_ids, ids_b, ids_h,
                     ids_q, bitmaps, dense, dense_b, dense_h, dense_q, dense_k)  # fmt: skip
        origin = ends
        if TOP_LEFT:
            origin = ends * 0
        bias_of = (bias, bias_b, bias_h, bias_q, bias_k, table, table_h, table_first, table_last, slopes, slopes_b,
                   origin)  # fmt: skip
        q_base = base_of(q, batch, q_b, head, q_h, start_q, q_s, DIM)
        k_base = base_of(k, batch, k_b, head // group, k_h, start_k, k_s, DIM)
        v_base = base_of(v, batch, v_b, head // group, v_h, start_k, v_s, DIM_V)
        keys_at = (k_base, k_s, v_base, v_s)
        g_base = base_of(grad_out, batch, grad_out_b, head, grad_out_h, start_q, grad_out_s, DIM_V)
        first_row = batch.to(tl.int64) * lse_b + head.to(tl.int64) * lse_h + start_q
        first_q = tile_q * BLOCK_Q
        rows = first_q + tl.arange(0, BLOCK_Q)
        within = rows < there_q
        row = first_row + rows
        base = exponent_base(tl.load(lse + row, mask=within, other=-float("inf")), 1.0, False)
        norm = tl.load(norm_out + row, mask=within, other=0.0)
        centre = tl.load(centre_out + row, mask=within, other=0.0)
        q_one, q_two = load_rows(q_base, first_q, q_s, within, BLOCK_Q, DIM, WIDE, REST)
        g_one, g_two = load_rows(g_base, first_q, grad_out_s, within, BLOCK_Q, DIM_V, WIDE_V, REST_V)
        query_tile = (q_one, q_two, g_one, g_two, base, norm, centre)
        low, full_low, full_high, high = range_of_keys(
            key_mask, pair_mask, batch, first_q, there_q, there_k, HAS_BAND, BLOCK_Q, BLOCK_K
        )  # fmt: skip
        sloped = tl.zeros((BLOCK_Q,), tl.float32)
        carried = tl.zeros((BLOCK_K,), tl.float32)
        tl.debug_barrier()  # the columns that other threads of this program wrote for the last item are read below
        for tile_k in range(low, high + 1):  # one more, for what the last one carried
            visited = tile_k < high
            if LISTED:
                at = ((batch * plan_b + head * plan_h) * tiles_q + tile_q).to(tl.int64) * tiles_k + tile_k
                visited = tl.load(states + at, mask=visited, other=0) > 0
            grad = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
            if visited:
                grad = _score_gradient(
                    query_tile, keys_at, key_mask, pair_mask, bias_of, dropout, batch, head, entry, rows,
                    tile_k, there_q, there_k, scale, softcap, DIM, WIDE, REST, DIM_V, WIDE_V, REST_V,
                    BLOCK_K, HAS_BAND, INTERVALS, SOFTCAP, PRECISION,
                )  # fmt: skip
            distance = tile_k * BLOCK_K - first_q - origin  # of the tile's first query and key
            if SUMS_SLOPES:
                away = tl.abs(distance + steps[None, :] - tl.arange(0, BLOCK_Q)[:, None])
                sloped -= tl.sum(grad * away.to(tl.float32), 1)
            if SUMS_TABLE:
                rotated = tl.gather(grad, turned % BLOCK_K, 1)
                sums = carried + tl.sum(tl.where(turned >= BLOCK_K, rotated, 0.0), 0)
                carried = tl.sum(tl.where(turned < BLOCK_K, rotated, 0.0), 0)
                column = distance - BLOCK_K + steps - table_first
                below += tl.where(column <= 0, sums, 0.0)
                above += tl.where((column > 0) & (column >= table_last), sums, 0.0)
                between = (column > 0) & (column < table_last)
                at = table_sums + own_row + column
                tl.store(at, tl.load(at, mask=between, other=0.0) + sums, mask=between)
        if SUMS_SLOPES:
            tl.store(slope_sums + entry.to(tl.int64) * tiles_q + tile_q, tl.sum(sloped, 0))
    if SUMS_TABLE:
        if table_last == 0:  # one column for all
            below += above
        tl.store(table_sums + own_row, tl.sum(below, 0))
        if table_last > 0:
            tl.store(table_sums + own_row + table_last, tl.sum(above, 0))
