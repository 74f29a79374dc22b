"""Which keys the queries of an attention case see: as a fastattn mask, a bool tensor, a rule, and a count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import masks

BLOCK = 64


@dataclass(frozen=True)
class Visible:
    """A window round position i + Skv - Sq, key lengths, and random 64 x 64 blocks; each None hides nothing.

    left, right: how far the window reaches. lengths: visible keys per batch entry. density: the share of blocks that
    is visible, drawn with `seed`; every row of blocks holds its share, to within one.
    """

    left: int | None = None
    right: int | None = None
    lengths: tuple[int, ...] | None = None
    density: float | None = None
    seed: int = 0

    @property
    def causal_only(self) -> bool:
        return self.left is None and self.right == 0 and self.lengths is None and self.density is None

    @property
    def everything(self) -> bool:
        return self == Visible()

    def describe(self) -> str:
        """Its options in words, "" where nothing is hidden."""
        parts = []
        if self.left is None and self.right == 0:
            parts.append("causal")
        elif self.left is not None and self.right == 0:
            parts.append(f"causal window {self.left}")
        elif self.left is not None or self.right is not None:
            parts.append(f"window {self.left} + {self.right}")
        if self.lengths is not None:
            parts.append("padded")
        if self.density is not None:
            parts.append(f"{self.density:.0%} of {BLOCK} x {BLOCK} blocks")
        return ", ".join(parts)

    def layout(self, len_q: int, len_k: int) -> Tensor:
        """The visible blocks, bool (rows of blocks, columns of blocks) on the CPU."""
        assert self.density is not None
        rows, columns = -(-len_q // BLOCK), -(-len_k // BLOCK)
        random = torch.Generator().manual_seed(self.seed)
        layout = torch.zeros(rows, columns, dtype=torch.bool)
        done = 0
        for row in range(rows):
            target = max(done + 1, round(self.density * columns * (row + 1)))
            layout[row, torch.randperm(columns, generator=random)[: target - done]] = True
            done = target
        return layout

    def rows(self, entry: int, first: int, last: int, len_q: int, len_k: int, device: str) -> Tensor:
        """bool (last - first, len_k): what queries first to last - 1 of a batch entry see."""
        query = torch.arange(first, last, device=device).view(-1, 1)
        key = torch.arange(len_k, device=device)
        seen = torch.ones(last - first, len_k, dtype=torch.bool, device=device)
        position = query + (len_k - len_q)
        if self.left is not None:
            seen &= key >= position - self.left
        if self.right is not None:
            seen &= key <= position + self.right
        if self.lengths is not None:
            seen &= key < self.lengths[entry]
        if self.density is not None:
            layout = self.layout(len_q, len_k).to(device)
            seen &= layout[query // BLOCK, key // BLOCK]
        return seen

    def dense(self, batch: int, len_q: int, len_k: int, device: str) -> Tensor | None:
        """bool (1 or batch, 1, len_q or 1, len_k), True where visible; None where nothing is hidden."""
        if self.everything:
            return None
        if self.lengths is not None and self == Visible(lengths=self.lengths):
            ends = torch.tensor(self.lengths, device=device).view(-1, 1, 1, 1)
            return torch.arange(len_k, device=device) < ends
        entries = 1 if self.lengths is None else batch
        return torch.stack([self.rows(b, 0, len_q, len_q, len_k, device) for b in range(entries)]).unsqueeze(1)

    def mask(self, len_q: int, len_k: int, device: str) -> masks.Mask | None:
        """The same as a mask of fastattn. Blocks are a masks.Predicate."""
        found: list[masks.Mask] = []
        if self.left is not None or self.right is not None:
            found.append(
                masks.Causal() if self.left is None and self.right == 0 else masks.SlidingWindow(self.left, self.right)
            )
        if self.lengths is not None:
            found.append(masks.KeyLengths(torch.tensor(self.lengths, dtype=torch.int32, device=device)))
        if self.density is not None:
            found.append(self._blocks(len_q, len_k, device))
        whole = None
        for part in found:
            whole = part if whole is None else whole & part
        return whole

    def _blocks(self, len_q: int, len_k: int, device: str) -> masks.Mask:
        layout = self.layout(len_q, len_k).to(device)
        return masks.Predicate(lambda b, h, q, k: layout[q // BLOCK, k // BLOCK])

    def pairs(self, batch: int, len_q: int, len_k: int) -> int:
        """Visible (query, key) pairs of one head, over the whole batch."""
        if self.density is None:
            position = torch.arange(len_q) + (len_k - len_q)
            low = torch.zeros_like(position) if self.left is None else (position - self.left).clamp(min=0)
            high = torch.full_like(position, len_k) if self.right is None else (position + self.right + 1)
            ends = [len_k] * batch if self.lengths is None else list(self.lengths)
            return sum(int((high.clamp(max=end) - low).clamp(min=0).sum()) for end in ends)
        entries = range(1 if self.lengths is None else batch)
        seen = sum(int(self.rows(b, 0, len_q, len_q, len_k, "cpu").sum()) for b in entries)
        return seen * (batch if self.lengths is None else 1)
