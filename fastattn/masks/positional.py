"""Masks that follow from positions alone: causal and sliding window."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastattn.masks.base import Mask
from fastattn.masks.lowered import LoweredMask

Align = Literal["bottom-right", "top-left"]
_ALIGNMENTS = ("bottom-right", "top-left")


class SlidingWindow(Mask):
    """Keeps keys whose position lies in [p - left, p + right], both ends included, for a query at position p.

    left, right: non-negative int, or None for unbounded.
    align: "bottom-right" puts query i at position i + (Skv - Sq), "top-left" at i.
    Raises ValueError or TypeError for other values.
    """

    def __init__(self, left: int | None, right: int | None, align: Align = "bottom-right") -> None:
        _check_reach("left", left)
        _check_reach("right", right)
        if align not in _ALIGNMENTS:
            raise ValueError(f"align={align!r} is unknown: pass 'bottom-right' or 'top-left'")
        self.left = left
        self.right = right
        self.align = align

    def lower(self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device) -> LoweredMask:
        offset = len_k - len_q if self.align == "bottom-right" else 0
        return LoweredMask(band_offset=offset, band_left=self.left, band_right=self.right)

    def to_dense(
        self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device | str | None = None
    ) -> Tensor:
        seen = torch.ones(len_q, len_k, dtype=torch.bool, device=device)
        shift = len_k - len_q if self.align == "bottom-right" else 0
        if self.right is not None:
            seen = seen.tril(shift + self.right)
        if self.left is not None:
            seen = seen.triu(shift - self.left)
        return seen.expand(batch, heads, len_q, len_k)

    def __repr__(self) -> str:
        suffix = "" if self.align == "bottom-right" else f", align={self.align!r}"
        return f"SlidingWindow(left={self.left}, right={self.right}{suffix})"


class Causal(SlidingWindow):
    """Keeps keys at or before the query's position: `SlidingWindow(None, 0, align)`."""

    def __init__(self, align: Align = "bottom-right") -> None:
        super().__init__(None, 0, align)

    def __repr__(self) -> str:
        return "Causal()" if self.align == "bottom-right" else f"Causal(align={self.align!r})"


def _check_reach(name: str, value: int | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}: pass a whole number of positions, or None")
    if value < 0:
        raise ValueError(f"{name}={value} is negative: pass 0 or more positions, or None for unbounded")
