"""BigBird's pattern: a window, global tokens and random keys, all in blocks."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastattn.masks.arguments import Align, as_distance, as_whole, check_align
from fastattn.masks.base import Mask
from fastattn.masks.intervals import BLOCK, HIGHEST, LOWEST, IntervalSet, interval
from fastattn.masks.lowered import Index, Size
from fastattn.masks.positional import GlobalTokens, aligned, positions_of_queries
from fastattn.masks.tiles import UNKNOWN, TileRule, tile_count


class BigBird(Mask):
    """BigBird's pattern (Zaheer et al., 2020, the variant within the sequence), at the granularity of blocks.

    Positions are cut into blocks of `block`; with P = p // block the block of the query at position p and J = j //
    block that of key j, it keeps the union of
    - the window: |J - P| <= window_blocks // 2;
    - global blocks: J < global_blocks, and every key where 0 <= P < global_blocks;
    - `random_blocks` blocks J drawn for each P, without repetition, among the key blocks that are neither global nor in
      the window (all of them where there are no more).

    block: 1 or more. window_blocks: width of the window with the query's own block in its middle, odd. global_blocks,
    random_blocks: 0 or more. seed: 0 or more; what is drawn follows from it, P and the number of key blocks alone, so
    that every layer, head and device sees the same (`PerHead` gives each head a seed of its own). align: where queries
    sit, see `SlidingWindow`. Raises ValueError or TypeError for other values.
    """

    def __init__(
        self,
        block: int,
        window_blocks: int,
        global_blocks: int,
        random_blocks: int,
        seed: int = 0,
        align: Align = "bottom-right",
    ) -> None:
        block = as_distance("BigBird", "block", block, 1, "positions")
        window_blocks = as_whole("BigBird", "window_blocks", window_blocks, 1, "blocks")
        if window_blocks % 2 == 0:
            raise ValueError(f"BigBird: window_blocks={window_blocks} is even: pass an odd width such as 3")
        global_blocks = as_distance("BigBird", "global_blocks", global_blocks, 0, "blocks")
        random_blocks = as_distance("BigBird", "random_blocks", random_blocks, 0, "blocks")
        seed = as_whole("BigBird", "seed", seed, 0, "")
        check_align(align)
        self.block = block
        self.window_blocks = window_blocks
        self.global_blocks = global_blocks
        self.random_blocks = random_blocks
        self.seed = seed
        self.align: Align = align
        reach = min(window_blocks // 2, HIGHEST)
        window = _BlockWindow(block, reach, align)
        self._simpler: Mask = GlobalTokens(global_blocks * block, align) | window
        if random_blocks:
            self._simpler = self._simpler | _RandomBlocks(block, reach, global_blocks, random_blocks, seed, align)

    def parts(self) -> tuple[Any, ...]:
        numbers = (self.block, self.window_blocks, self.global_blocks, self.random_blocks, self.seed)
        return (*numbers, self.align)

    def rule(self, at: Index) -> Tensor:
        return self._simpler.rule(at)

    def simpler(self) -> Mask:
        return self._simpler

    def __repr__(self) -> str:
        numbers = (self.block, self.window_blocks, self.global_blocks, self.random_blocks, self.seed)
        return f"BigBird({', '.join(map(str, numbers))}{aligned(self.align)})"


class _BlockWindow(Mask):
    """Keeps keys whose block is at most `reach` blocks from the query's."""

    def __init__(self, block: int, reach: int, align: Align) -> None:
        self.block = block
        self.reach = reach
        self.align = align

    def parts(self) -> tuple[Any, ...]:
        return self.block, self.reach, self.align

    def rule(self, at: Index) -> Tensor:
        return (at.key // self.block - at.position(self.align) // self.block).abs() <= self.reach

    def intervals(self, size: Size, device: torch.device) -> IntervalSet:
        own = (positions_of_queries(size, self.align, device) // self.block).to(torch.int64)
        first, last = (own - self.reach) * self.block, (own + self.reach + 1) * self.block
        return interval(*(edge.clamp(LOWEST, HIGHEST).to(torch.int32) for edge in (first, last)))

    def __repr__(self) -> str:
        return f"BlockWindow({self.block}, {self.reach}{aligned(self.align)})"


class _RandomBlocks(Mask):
    """Keeps keys in the blocks drawn for the query's block."""

    def __init__(self, block: int, reach: int, global_blocks: int, count: int, seed: int, align: Align) -> None:
        self.block = block
        self.reach = reach
        self.global_blocks = global_blocks
        self.count = count
        self.seed = seed
        self.align = align

    def parts(self) -> tuple[Any, ...]:
        return self.block, self.reach, self.global_blocks, self.count, self.seed, self.align

    def rule(self, at: Index) -> Tensor:
        first, drawn = self._drawn(at.size, at.query.device)
        key_block = at.key // self.block
        own = drawn[at.position(self.align) // self.block - first]
        seen = own[..., 0] == key_block
        for other in range(1, self.count):
            seen = seen | (own[..., other] == key_block)
        return seen

    def tile_rule(self, size: Size, device: torch.device) -> TileRule:
        """Not by intervals: their bounds over 64 queries that drew different blocks would span what lies between."""
        offset = _offset(size, self.align)
        columns, block = tile_count(size.len_k), self.block
        first, drawn = self._drawn(size, device)
        drawn = torch.cat([drawn, drawn.new_full((1, self.count), HIGHEST)])

        def rule(batch: int, rows: Tensor) -> Tensor:
            start = BLOCK * rows + offset
            end = (start + BLOCK).clamp(max=size.len_q + offset)
            low, high = start // block, (end - 1) // block
            states = torch.zeros((rows.numel(), columns + 1), dtype=torch.int8, device=device)
            for step in range((BLOCK - 2) // block + 2):  # query blocks in a row of tiles
                own = drawn[torch.where(low + step <= high, low + step - first, -1)] * block
                for across in range(min((block + BLOCK - 2) // BLOCK + 1, columns)):  # of tiles under a key block
                    col = own // BLOCK + across
                    touched = col * BLOCK < (own + block).clamp(max=size.len_k)
                    covered = (own <= col * BLOCK) & ((col + 1) * BLOCK <= own + block) & (low == high)[:, None]
                    states.scatter_reduce_(
                        1, torch.where(touched, col, columns), UNKNOWN + covered.to(torch.int8), "amax"
                    )
            return states[:, :columns]

        return rule

    def _drawn(self, size: Size, device: torch.device) -> tuple[int, Tensor]:
        """The first query block, and int64 (query blocks, count): the key blocks drawn for each, ascending."""
        offset = _offset(size, self.align)
        first, last = offset // self.block, (offset + max(size.len_q, 1) - 1) // self.block
        drawn = _draw(first, last, -(-size.keys // self.block), *self.parts()[1:5])
        return first, torch.from_numpy(drawn).to(device)

    def __repr__(self) -> str:
        return f"RandomBlocks{self.parts()}"


def _offset(size: Size, align: str) -> int:
    offset = size.offset(align)
    assert isinstance(offset, int)  # of a packed batch each sequence is looked at by itself
    return offset


@functools.lru_cache(maxsize=64)
def _draw(
    first: int, last: int, key_blocks: int, reach: int, global_blocks: int, count: int, seed: int
) -> npt.NDArray[np.int64]:
    """The key blocks drawn for query blocks first to last; a block beyond the last key stands for none.

    No tensor, which under a FakeTensorMode would be a fake one, remembered for later calls.
    """
    rows = np.full((last - first + 1, count), HIGHEST, dtype=np.int64)
    for query_block in range(first, last + 1):
        low = min(max(query_block - reach, global_blocks), key_blocks)
        high = min(max(query_block + reach + 1, low), key_blocks)
        start = min(global_blocks, key_blocks)
        eligible = key_blocks - start - (high - low)
        if eligible <= 0:
            continue
        numbers = np.random.Generator(np.random.PCG64([seed, key_blocks, query_block + 2**31]))
        chosen = numbers.choice(eligible, min(count, eligible), replace=False) + start
        chosen = np.sort(chosen + (chosen >= low) * (high - low))
        rows[query_block - first, : chosen.size] = chosen
    return rows
