"""The lowered mask (fastattn.masks.lowered) on tiles of BLOCK_Q queries x BLOCK_K keys, and the tiles worth a visit.

A kernel holds a mask in two tuples, of which absent parts are None:
    key_mask   form A and a dense mask of keys alone: key_start, key_end (B,); key_bits (B, words), words; key_flags
               (bool) and its strides by batch and key
    pair_mask  forms B, C, D and the dense mask: band_low <= key - query <= band_high; intervals and strides by
               interval, batch, head; block_ids (query blocks, key blocks), -1 where empty, and strides by batch, head,
               query block; bitmaps; the dense mask and its four strides
Which keys a query tile visits follows from numbers alone for key_start, key_end and the band (`range_of_keys`,
`range_of_queries`). In a packed batch `sequence_of` says where the rows of an entry lie and how many there are, and
all else is counted within them: lengths, masks, tiles. The band then starts from each sequence's end (`band_at`).
Everything else is planned: classify_kernel and classify_dense_kernel find the state of every tile
(0 empty, 1 partial, 2 full), and compact_kernel lists, per row or column of tiles, the full ones from the front and the
partial ones from the back. Tiles of form D hold at most one block of 64 keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(1 << 30)

# Arguments that follow from lengths and batches, of any kernel here: Triton would compile anew where one is 1, or
# becomes or ceases to be a multiple of 16.
VARYING = (
    "len_q", "len_k", "batches", "section", "threshold", "band_low", "band_high", "words", "by_interval",
    "intervals_b", "intervals_h", "ids_b", "ids_h", "ids_q", "plan_b", "plan_h", "plan_heads", "rows", "columns",
    "by_entry", "by_row", "by_column", "rows_q", "rows_k", "lse_b", "lse_h", "table_first", "table_last", "slopes_b",
    "items", "bias_batches", "bias_len_q", "bias_len_k", "bias_tiles_q", "bias_tiles_k", "pairs",
)  # fmt: skip


@triton.jit
def sequence_of(packed, batch, len_q, len_k):
    """(first row of q, first of k, queries, keys, keys less queries) of a batch entry. packed: cu_seqlens of q and k,
    or None in a padded batch, and the rows that q and k have; len_q and len_k are the greatest lengths."""
    cu_q, cu_k, rows_q, rows_k = packed
    if cu_q is None:
        return len_q * 0, len_k * 0, len_q, len_k, len_k - len_q
    else:
        start_q, there_q, long_q = _span(cu_q, batch, len_q, rows_q)
        start_k, there_k, long_k = _span(cu_k, batch, len_k, rows_k)
        return start_q, start_k, there_q, there_k, long_k - long_q


@triton.jit
def _span(cu, batch, longest, rows):
    """Start of a sequence, its elements up to the longest and to the last row of the tensor, and its length."""
    start, end = tl.load(cu + batch), tl.load(cu + batch + 1)
    there = tl.maximum(tl.minimum(tl.minimum(end, rows) - start, longest), 0)
    return start, tl.where(start < 0, 0, there), end - start


@triton.jit
def band_at(packed, band_low, band_high, ends):
    """The band's limits in a batch entry whose keys less queries are `ends`."""
    if packed[0] is None:
        return band_low, band_high
    else:
        return tl.maximum(band_low + ends, -FAR), tl.minimum(band_high + ends, FAR)


@triton.jit
def visible_keys(key_mask, batch, keys, len_k):
    """Bool of keys' shape: the keys that form A and the length leave visible to some query; the others may hold NaN."""
    key_start, key_end, key_bits, words, key_flags, flags_b, flags_k = key_mask
    seen = keys < len_k
    if key_start is not None:
        seen = seen & (keys >= tl.load(key_start + batch))
    if key_end is not None:
        seen = seen & (keys < tl.load(key_end + batch))
    if key_bits is not None:
        word = tl.load(key_bits + batch.to(tl.int64) * words + keys // 64, mask=keys < len_k, other=0)
        seen = seen & (((word >> (keys % 64).to(tl.int64)) & 1) != 0)
    if key_flags is not None:
        at = key_flags + batch.to(tl.int64) * flags_b + keys.to(tl.int64) * flags_k
        seen = seen & (tl.load(at, mask=keys < len_k, other=0) != 0)
    return seen


@triton.jit
def visible_pairs(
    seen, pair_mask, batch, head, queries, keys, key_block, len_q, len_k,
    HAS_BAND: tl.constexpr, INTERVALS: tl.constexpr,
):  # fmt: skip
    """`seen` (visible_keys) and forms B, C, D and the dense mask. queries and keys int32, one of them a row and the
    other a column; key_block is what keys // 64 is for all keys of the tile, used by form D alone."""
    (band_low, band_high, intervals, by_interval, intervals_b, intervals_h, block_ids, ids_b, ids_h, ids_q, bitmaps,
     dense, dense_b, dense_h, dense_q, dense_k) = pair_mask  # fmt: skip
    if HAS_BAND:
        distance = keys - queries
        seen = seen & (distance >= band_low) & (distance <= band_high)
    if INTERVALS > 0:
        inside = queries < 0
        for r in tl.static_range(INTERVALS):
            start, end = interval_of(intervals, r, by_interval, intervals_b, intervals_h, batch, head, queries, len_q)
            inside = inside | ((keys >= start) & (keys < end))
        seen = seen & inside
    if block_ids is not None:
        at = block_ids + batch.to(tl.int64) * ids_b + head.to(tl.int64) * ids_h
        block = tl.load(at + (queries // 64).to(tl.int64) * ids_q + key_block, mask=queries < len_q, other=0)
        word = tl.load(bitmaps + tl.maximum(block, 0).to(tl.int64) * 64 + queries % 64)
        seen = seen & (block >= 0) & (((word >> (keys % 64).to(tl.int64)) & 1) != 0)
    if dense is not None:
        at = dense + batch.to(tl.int64) * dense_b + head.to(tl.int64) * dense_h
        at += queries.to(tl.int64) * dense_q + keys.to(tl.int64) * dense_k
        seen = seen & (tl.load(at, mask=(queries < len_q) & (keys < len_k), other=0) != 0)
    return seen


@triton.jit
def interval_of(intervals, r, by_interval, intervals_b, intervals_h, batch, head, queries, len_q):
    """Start and end of interval r of each query; those past the last query are empty."""
    at = intervals + batch.to(tl.int64) * intervals_b + head.to(tl.int64) * intervals_h
    at += tl.cast(by_interval, tl.int64) * r + queries.to(tl.int64) * 2
    return tl.load(at, mask=queries < len_q, other=0), tl.load(at + 1, mask=queries < len_q, other=0)


@triton.jit
def range_of_keys(
    key_mask, pair_mask, batch, first_query, len_q, len_k,
    HAS_BAND: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(low, full_low, full_high, high): a query tile visits key tiles low to high, of which those from full_low to
    full_high are full. By key_start, key_end, the band and the length alone."""
    key_start, key_end, key_bits, words, key_flags, flags_b, flags_k = key_mask
    begin, end = len_k * 0, len_k
    if key_start is not None:
        begin = tl.maximum(begin, tl.load(key_start + batch))
    if key_end is not None:
        end = tl.minimum(end, tl.load(key_end + batch))
    full_begin, full_end = begin, end
    if HAS_BAND:
        band_low, band_high = pair_mask[0], pair_mask[1]
        last_query = tl.minimum(first_query + BLOCK_Q, len_q) - 1
        full_begin = tl.maximum(begin, last_query + band_low)
        full_end = tl.minimum(end, first_query + band_high + 1)
        begin = tl.maximum(begin, first_query + band_low)
        end = tl.minimum(end, last_query + band_high + 1)
    end = tl.where(first_query < len_q, end, begin)  # a short sequence of a packed batch leaves query tiles empty
    return _in_tiles(begin, full_begin, full_end, end, BLOCK_K)


@triton.jit
def range_of_queries(
    key_mask, pair_mask, batch, first_key, len_q, len_k,
    HAS_BAND: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As range_of_keys: the query tiles that a key tile visits. Rows past the last query make no tile partial."""
    key_start, key_end, key_bits, words, key_flags, flags_b, flags_k = key_mask
    key_low, key_high = len_k * 0, len_k
    if key_start is not None:
        key_low = tl.maximum(key_low, tl.load(key_start + batch))
    if key_end is not None:
        key_high = tl.minimum(key_high, tl.load(key_end + batch))
    is_full = (first_key >= key_low) & (first_key + BLOCK_K <= key_high)
    begin, end = len_q * 0, len_q
    full_begin, full_end = begin, tl.cdiv(len_q, BLOCK_Q) * BLOCK_Q
    if HAS_BAND:
        band_low, band_high = pair_mask[0], pair_mask[1]
        last_key = tl.minimum(first_key + BLOCK_K, len_k) - 1
        full_begin = tl.maximum(begin, last_key - band_high)
        full_end = tl.minimum(full_end, first_key - band_low + 1)
        begin = tl.maximum(begin, first_key - band_high)
        end = tl.minimum(end, last_key - band_low + 1)
    end = tl.where((first_key < key_high) & (first_key + BLOCK_K > key_low), end, begin)
    return _in_tiles(begin, full_begin, tl.where(is_full, full_end, full_begin), end, BLOCK_Q)


@triton.jit
def _in_tiles(begin, full_begin, full_end, end, BLOCK: tl.constexpr):
    """From positions to tiles; all the partial tiles lie before full_low or from full_high on."""
    low = begin // BLOCK
    high = tl.where(end > begin, tl.cdiv(end, BLOCK), low)
    full_low = tl.maximum(low, tl.cdiv(full_begin, BLOCK))
    full_high = tl.minimum(high, tl.maximum(full_end, 0) // BLOCK)
    has_full = full_high > full_low
    return low, tl.where(has_full, full_low, high), tl.where(has_full, full_high, high), high


@triton.jit(do_not_specialize=VARYING)
def block_ids_kernel(table, row_ptr, col, id, rows, columns, CHUNK: tl.constexpr):
    """table (entries, rows, columns), -1 so far: the ids of form D's blocks. One program per block row."""
    program = tl.program_id(0)
    pointer = row_ptr + program + program // rows  # a row of row_ptr has one more number
    end = tl.load(pointer + 1)
    for start in range(tl.load(pointer), end, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        listed = entry < end
        column = tl.load(col + entry, mask=listed, other=0)
        tl.store(table + program.to(tl.int64) * columns + column, tl.load(id + entry, mask=listed), mask=listed)


@triton.jit(do_not_specialize=VARYING)
def classify_kernel(
    states, key_start, key_end, key_bits, words, key_flags, flags_b, flags_k, band_low, band_high,
    intervals, by_interval, intervals_b, intervals_h, block_ids, ids_b, ids_h, ids_q,
    plan_heads, cu_q, cu_k, rows_q, rows_k, len_q, len_k,
    HAS_BAND: tl.constexpr, INTERVALS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """states (entries, query tiles, key tiles) uint8 by all but the dense mask. Program (entry and query tile, chunk of
    CHUNK key tiles); an entry is a batch entry and head of the mask, whose own sizes may be 1."""
    tiles_q, tiles_k = tl.cdiv(len_q, BLOCK_Q), tl.cdiv(len_k, BLOCK_K)
    entry, tile_q = tl.program_id(0) // tiles_q, tl.program_id(0) % tiles_q
    batch, head = entry // plan_heads, entry % plan_heads
    packed = (cu_q, cu_k, rows_q, rows_k)
    start_q, start_k, len_q, len_k, ends = sequence_of(packed, batch, len_q, len_k)
    band_low, band_high = band_at(packed, band_low, band_high, ends)
    first, last = tile_q * BLOCK_Q, tl.minimum(tile_q * BLOCK_Q + BLOCK_Q, len_q) - 1
    tile_k = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    starts = tile_k * BLOCK_K
    stops = starts + BLOCK_K

    keys = starts[:, None] + tl.arange(0, BLOCK_K)[None, :]
    key_mask = (key_start, key_end, key_bits, words, key_flags, flags_b, flags_k)
    seen = visible_keys(key_mask, batch, keys, len_k).to(tl.int32)
    some, every = (tl.max(seen, 1) > 0) & (first < len_q), tl.min(seen, 1) > 0
    if HAS_BAND:
        some = some & (stops > first + band_low) & (starts <= last + band_high)
        every = every & (starts >= last + band_low) & (stops <= first + band_high + 1)
    if INTERVALS > 0:
        queries = first + tl.arange(0, BLOCK_Q)
        within = queries < len_q
        touched, covered = starts < 0, starts < 0
        for r in tl.static_range(INTERVALS):
            start, end = interval_of(intervals, r, by_interval, intervals_b, intervals_h, batch, head, queries, len_q)
            holds_any = within & (start < end)
            hull_start = tl.min(tl.where(holds_any, start, FAR), 0)
            hull_end = tl.max(tl.where(holds_any, end, -FAR), 0)
            core_start = tl.max(tl.where(within, start, -FAR), 0)
            core_end = tl.min(tl.where(within, end, FAR), 0)
            touched = touched | ((stops > hull_start) & (starts < hull_end))
            covered = covered | ((starts >= core_start) & (stops <= core_end))
        some, every = some & touched, every & covered
    if block_ids is not None:
        BLOCKS: tl.constexpr = (BLOCK_Q + 63) // 64
        rows = first // 64 + tl.arange(0, BLOCKS)
        at = block_ids + batch.to(tl.int64) * ids_b + head.to(tl.int64) * ids_h
        at = at + rows[None, :].to(tl.int64) * ids_q + (starts // 64)[:, None]
        exists = (rows[None, :] <= last // 64) & (tile_k < tiles_k)[:, None]
        block = tl.load(at, mask=exists, other=0)
        some = some & (tl.max(((block >= 0) & exists).to(tl.int32), 1) > 0)
        every = every & (tl.max((block != 0).to(tl.int32), 1) == 0)
    state = some.to(tl.int32) + (some & every).to(tl.int32)
    tl.store(states + tl.program_id(0).to(tl.int64) * tiles_k + tile_k, state.to(tl.uint8), mask=tile_k < tiles_k)


@triton.jit(do_not_specialize=VARYING)
def classify_dense_kernel(
    states, dense, dense_b, dense_h, dense_q, dense_k, plan_heads, cu_q, cu_k, rows_q, rows_k, len_q, len_k,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Lowers states to what the dense mask leaves of them. Program (entry and query tile, key tile)."""
    tiles_q, tiles_k = tl.cdiv(len_q, BLOCK_Q), tl.cdiv(len_k, BLOCK_K)
    entry, tile_q = tl.program_id(0) // tiles_q, tl.program_id(0) % tiles_q
    packed = (cu_q, cu_k, rows_q, rows_k)
    start_q, start_k, len_q, len_k, ends = sequence_of(packed, entry // plan_heads, len_q, len_k)
    at_state = states + tl.program_id(0).to(tl.int64) * tiles_k + tl.program_id(1)
    state = tl.load(at_state).to(tl.int32)
    queries = (tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)[:, None]
    keys = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
    at = dense + (entry // plan_heads).to(tl.int64) * dense_b + (entry % plan_heads).to(tl.int64) * dense_h
    within = (queries < len_q) & (keys < len_k) & (state > 0)
    seen = tl.load(at + queries * dense_q + keys * dense_k, mask=within, other=0) != 0
    some = tl.max(tl.max(seen.to(tl.int32), 1), 0)
    hidden = tl.max(tl.max((within & (seen == 0)).to(tl.int32), 1), 0)
    state = tl.where(some == 0, 0, tl.where(hidden > 0, tl.minimum(state, 1), state))
    tl.store(at_state, state.to(tl.uint8))


@triton.jit(do_not_specialize=VARYING)
def compact_kernel(
    states, tiles, full_counts, partial_counts, rows, columns, by_entry, by_row, by_column, CHUNK: tl.constexpr
):  # fmt: skip
    """tiles (entries, rows, columns) int32: of each row the full columns from the front, the partial ones from the
    back, both ascending inwards; and how many of each. Transposed strides of states list by columns."""
    entry, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    source = states + entry.to(tl.int64) * by_entry + row.to(tl.int64) * by_row
    target = tiles + tl.program_id(0).to(tl.int64) * columns
    full, partial = columns * 0, columns * 0
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        state = tl.load(source + column.to(tl.int64) * by_column, mask=column < columns, other=0).to(tl.int32)
        is_full, is_partial = (state == 2).to(tl.int32), (state == 1).to(tl.int32)
        tl.store(target + full + tl.cumsum(is_full, 0) - 1, column, mask=is_full > 0)
        tl.store(target + columns - partial - tl.cumsum(is_partial, 0), column, mask=is_partial > 0)
        full += tl.sum(is_full, 0)
        partial += tl.sum(is_partial, 0)
    tl.store(full_counts + tl.program_id(0), full)
    tl.store(partial_counts + tl.program_id(0), partial)
