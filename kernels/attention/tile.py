"""What forward and backward share: rows of a tile, scores, the order of tiles, and which of them to visit.

A head dim that is no power of two is held as two pieces where that is less than the next power (kernels/tiles.py): 80
as 64 + 16. A second piece of 0 columns stands for the first one and is never read.

Scores are in natural units, where a finite bias stays finite, and exp2 takes their distance to the row's base times
log2 e. With FOLDED (no bias, no softcap, a positive scale) they are products not yet scaled, bases hold scale log2 e
already, and both are one multiply-add: p = exp2(product * unit - base).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.attention.mask import range_of_keys, range_of_queries
from fastattn.kernels.numerics import LOG2E, LOWEST, dot, dot_add, narrow, tanh
from fastattn.kernels.tiles import NARROW_HEAD

NARROW = tl.constexpr(NARROW_HEAD)


@triton.jit
def scheduled(entries, tiles, section):
    """(entry, rank) of this program: for `section` entries at a time, whose keys and values share the L2 cache, first
    all tiles of rank 0, then of rank 1, and so on; the longest have the lowest rank."""
    program = tl.program_id(0)
    first = program // (section * tiles) * section
    width = tl.minimum(section, entries - first)
    rest = program - first * tiles
    return first + rest % width, rest // width


@triton.jit
def base_of(tensor, batch, by_batch, head, by_head, start, by_row, DIM: tl.constexpr = 16):
    """Where the rows of a batch entry and head begin; `start` is that of its sequence in a packed batch. DIM: of rows
    that begin at multiples of 16 bytes."""
    by_batch = in_vectors(by_batch, tensor.dtype.element_ty, DIM)
    by_head = in_vectors(by_head, tensor.dtype.element_ty, DIM)
    by_row = in_vectors(by_row, tensor.dtype.element_ty, DIM)
    return tensor + batch.to(tl.int64) * by_batch + head.to(tl.int64) * by_head + start.to(tl.int64) * by_row


@triton.jit
def in_vectors(stride, DTYPE: tl.constexpr, DIM: tl.constexpr):
    """A stride between rows that begin at multiples of 16 bytes, so that the compiler knows it: all by itself it looks
    for multiples of 16 elements, which head dims such as 40 and 72 have not, and would load one element at a time."""
    if DIM % 16 != 0:
        VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        stride = stride // VECTOR * VECTOR
    return stride


@triton.jit
def load_piece(
    base, first_row, stride, within, ROWS: tl.constexpr, DIM: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr
):
    """(ROWS, WIDTH) from row first_row and column FROM on; 0 past column DIM and where `within` (ROWS,) is False. Rows
    begin at multiples of 16 bytes."""
    rows, columns = tl.arange(0, ROWS), FROM + tl.arange(0, WIDTH)
    stride = in_vectors(stride, base.dtype.element_ty, DIM)
    at = base + first_row.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if FROM + WIDTH > DIM:
        if within is None:
            return tl.load(at, mask=(columns < DIM)[None, :], other=0.0)
        else:
            return tl.load(at, mask=(columns < DIM)[None, :] & within[:, None], other=0.0)
    else:
        if within is None:
            return tl.load(at)
        else:
            return tl.load(at, mask=within[:, None], other=0.0)


@triton.jit
def load_rows(
    base, first_row, stride, within, ROWS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr
):  # fmt: skip
    """Both pieces of ROWS rows."""
    one = load_piece(base, first_row, stride, within, ROWS, DIM, 0, WIDE)
    two = one
    if REST > 0:
        two = load_piece(base, first_row, stride, within, ROWS, DIM, WIDE, REST)
    return one, two


@triton.jit
def store_piece(
    base, first_row, stride, within, value,
    ROWS: tl.constexpr, DIM: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.arange(0, ROWS), FROM + tl.arange(0, WIDTH)
    at = base + first_row.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    mask = within[:, None] & (columns < DIM)[None, :]
    tl.store(at, narrow(value, base.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(
    base, first_row, stride, within, one, two,
    ROWS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """float32 pieces, rounded once."""
    store_piece(base, first_row, stride, within, one, ROWS, DIM, 0, WIDE)
    if REST > 0:
        store_piece(base, first_row, stride, within, two, ROWS, DIM, WIDE, REST)


@triton.jit
def products(a_one, a_two, b_one, b_two, REST: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over both pieces."""
    total = dot(a_one, tl.trans(b_one), PRECISION)
    if REST > 0:
        total = dot_add(a_two, tl.trans(b_two), total, PRECISION)
    return total


@triton.jit
def accumulate(one, two, a, b_one, b_two, REST: tl.constexpr, PRECISION: tl.constexpr):
    """(one, two) + a b, a rounded to the dtype of b; but in float32 of a narrow head, where little averages rounding
    errors and the products are few."""
    if b_one.dtype != tl.float32 and b_one.shape[1] <= NARROW:
        one = dot_add(a, b_one.to(tl.float32), one, "tf32x3")  # there is no second piece beside it
    else:
        left = narrow(a, b_one.dtype)
        one = dot_add(left, b_one, one, PRECISION)
        if REST > 0:
            two = dot_add(left, b_two, two, PRECISION)
    return one, two


@triton.jit
def scores_of(
    product, bias_of, batch, head, queries, keys, len_q, len_k, scale, softcap,
    FOLDED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Scores before the mask, and the softcap's derivative. queries and keys: one a row, the other a column.

    bias_of: the dense bias and its strides; the table of a bias by distance, its stride by head, the distance of its
    first column, the number of its last one; ALiBi's slopes and their stride by batch; and the position of query 0."""
    (bias, bias_b, bias_h, bias_q, bias_k, table, table_h, table_first, table_last, slopes, slopes_b,
     origin) = bias_of  # fmt: skip
    score, slope = product, product
    if not FOLDED:
        score = product * scale
    if SOFTCAP:
        bent = tanh(score / softcap)
        score = bent * softcap
        slope = 1.0 - bent * bent
    if bias is not None:
        at = bias + batch.to(tl.int64) * bias_b + head.to(tl.int64) * bias_h
        at += queries.to(tl.int64) * bias_q + keys.to(tl.int64) * bias_k
        added = tl.load(at, mask=(queries < len_q) & (keys < len_k), other=0.0).to(tl.float32)
        score = tl.where(added == -float("inf"), added, tl.maximum(score + added, LOWEST))  # only -inf hides
    if table is not None:
        column = tl.minimum(tl.maximum(keys - queries - (origin + table_first), 0), table_last)
        added = tl.load(table + head * table_h + column)
        hides = (added == -float("inf")) | (score == -float("inf"))
        score = tl.where(hides, -float("inf"), tl.maximum(score + added, LOWEST))
    if slopes is not None:
        away = tl.abs(keys - queries - origin).to(tl.float32)
        sloped = tl.maximum(score - tl.load(slopes + batch * slopes_b + head) * away, LOWEST)
        score = tl.where(score == -float("inf"), score, sloped)
    return score, slope


@triton.jit
def unit_of(scale, FOLDED: tl.constexpr):
    """What makes log2 units of scores."""
    unit = scale * LOG2E
    if not FOLDED:
        unit = scale * 0.0 + LOG2E
    return unit


@triton.jit
def exp_distance(score, base, unit, FOLDED: tl.constexpr):
    """e^(score - base); with FOLDED the base is in log2 units."""
    if FOLDED:
        return tl.exp2(score * unit - base)
    else:
        return tl.exp2((score - base) * unit)


@triton.jit
def exponent_base(lse, unit, FOLDED: tl.constexpr):
    """What exp_distance subtracts in backward; a row that sees nothing, or that is none, gets +inf, which makes e 0."""
    base = tl.where(lse == -float("inf"), float("inf"), lse)
    if FOLDED:
        base *= LOG2E
    return base


@triton.jit
def plan_keys(
    key_mask, pair_mask, plan, batch, head, tile_q, tiles_q, tiles_k, len_q, len_k,
    LISTED: tl.constexpr, HAS_BAND: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(full, partial, low, full_low, full_high, position in tiles): how many key tiles of each kind a query tile
    visits, and what tile_at needs to name them. tiles_q and tiles_k: of the greatest lengths."""
    tiles, full_counts, partial_counts, order, plan_b, plan_h = plan
    if LISTED:
        row = (batch * plan_b + head * plan_h) * tiles_q + tile_q
        full, partial = tl.load(full_counts + row), tl.load(partial_counts + row)
        return full, partial, full, full, full, row.to(tl.int64) * tiles_k
    else:
        low, full_low, full_high, high = range_of_keys(
            key_mask, pair_mask, batch, tile_q * BLOCK_Q, len_q, len_k, HAS_BAND, BLOCK_Q, BLOCK_K
        )  # fmt: skip
        return full_high - full_low, full_low - low + high - full_high, low, full_low, full_high, low.to(tl.int64) * 0


@triton.jit
def plan_queries(
    key_mask, pair_mask, plan, batch, head, tile_k, tiles_k, tiles_q, len_q, len_k,
    LISTED: tl.constexpr, HAS_BAND: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As plan_keys: the query tiles that a key tile visits."""
    tiles, full_counts, partial_counts, order, plan_b, plan_h = plan
    if LISTED:
        row = (batch * plan_b + head * plan_h) * tiles_k + tile_k
        full, partial = tl.load(full_counts + row), tl.load(partial_counts + row)
        return full, partial, full, full, full, row.to(tl.int64) * tiles_q
    else:
        low, full_low, full_high, high = range_of_queries(
            key_mask, pair_mask, batch, tile_k * BLOCK_K, len_q, len_k, HAS_BAND, BLOCK_Q, BLOCK_K
        )  # fmt: skip
        return full_high - full_low, full_low - low + high - full_high, low, full_low, full_high, low.to(tl.int64) * 0


@triton.jit
def tile_at(i, plan, low, full_low, full_high, position, columns, PARTIAL: tl.constexpr, LISTED: tl.constexpr):
    """The i-th full or partial tile of a plan; a row of its list begins at `position` and has room for `columns`."""
    if LISTED:
        if PARTIAL:
            return tl.load(plan[0] + position + columns - 1 - i)
        else:
            return tl.load(plan[0] + position + i)
    else:
        if PARTIAL:
            return tl.where(low + i < full_low, low + i, full_high + i - (full_low - low))
        else:
            return full_low + i


@triton.jit
def tile_of_rank(rank, plan, batch, head, tiles, LISTED: tl.constexpr, LAST_FIRST: tl.constexpr):
    """The tile that a program works on: by the plan's order, else first or last ones first."""
    order, plan_b, plan_h = plan[3], plan[4], plan[5]
    if LISTED:
        return tl.load(order + (batch * plan_b + head * plan_h).to(tl.int64) * tiles + rank)
    else:
        if LAST_FIRST:
            return tiles - 1 - rank
        else:
            return rank
