"""A mask of its own for every head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.masks.base import Mask
from fastattn.masks.intervals import MOST, IntervalSet, per_head
from fastattn.masks.lowered import Index, Size


class PerHead(Mask):
    """Keeps, for query head h, what masks[h] keeps.

    masks: one mask per query head. Raises TypeError or ValueError for anything else.
    """

    def __init__(self, masks: Sequence[Mask]) -> None:
        if isinstance(masks, Mask) or not isinstance(masks, Sequence):
            raise TypeError(f"PerHead: masks is a {type(masks).__name__}: pass a list with one mask per query head")
        wrong = [m for m in masks if not isinstance(m, Mask)]
        if wrong:
            raise TypeError(f"PerHead: masks holds a {type(wrong[0]).__name__}: pass objects of fastattn.masks")
        if not masks:
            raise ValueError("PerHead: masks=[] is empty: pass one mask per query head")
        self.masks = tuple(masks)
        self._same = all(mask is masks[0] or mask == masks[0] for mask in masks)

    def parts(self) -> tuple[Any, ...]:
        return self.masks

    def check(self, size: Size, device: torch.device | None) -> None:
        if size.heads != len(self.masks):
            raise ValueError(
                f"PerHead: masks holds {len(self.masks)} masks, but q has {size.heads} heads: pass one per query head"
            )
        super().check(size, device)

    def extent(self, size: Size, device: torch.device) -> tuple[int, int]:
        return max(mask.extent(size, device)[0] for mask in self.masks), len(self.masks)

    def at_head(self, head: int) -> Mask:
        return self.masks[head].at_head(head)

    def rule(self, at: Index) -> Tensor:
        seen = torch.zeros((), dtype=torch.bool, device=at.head.device)
        for head, mask in enumerate(self.masks):
            seen = seen | ((at.head == head) & mask.rule(at))
        return seen

    def simpler(self) -> Mask | None:
        return self.masks[0] if self._same else None

    def intervals(self, size: Size, device: torch.device) -> IntervalSet | None:
        found = [self.at_head(head).intervals(size, device) for head in range(len(self.masks))]
        sets = [x for x in found if x is not None]
        if len(sets) < len(found) or max(x.slots() for x in sets) > MOST:
            return None
        return per_head(sets)

    def __repr__(self) -> str:
        return f"PerHead([{', '.join(map(repr, self.masks))}])"
