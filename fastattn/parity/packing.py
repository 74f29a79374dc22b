"""Packed batches under test: a padded batch, called through `fastattn.attention_varlen`.

Inputs and results are padded, so that the rule compares a packed call as it does any other. What lies before the first
sequence and behind the last is NaN, and so are gaps between rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn import functional
from fastattn.biases import Bias, Dense
from fastattn.masks import Mask
from fastattn.masks.lowered import Size
from fastattn.masks.packed import OfEntry
from fastattn.reference.attention import dense_mask


@dataclass
class Packing:
    """Which part of a padded batch is there, and how it is packed.

    lengths_q, lengths_k: per sequence; the padded sizes are the largest of each. outside: rows of NaN before and behind
    the sequences. gap: elements of NaN between rows. longest_given: whether max_seqlen is passed.
    """

    lengths_q: list[int]
    lengths_k: list[int]
    outside: int = 0
    gap: int = 0
    longest_given: bool = True
    stray: list[str] = field(default_factory=list)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """`fastattn.attention` of the padded batch: out (B, Hq, Sq, Dv), zero past each length, and lse, -inf there."""
        bounds = {"max_seqlen_q": q.shape[2], "max_seqlen_k": k.shape[2]} if self.longest_given else {}
        options["return_lse"] = True
        out, lse = functional.attention_varlen(
            self._pack(q, self.lengths_q),
            self._pack(k, self.lengths_k),
            self._pack(v, self.lengths_k),
            self._bounds(self.lengths_q, q.device),
            self._bounds(self.lengths_k, q.device),
            **bounds,
            **options,
        )
        self._look_outside(out, lse)
        there = self._there(self.lengths_q, q.shape[2], q.device)
        count = sum(self.lengths_q)
        rows, sums = (t.narrow(0, self.outside, count) for t in (out, lse.transpose(0, 1)))
        padded = rows.new_zeros(*there.shape, *rows.shape[1:]).index_put((there,), rows)
        lses = sums.new_full((*there.shape, *sums.shape[1:]), -math.inf).index_put((there,), sums)
        return padded.transpose(1, 2), lses.transpose(1, 2)

    def visible(self, mask: Mask | Tensor | None, full: tuple[int, int, int, int], device: torch.device) -> Tensor:
        """bool (B, Hq, Sq, Skv), from the mask's definition for each sequence by itself."""
        batch, heads = full[:2]
        seen = torch.zeros(full, dtype=torch.bool, device=device)
        for b, (own_q, own_k) in enumerate(zip(self.lengths_q, self.lengths_k, strict=True)):
            if isinstance(mask, Mask):
                entry = OfEntry(mask, b, Size(batch, heads, own_q, own_k))
                seen[b, :, :own_q, :own_k] = entry.to_dense(1, heads, own_q, own_k, device)[0]
            else:
                seen[b, :, :own_q, :own_k] = dense_mask(mask, full, device)[b, :, :own_q, :own_k]
        return seen

    def dense_bias(self, bias: Bias, full: tuple[int, int, int, int]) -> Tensor:
        """The bias expanded to `full`, by each sequence's own lengths; differentiable."""
        if isinstance(bias, Dense):
            return bias.to_dense(*full)
        batch, heads, len_q, len_k = full
        parts = []
        for b, (own_q, own_k) in enumerate(zip(self.lengths_q, self.lengths_k, strict=True)):
            part = bias.to_dense(batch, heads, own_q, own_k)[b]
            parts.append(torch.nn.functional.pad(part, (0, len_k - own_k, 0, len_q - own_q)))
        return torch.stack(parts)

    def _pack(self, padded: Tensor, lengths: list[int]) -> Tensor:
        rows = padded.transpose(1, 2)[self._there(lengths, padded.shape[2], padded.device)]
        outside = rows.new_full((self.outside, *rows.shape[1:]), math.nan)
        packed = torch.cat([outside, rows, outside])
        if not self.gap:
            return packed
        return torch.nn.functional.pad(packed, (0, self.gap), value=math.nan)[..., : padded.shape[3]]

    def _bounds(self, lengths: list[int], device: torch.device) -> Tensor:
        ends = torch.tensor([0, *lengths]).cumsum(0) + self.outside
        return ends.to(torch.int32).to(device)

    @staticmethod
    def _there(lengths: list[int], longest: int, device: torch.device) -> Tensor:
        return torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]

    def _look_outside(self, out: Tensor, lse: Tensor) -> None:
        for rows in (slice(0, self.outside), slice(out.shape[0] - self.outside, None)):
            if not bool((out[rows] == 0).all() and (lse[:, rows] == -math.inf).all()):
                self.stray.append("rows of no sequence are not 0 and -inf")
