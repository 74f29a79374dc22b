"""Masks tile by tile: which base blocks of 64 queries x 64 keys are empty, partly visible or full.

What a mask knows of whole tiles (its TileRule: the bounds of its intervals, joined by and, or, not) settles most of
them; only the rest is evaluated element by element, a few hundred tiles at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastattn.masks.intervals import BLOCK, IntervalSet, intervals_tensor, row_bounds
from fastattn.masks.lowered import Index, Size

if TYPE_CHECKING:
    from fastattn.masks.base import Mask

EMPTY, UNKNOWN, FULL = 0, 1, 2
"""What is known of a tile. In a finished grid UNKNOWN stands for partly visible."""

TileRule = Callable[[int, Tensor], Tensor]
"""rule(batch, rows): int8 (len(rows), ceil(Skv / 64)), what is known of the tiles in these rows of tiles."""

_STATES_AT_ONCE = 1 << 16
_TILES_AT_ONCE = 512


class Strip(NamedTuple):
    """The tiles with something visible in some rows of tiles of one batch entry and head.

    row, col  int64 (n,), sorted by row, then col.
    full      bool (n,).
    words     int64 (m, 64): of the m tiles that are not full, in order, bit c of word r for query r and key c.
    pairs     int64 (n,): visible pairs.
    """

    batch: int
    head: int
    row: Tensor
    col: Tensor
    full: Tensor
    words: Tensor
    pairs: Tensor


def tile_count(length: int) -> int:
    """How many tiles of 64 cover a length."""
    return (length + BLOCK - 1) // BLOCK


def rule_of_intervals(intervals: IntervalSet, size: Size, device: torch.device) -> TileRule:
    """What the bounds of intervals, which do not differ between heads, say of tiles."""
    bounds = row_bounds(intervals_tensor(intervals, size.len_q, size.len_k, device))
    start = BLOCK * torch.arange(tile_count(size.len_k), device=device)
    end = (start + BLOCK).clamp(max=size.len_k)

    def rule(batch: int, rows: Tensor) -> Tensor:
        own = bounds[:, min(batch, bounds.shape[1] - 1), 0, rows]
        least_start, greatest_start, least_end, greatest_end = own.unsqueeze(-2).unbind(-1)
        touched = (greatest_end > start) & (least_start < end)
        full = (greatest_start <= start) & (least_end >= end)
        return touched.any(0).to(torch.int8) + full.any(0).to(torch.int8)

    return rule


def unknown(size: Size, device: torch.device) -> TileRule:
    """The rule of a mask that has to be evaluated everywhere."""
    columns = tile_count(size.len_k)
    return lambda batch, rows: torch.full((rows.numel(), columns), UNKNOWN, dtype=torch.int8, device=device)


def scan(mask: Mask, size: Size, device: torch.device, within: Mask | None = None) -> Iterator[Strip]:
    """The visible tiles of every batch entry and head over which the mask differs, strip by strip.

    within: a mask whose empty tiles are left out without being looked at; it hides nothing else.
    """
    batches, heads = mask.extent(size, device)
    rows, columns = tile_count(size.len_q), tile_count(size.len_k)
    if 0 in size:
        return
    step = max(1, _STATES_AT_ONCE // columns)
    limit = None if within is None else within.tile_rule(size, device)
    rules = {}
    for head in range(heads):
        own = mask.at_head(head)
        rules[head] = own, own.tile_rule(size, device)
    for batch in range(batches):
        for head in range(heads):
            own, rule = rules[head]
            for first in range(0, rows, step):
                chunk = torch.arange(first, min(first + step, rows), device=device)
                states = rule(batch, chunk)
                if limit is not None:
                    states = states.masked_fill(limit(batch, chunk) == EMPTY, EMPTY)
                yield _settle(own, batch, head, chunk, states, size)


def tile_grid(mask: Mask, size: Size, device: torch.device) -> Tensor:
    """int8 (1|B, 1|Hq, rows, columns) of EMPTY, partly visible (1) and FULL."""
    grid = torch.zeros(
        (*mask.extent(size, device), tile_count(size.len_q), tile_count(size.len_k)), dtype=torch.int8, device=device
    )
    for strip in scan(mask, size, device):
        grid[strip.batch, strip.head, strip.row, strip.col] = UNKNOWN + strip.full.to(torch.int8)
    return grid


def density(mask: Mask, size: Size, device: torch.device) -> float:
    """The share of visible pairs; 0 where there are no pairs."""
    batches, heads = mask.extent(size, device)
    pairs = batches * heads * size.len_q * size.len_k
    seen = sum(int(strip.pairs.sum()) for strip in scan(mask, size, device))
    return seen / pairs if pairs else 0.0


def pack_words(bits: Tensor) -> Tensor:
    """bool (..., 64 n) to int64 (..., n): element c of a group of 64 becomes bit c of its word."""
    octets = bits.contiguous().view(torch.int64)  # eight bytes of 0 or 1 in a word; the product gathers them in the top
    octets = ((octets * 0x0102040810204080) >> 56).to(torch.uint8)
    return octets.view(torch.int64)


def _settle(mask: Mask, batch: int, head: int, chunk: Tensor, states: Tensor, size: Size) -> Strip:
    """Evaluates the tiles whose state is unknown."""
    row, col = states.nonzero().unbind(1)
    full = states[row, col] == FULL
    row = chunk[row]
    height = (size.len_q - BLOCK * row).clamp(max=BLOCK)
    count = height * (size.len_k - BLOCK * col).clamp(max=BLOCK)
    open_tiles = (~full).nonzero().squeeze(1)
    sample, like = _representatives(mask, row[open_tiles], col[open_tiles], size)
    sample = open_tiles[sample]
    parts = [_evaluate(mask, batch, head, row[part], col[part], size) for part in sample.split(_TILES_AT_ONCE)]
    seen, words = (torch.cat(found)[like] for found in zip(*parts, strict=True))
    full[open_tiles] = seen == count[open_tiles]
    count[open_tiles] = seen
    keep = count > 0
    partial = keep[open_tiles] & ~full[open_tiles]
    return Strip(batch, head, row[keep], col[keep], full[keep], words[partial], count[keep])


def _representatives(mask: Mask, row: Tensor, col: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Tiles that stand for all of these: which, and for each tile the number of its stand-in.

    Every tile stands for itself; of a mask that knows nothing but distances, one stands for its whole diagonal, but for
    tiles that reach past the last query or key.
    """
    if not mask.by_distance:
        every = torch.arange(row.numel(), device=row.device)
        return every, every
    cut = 2 * ((row + 1) * BLOCK > size.len_q) + ((col + 1) * BLOCK > size.len_k).long()
    kind = (col - row) * 4 + cut
    _, like = torch.unique(kind, return_inverse=True)
    sample = torch.empty(int(like.max()) + 1 if like.numel() else 0, dtype=torch.int64, device=row.device)
    sample[like] = torch.arange(row.numel(), device=row.device)
    return sample, like


def _evaluate(mask: Mask, batch: int, head: int, row: Tensor, col: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """The visible pairs, int64 (n,), and the words, int64 (n, 64), of these tiles; nothing is visible past the last
    query and key."""
    lane = torch.arange(BLOCK, device=row.device)
    query = (row * BLOCK).view(-1, 1, 1) + lane.view(-1, 1)
    key = (col * BLOCK).view(-1, 1, 1) + lane
    inside = (query < size.len_q) & (key < size.len_k)
    entry, number = (torch.full((row.numel(), 1, 1), n, device=row.device) for n in (batch, head))
    at = Index(entry, number, query.clamp(max=size.len_q - 1), key.clamp(max=size.len_k - 1), size)
    bits = (mask.rule(at) & inside).expand(row.numel(), BLOCK, BLOCK)
    return bits.sum(dim=(1, 2)), pack_words(bits).squeeze(-1)
