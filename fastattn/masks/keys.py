"""Masks over the keys of each batch entry: lengths, ranges, bool key masks.

A key that no query of its batch entry may see under these masks is zero-filled on load: whatever is stored there,
NaN included, changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.masks.arguments import (
    Positions,
    as_positions,
    check_bool,
    check_device,
    check_positions,
    describe,
    positions_on,
)
from fastattn.masks.base import Mask
from fastattn.masks.intervals import IntervalSet, interval
from fastattn.masks.lowered import Index, LoweredMask, Size


class _Range(Mask):
    """start[b] <= j < end[b]; None is unbounded."""

    light = True

    names = ("start", "end")

    def __init__(self, start: Positions | None, end: Positions | None) -> None:
        self._ends = (start, end)

    def parts(self) -> tuple[Any, ...]:
        return self._ends

    def check(self, size: Size, device: torch.device | None) -> None:
        for name, value in zip(self.names, self._ends, strict=True):
            if value is not None:
                check_positions(name, value, size.batch, device)

    def extent(self, size: Size, device: torch.device) -> tuple[int, int]:
        return max(len(value) for value in self._ends if value is not None), 1

    def rule(self, at: Index) -> Tensor:
        start, end = (self._of(value, at) for value in self._ends)
        seen = torch.ones_like(at.key, dtype=torch.bool)
        if start is not None:
            seen = seen & (at.key >= start)
        return seen if end is None else seen & (at.key < end)

    def _of(self, value: Positions | None, at: Index) -> Tensor | None:
        return None if value is None else positions_on(value, at.size.batch, at.batch.device)[at.batch]

    def keys_and_band(self, size: Size, device: torch.device) -> LoweredMask:
        start, end = (None if v is None else positions_on(v, size.batch, device) for v in self._ends)
        return LoweredMask(key_start=start, key_end=end)

    def intervals(self, size: Size, device: torch.device) -> IntervalSet:
        start, end = (None if v is None else positions_on(v, size.batch, device).view(-1, 1, 1) for v in self._ends)
        return interval(start, end)

    def __repr__(self) -> str:
        shown = ", ".join(describe(value) for value in self._ends if value is not None)
        return f"{type(self).__name__}({shown})"


class KeyLengths(_Range):
    """Keeps the first lengths[b] keys of batch entry b: padding on the right.

    lengths: an integer tensor (B,) on q's device, or a list of B ints. Lengths beyond Skv keep all keys.
    """

    names = ("start", "lengths")

    def __init__(self, lengths: Tensor | Sequence[int]) -> None:
        self.lengths = as_positions("KeyLengths", "lengths", lengths)
        super().__init__(None, self.lengths)

    def negated(self) -> Mask:
        return _Range(self.lengths, None)


class KeyRange(_Range):
    """Keeps the keys start[b] <= j < end[b] of batch entry b: padding on the left, on the right, or both.

    start, end: integer tensors (B,) on q's device, or lists of B ints. start >= end keeps nothing.
    """

    def __init__(self, start: Tensor | Sequence[int], end: Tensor | Sequence[int]) -> None:
        self.start = as_positions("KeyRange", "start", start)
        self.end = as_positions("KeyRange", "end", end)
        super().__init__(self.start, self.end)


class KeyMask(Mask):
    """Keeps key j of batch entry b where keep[b, j] is True. keep: bool (B, Skv), or (1, Skv), on q's device."""

    def __init__(self, keep: Tensor) -> None:
        check_bool("KeyMask", "keep", keep)
        if keep.dim() != 2:
            raise ValueError(f"KeyMask: keep has shape {tuple(keep.shape)}: pass a bool tensor of shape (B, Skv)")
        self.keep = keep
        self._shown = True

    def parts(self) -> tuple[Any, ...]:
        return self.keep, self._shown

    def check(self, size: Size, device: torch.device | None) -> None:
        check_device("KeyMask", self.keep, device)
        if self.keep.shape[1] != size.len_k or self.keep.shape[0] not in (1, size.batch):
            raise ValueError(
                f"KeyMask: keep has shape {tuple(self.keep.shape)}, but this call has B={size.batch} and "
                f"Skv={size.len_k}: pass ({size.batch}, {size.len_k})"
            )

    def extent(self, size: Size, device: torch.device) -> tuple[int, int]:
        return self.keep.shape[0], 1

    def rule(self, at: Index) -> Tensor:
        keep = self.keep.to(at.batch.device)
        entry = at.batch if keep.shape[0] > 1 else torch.zeros_like(at.batch)
        return keep[entry, at.key] == self._shown

    def negated(self) -> Mask:
        other = KeyMask(self.keep)
        other._shown = not self._shown
        return other

    def keys_and_band(self, size: Size, device: torch.device) -> LoweredMask:
        words = (size.len_k + 63) // 64
        keep = torch.nn.functional.pad(self.keep == self._shown, (0, 64 * words - size.len_k))
        bits = keep.unflatten(1, (words, 64)).long() << torch.arange(64, device=device)
        return LoweredMask(key_bits=bits.sum(dim=2).expand(size.batch, words).contiguous())

    def __repr__(self) -> str:
        return f"KeyMask({describe(self.keep)})"
