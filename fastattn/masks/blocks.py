"""Form D: building the base blocks of a mask, and merging them into the tiles of a kernel.

Built strip by strip (`fastattn.masks.tiles`), so that memory follows the visible tiles and not Sq x Skv. Building reads
values on the host, and runs outside of a compiled graph; it is done once per mask and shapes, see
`fastattn.masks.lowering`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastattn.masks.cache import Cache
from fastattn.masks.intervals import BLOCK
from fastattn.masks.lowered import Blocks, Size, block_lines
from fastattn.masks.tiles import scan, tile_count

if TYPE_CHECKING:
    from fastattn.masks.base import Mask

_retiled = Cache(entries=64, size=1 << 28)


class Tiles(NamedTuple):
    """Base blocks merged into tiles of `rows` queries x `cols` keys, multiples of 64; CSR as in Blocks.

    row_ptr   int32 (1|B, 1|Hq, tile rows + 1).
    col       int32 (n,): tile column, ascending within a tile row. A tile that is not listed is empty.
    full      bool (n,): every base block of the tile is full.
    ids       int32 (n, rows / 64, cols / 64): `Blocks.id` of each base block of the tile, -1 where it is empty. Base
              blocks past the last query or key count as full.
    col_ptr   int32 (1|B, 1|Hq, tile columns + 1): the transpose.
    row       int32 (n,): tile row, ascending within a tile column.
    entry     int32 (n,): where the tiles of that order lie in col, full and ids.
    """

    row_ptr: Tensor
    col: Tensor
    full: Tensor
    ids: Tensor
    col_ptr: Tensor
    row: Tensor
    entry: Tensor


def build_blocks(mask: Mask, size: Size, device: torch.device, within: Mask | None = None) -> Blocks:
    """The blocks of a mask. Blocks that are empty under `within` are left out."""
    batches, heads = mask.extent(size, device)
    rows, columns = tile_count(size.len_q), tile_count(size.len_k)
    line, col, numbers = [], [], []
    bitmaps = [torch.full((1, BLOCK), -1, dtype=torch.int64, device=device)]
    known = 1
    for strip in scan(mask, size, device, within):
        words, number = _distinct(strip.words)
        ids = torch.zeros_like(strip.col)
        ids[~strip.full] = number + known
        known += words.shape[0]
        bitmaps.append(words)
        line.append((strip.batch * heads + strip.head) * rows + strip.row)
        col.append(strip.col)
        numbers.append(ids)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    words, merged = _distinct(torch.cat(bitmaps)[1:])
    merged = torch.cat([nothing.new_zeros(1), merged + 1])
    blocks = _csr(
        torch.cat(line or [nothing]),
        torch.cat(col or [nothing]),
        merged[torch.cat(numbers or [nothing])],
        torch.cat([bitmaps[0], words]),
        (batches, heads, rows, columns),
    )
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # what is remembered may be used on any stream
    return blocks


def retile(blocks: Blocks, rows: int, cols: int) -> Tiles:
    """The blocks merged into tiles of rows x cols elements; remembered as long as the blocks live.

    Raises ValueError unless rows and cols are multiples of 64.
    """
    for name, value in (("rows", rows), ("cols", cols)):
        if value < BLOCK or value % BLOCK:
            raise ValueError(f"{name}={value} is no multiple of 64: tiles are made of 64 x 64 base blocks")
    return _retiled.get((rows, cols), tuple(blocks), lambda: _retile(blocks, rows // BLOCK, cols // BLOCK))


def _distinct(words: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows, and for each row the number of its like."""
    if words.shape[0] == 0:
        return words, words.new_empty(0)
    odd = torch.arange(1, 2 * words.shape[1], 2, device=words.device) * 0x1E3779B97F4A7C15
    mixed = words ^ (words >> 29)
    digest = (mixed * odd).sum(dim=1)
    _, number = torch.unique(digest, return_inverse=True)
    first = torch.empty(int(number.max()) + 1, dtype=torch.int64, device=words.device)
    first[number] = torch.arange(words.shape[0], device=words.device)
    if torch.equal(words[first][number], words):
        return words[first], number
    distinct, number = torch.unique(words, dim=0, return_inverse=True)  # two bitmaps of one digest
    return distinct, number


def _csr(line: Tensor, col: Tensor, ids: Tensor, bitmaps: Tensor, shape: tuple[int, int, int, int]) -> Blocks:
    """Blocks of entries that are sorted by line and column."""
    batches, heads, rows, columns = shape
    upright = line.div(max(rows, 1), rounding_mode="floor") * columns + col
    order = upright.argsort(stable=True)
    return Blocks(
        _pointers(line, batches, heads, rows),
        col.to(torch.int32),
        ids.to(torch.int32),
        bitmaps,
        _pointers(upright[order], batches, heads, columns),
        (line % max(rows, 1))[order].to(torch.int32),
        ids[order].to(torch.int32),
    )


def _pointers(line: Tensor, batches: int, heads: int, rows: int) -> Tensor:
    """int32 (batches, heads, rows + 1): where the entries of each line start and end, given each entry's line."""
    ends = torch.bincount(line, minlength=batches * heads * rows).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends])
    index = torch.arange(batches * heads, device=line.device).view(-1, 1) * rows
    index = index + torch.arange(rows + 1, device=line.device)
    return starts[index].view(batches, heads, rows + 1).to(torch.int32)


def _retile(blocks: Blocks, down: int, across: int) -> Tiles:
    batches, heads = blocks.row_ptr.shape[:2]
    rows, columns = blocks.row_ptr.shape[2] - 1, blocks.col_ptr.shape[2] - 1
    tile_rows, tile_columns = -(-rows // down), -(-columns // across)
    line, entry = block_lines(blocks)
    pair, row, col = line.div(max(rows, 1), rounding_mode="floor"), line % max(rows, 1), blocks.col[entry].long()
    name = (pair * tile_rows + row // down) * tile_columns + col // across
    tile, number = torch.unique(name, return_inverse=True)
    ids = torch.full((tile.numel(), down, across), -1, dtype=torch.int32, device=tile.device)
    ids[number, row % down, col % across] = blocks.id[entry]
    tile_line, tile_col = tile.div(max(tile_columns, 1), rounding_mode="floor"), tile % max(tile_columns, 1)
    lane_row = (tile_line % max(tile_rows, 1) * down)[:, None, None] + torch.arange(down, device=tile.device)[:, None]
    lane_col = (tile_col * across)[:, None, None] + torch.arange(across, device=tile.device)
    ids.masked_fill_((lane_row >= rows) | (lane_col >= columns), 0)
    every = torch.arange(tile.numel(), device=tile.device)
    pointers = _csr(tile_line, tile_col, every, blocks.bitmaps, (batches, heads, tile_rows, tile_columns))
    return Tiles(
        pointers.row_ptr,
        pointers.col,
        (ids == 0).flatten(1).all(dim=1),
        ids,
        pointers.col_ptr,
        pointers.row,
        pointers.row_id,
    )
