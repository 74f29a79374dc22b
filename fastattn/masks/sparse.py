"""Sparse patterns by position: dilated, strided, and Longformer's window with global tokens.

A query's position p, and `align`, are those of `fastattn.masks.positional`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.masks.arguments import Align, as_distance, check_align
from fastattn.masks.base import Mask
from fastattn.masks.intervals import BLOCK, IntervalSet
from fastattn.masks.lowered import Index, Size
from fastattn.masks.positional import Causal, GlobalTokens, SlidingWindow, aligned, positions_of_queries
from fastattn.masks.tiles import EMPTY, FULL, UNKNOWN, TileRule, tile_count


class _Multiples(Mask):
    """Keeps keys whose distance from the query's position is a multiple of `step`."""

    by_distance = True

    def __init__(self, step: int, align: Align) -> None:
        self.step = step
        self.align = align

    def parts(self) -> tuple[Any, ...]:
        return self.step, self.align

    def rule(self, at: Index) -> Tensor:
        return (at.key - at.position(self.align)) % self.step == 0

    def tile_rule(self, size: Size, device: torch.device) -> TileRule:
        """A tile's distances are the numbers within 63 of that of its corners."""
        first_key = BLOCK * torch.arange(tile_count(size.len_k), device=device)
        offset = size.offset(self.align)

        def rule(batch: int, rows: Tensor) -> Tensor:
            greatest = first_key - (rows[:, None] * BLOCK + offset) + BLOCK - 1
            least = greatest - 2 * (BLOCK - 1)
            touched = greatest - greatest % self.step >= least
            return torch.where(touched, FULL if self.step == 1 else UNKNOWN, EMPTY).to(torch.int8)

        return rule

    def __repr__(self) -> str:
        return f"Multiples({self.step}{aligned(self.align)})"


class Dilated(Mask):
    """A sliding window with gaps: keeps the keys at distances -window * dilation, ..., -dilation, 0, dilation, ...,
    window * dilation from the query's position: |j - p| <= window * dilation and (j - p) mod dilation = 0.

    window: keys on either side, 0 or more, next to the query's own. dilation: distance between them, 1 or more; 1 is
    `SlidingWindow(window, window)`. align: where queries sit. Raises ValueError or TypeError for other values.
    """

    def __init__(self, window: int, dilation: int, align: Align = "bottom-right") -> None:
        check_align(align)
        self.window = as_distance("Dilated", "window", window, 0, "keys on either side")
        self.dilation = as_distance("Dilated", "dilation", dilation, 1, "positions from key to key")
        self.align: Align = align

    def parts(self) -> tuple[Any, ...]:
        return self.window, self.dilation, self.align

    def rule(self, at: Index) -> Tensor:
        distance = at.key - at.position(self.align)
        return (distance.abs() <= self.window * self.dilation) & (distance % self.dilation == 0)

    def simpler(self) -> Mask | None:
        reach = self.window * self.dilation
        if self.dilation == 1 or self.window == 0:
            return SlidingWindow(reach, reach, self.align)
        return (
            None
            if self.window == 1
            else SlidingWindow(reach, reach, self.align) & _Multiples(self.dilation, self.align)
        )

    def intervals(self, size: Size, device: torch.device) -> IntervalSet | None:
        if self.window != 1 or self.dilation == 1:
            return super().intervals(size, device)
        position = positions_of_queries(size, self.align, device)
        keys = (position - self.dilation, position, position + self.dilation)
        return IntervalSet(tuple(edge for key in keys for edge in (key, key + 1)))

    def __repr__(self) -> str:
        return f"Dilated({self.window}, {self.dilation}{aligned(self.align)})"


class Strided(Mask):
    """The strided pattern of the Sparse Transformer (Child et al., 2019), both of its parts in one mask: the last
    `stride` keys and every stride-th key before: keeps j <= p where p - j <= stride or (p - j) mod stride = 0.

    stride: 1 or more. align: where queries sit. Raises ValueError or TypeError for other values.
    """

    def __init__(self, stride: int, align: Align = "bottom-right") -> None:
        check_align(align)
        self.stride = as_distance("Strided", "stride", stride, 1, "positions from key to key")
        self.align: Align = align

    def parts(self) -> tuple[Any, ...]:
        return self.stride, self.align

    def rule(self, at: Index) -> Tensor:
        back = at.position(self.align) - at.key
        return (back >= 0) & ((back <= self.stride) | (back % self.stride == 0))

    def simpler(self) -> Mask:
        if self.stride == 1:
            return Causal(self.align)
        near = SlidingWindow(self.stride, 0, self.align)
        return Causal(self.align) & (near | _Multiples(self.stride, self.align))

    def __repr__(self) -> str:
        return f"Strided({self.stride}{aligned(self.align)})"


class Longformer(Mask):
    """Longformer's pattern (Beltagy et al., 2020): a window round every token, and global tokens that see all and are
    seen by all: `SlidingWindow(window // 2, window // 2) | GlobalTokens(global_tokens)`.

    window: width of the whole window as the published models count it (`attention_window`): window // 2 keys on either
    side, and the query's own. global_tokens: how many of the first tokens are global. align: where queries sit.
    Raises ValueError or TypeError for other values.
    """

    def __init__(self, window: int, global_tokens: int, align: Align = "bottom-right") -> None:
        check_align(align)
        self.window = as_distance("Longformer", "window", window, 0, "keys in the whole window")
        self.global_tokens = as_distance("Longformer", "global_tokens", global_tokens, 0, "tokens")
        self.align: Align = align

    def parts(self) -> tuple[Any, ...]:
        return self.window, self.global_tokens, self.align

    def rule(self, at: Index) -> Tensor:
        position, n = at.position(self.align), self.global_tokens
        near = (at.key - position).abs() <= self.window // 2
        return near | (at.key < n) | ((position >= 0) & (position < n))

    def simpler(self) -> Mask:
        half = self.window // 2
        return SlidingWindow(half, half, self.align) | GlobalTokens(self.global_tokens, self.align)

    def __repr__(self) -> str:
        return f"Longformer({self.window}, {self.global_tokens}{aligned(self.align)})"
