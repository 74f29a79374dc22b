"""Masks that follow from positions alone: causal, sliding window, prefix, global and sink tokens.

A query's position p is its place among the keys: i + (Skv - Sq) where align is "bottom-right", the default, so that the
last query sits at the last key; i where it is "top-left". Key j sits at position j.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.masks.arguments import (
    Align,
    Positions,
    as_count,
    as_reach,
    check_align,
    check_positions,
    describe,
    positions_on,
)
from fastattn.masks.base import Mask
from fastattn.masks.intervals import HIGHEST, LOWEST, IntervalSet, interval
from fastattn.masks.lowered import Index, LoweredMask, PackedSize, Size

_FAR = HIGHEST // 2  # beyond the distance of any two positions


class SlidingWindow(Mask):
    """Keeps keys whose position lies in [p - left, p + right], both ends included, for a query at position p.

    left, right: non-negative int, or None for unbounded.
    align: "bottom-right" puts query i at position i + (Skv - Sq), "top-left" at i.
    Raises ValueError or TypeError for other values.
    """

    light = True
    by_distance = True

    def __init__(self, left: int | None, right: int | None, align: Align = "bottom-right") -> None:
        check_align(align)
        self.left = as_reach("SlidingWindow", "left", left)
        self.right = as_reach("SlidingWindow", "right", right)
        self.align = align

    def parts(self) -> tuple[Any, ...]:
        return self.left, self.right, self.align

    def identity(self) -> tuple[Any, ...]:
        return (SlidingWindow, *self.parts())  # Causal is a name of one of them

    def rule(self, at: Index) -> Tensor:
        distance = at.key - at.position(self.align)
        seen = torch.ones_like(distance, dtype=torch.bool)
        if self.left is not None:
            seen = seen & (distance >= -self.left)
        if self.right is not None:
            seen = seen & (distance <= self.right)
        return seen

    def negated(self) -> Mask | None:
        if self.left is None and self.right is not None:
            return _Band(-self.right - 1, None, self.align)
        if self.right is None and self.left is not None:
            return _Band(None, -self.left - 1, self.align)
        return None

    def keys_and_band(self, size: Size, device: torch.device) -> LoweredMask | None:
        offset = size.offset(self.align)
        if isinstance(size, PackedSize):  # whose bands start from each sequence's end
            if self.align != "bottom-right":
                return None
            offset = 0
        assert not isinstance(offset, Tensor)
        return LoweredMask(band_offset=offset, band_left=self.left, band_right=self.right)

    def intervals(self, size: Size, device: torch.device) -> IntervalSet:
        position = positions_of_queries(size, self.align, device)
        start = None if self.left is None else position - min(self.left, _FAR)
        return interval(start, None if self.right is None else position + min(self.right, _FAR) + 1)

    def __repr__(self) -> str:
        return f"SlidingWindow(left={self.left}, right={self.right}{aligned(self.align)})"


class _Band(SlidingWindow):
    """A window whose reach may be negative: what a one-sided window hides."""

    def __init__(self, left: int | None, right: int | None, align: Align) -> None:
        self.left = left
        self.right = right
        self.align = align


class Causal(SlidingWindow):
    """Keeps keys at or before the query's position: `SlidingWindow(None, 0, align)`."""

    def __init__(self, align: Align = "bottom-right") -> None:
        super().__init__(None, 0, align)

    def __repr__(self) -> str:
        return "Causal()" if self.align == "bottom-right" else f"Causal(align={self.align!r})"


class _Counted(Mask):
    """A mask over the first n keys; n is one number, or one per batch entry."""

    def __init__(self, n: int | Tensor | Sequence[int], align: Align = "bottom-right") -> None:
        check_align(align)
        self.n: int | Positions = as_count(type(self).__name__, "n", n, "tokens")
        self.align = align

    def parts(self) -> tuple[Any, ...]:
        return self.n, self.align

    def check(self, size: Size, device: torch.device | None) -> None:
        if not isinstance(self.n, int):
            check_positions(f"{type(self).__name__}: n", self.n, size.batch, device)

    def extent(self, size: Size, device: torch.device) -> tuple[int, int]:
        return (1 if isinstance(self.n, int) else len(self.n)), 1

    def _count(self, at: Index) -> Tensor | int:
        """n of the batch entries of an index."""
        if isinstance(self.n, int):
            return self.n
        return positions_on(self.n, at.size.batch, at.batch.device)[at.batch]

    def _edge(self, size: Size, device: torch.device) -> Tensor | int:
        """n as an edge of intervals."""
        return self.n if isinstance(self.n, int) else positions_on(self.n, size.batch, device).view(-1, 1, 1)

    def __repr__(self) -> str:
        n = describe(self.n) if not isinstance(self.n, int) else self.n
        return f"{type(self).__name__}({n}{aligned(self.align)})"


class PrefixLM(_Counted):
    """A prefix that all see, then causal: keeps key j for the query at position p where j < n or j <= p.

    n: length of the prefix: a number, or an integer tensor (B,) on q's device or a list, one per batch entry. Within
    the prefix attention is bidirectional. align: where queries sit, see `SlidingWindow`.
    Raises ValueError or TypeError for other values.
    """

    def rule(self, at: Index) -> Tensor:
        return (at.key < self._count(at)) | (at.key <= at.position(self.align))

    def intervals(self, size: Size, device: torch.device) -> IntervalSet:
        after = positions_of_queries(size, self.align, device) + 1
        n = self._edge(size, device)
        return interval(None, torch.maximum(after, n) if isinstance(n, Tensor) else after.clamp(min=min(n, _FAR)))


class GlobalTokens(_Counted):
    """The first n tokens see every key, and every query sees them: keeps key j for the query at position p where
    j < n or 0 <= p < n.

    n: number of global tokens: a number, or an integer tensor (B,) on q's device or a list, one per batch entry.
    align: where queries sit, see `SlidingWindow`. Used as `SlidingWindow(...) | GlobalTokens(n)`.
    Raises ValueError or TypeError for other values.
    """

    def rule(self, at: Index) -> Tensor:
        n, position = self._count(at), at.position(self.align)
        return (at.key < n) | ((position >= 0) & (position < n))

    def intervals(self, size: Size, device: torch.device) -> IntervalSet:
        position = positions_of_queries(size, self.align, device)
        n = self._edge(size, device)
        n = n.clamp(LOWEST + 1, _FAR) if isinstance(n, Tensor) else min(n, _FAR)
        special = (position >= 0) & (position < n)
        return IntervalSet((LOWEST, torch.where(special, HIGHEST, n).to(torch.int32)), from_lowest=True)


class SinkTokens(_Counted):
    """Keeps the first n keys for every query: key j where j < n. Used as `SlidingWindow(...) | SinkTokens(n)`.

    n: number of keys: a number, or an integer tensor (B,) on q's device or a list, one per batch entry.
    Raises ValueError or TypeError for other values.
    """

    light = True

    def __init__(self, n: int | Tensor | Sequence[int]) -> None:
        super().__init__(n)

    def rule(self, at: Index) -> Tensor:
        return at.key < self._count(at)

    def keys_and_band(self, size: Size, device: torch.device) -> LoweredMask:
        return LoweredMask(key_end=positions_on(self.n, size.batch, device))

    def intervals(self, size: Size, device: torch.device) -> IntervalSet:
        return interval(None, self._edge(size, device))


def positions_of_queries(size: Size, align: str, device: torch.device) -> Tensor:
    """int32 (1|B, 1, Sq): the position of each query."""
    query = torch.arange(size.len_q, dtype=torch.int32, device=device).view(1, 1, -1)
    offset = size.offset(align)
    return query + (offset.view(-1, 1, 1) if isinstance(offset, Tensor) else offset)


def aligned(align: str) -> str:
    """The end of a repr: the alignment, where it is not the default."""
    return "" if align == "bottom-right" else f", align={align!r}"
