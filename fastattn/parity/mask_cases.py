"""Random masks: every named one, and their combinations by and, or, not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import masks
from fastattn.masks import Mask
from fastattn.parity.draw import Draw

_ALIGNMENTS = ("bottom-right", "top-left")


@dataclass(frozen=True)
class Residues:
    """A rule for `Predicate` that no interval describes: a linear form of the indices, modulo `modulus`."""

    batch: int
    head: int
    query: int
    key: int
    modulus: int
    below: int

    def __call__(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        form = self.query * q + self.key * k
        if self.batch:
            form = form + self.batch * b
        if self.head:
            form = form + self.head * h
        return form % self.modulus < self.below


class MaskDraw:
    """Draws masks for calls of one shape."""

    NAMES = (
        "band",
        "lengths",
        "range",
        "key_mask",
        "document",
        "prefix",
        "global_tokens",
        "sink_tokens",
        "dilated",
        "strided",
        "bigbird",
        "longformer",
        "dense",
        "predicate",
        "per_head",
    )

    def __init__(self, draw: Draw, batch: int, heads: int, len_q: int, len_k: int) -> None:
        self.draw = draw
        self.batch, self.heads, self.len_q, self.len_k = batch, heads, len_q, len_k

    def named(self) -> Mask:
        """One of the named masks; all as likely."""
        return getattr(self, self.draw.one_of(self.NAMES))()

    def combination(self, depth: int = 2) -> Mask:
        """And, or, not of named masks, nested at most so deep."""
        if depth == 0:
            return self.named()
        kind = self.draw.one_of(("and", "or", "not", "named"), (4, 4, 2, 1))
        if kind == "named":
            return self.named()
        if kind == "not":
            return ~self.combination(depth - 1)
        first, second = self.combination(depth - 1), self.combination(depth - 1)
        return first & second if kind == "and" else first | second

    def band(self) -> Mask:
        align = self.draw.one_of(_ALIGNMENTS)
        if self.draw.chance(0.5):
            return masks.Causal(align)
        most = max(1, self.len_k // 2)
        reach = [None if self.draw.chance(0.25) else self.draw.integer(0, most) for _ in range(2)]
        return masks.SlidingWindow(*reach, align)

    def keys(self) -> Mask:
        """A mask over the keys alone."""
        return getattr(self, self.draw.one_of(("lengths", "range", "key_mask")))()

    def lengths(self) -> Mask:
        return masks.KeyLengths(self._positions(0, self.len_k + 2))

    def range(self) -> Mask:
        return masks.KeyRange(self._positions(0, self.len_k // 2), self._positions(0, self.len_k))

    def key_mask(self) -> Mask:
        rows = self.batch if self.draw.chance(0.8) else 1
        return masks.KeyMask(self.draw.bits((rows, self.len_k), self.draw.one_of((0.7, 0.1))))

    def document(self) -> Mask:
        if self.len_q == self.len_k and self.draw.chance(0.5):
            return masks.Document(self._ids(self.len_q).sort(dim=-1).values)
        if self.draw.chance(0.3):
            return masks.Document(self._ids(self.len_q), self._ids(self.len_k), contiguous=False)
        descending = self.draw.chance(0.5)
        return masks.Document(self._ids(self.len_q), self._ids(self.len_k).sort(dim=-1, descending=descending).values)

    def prefix(self) -> Mask:
        return masks.PrefixLM(self._count(self.len_k), self.draw.one_of(_ALIGNMENTS))

    def global_tokens(self) -> Mask:
        return masks.GlobalTokens(self._count(5), self.draw.one_of(_ALIGNMENTS))

    def sink_tokens(self) -> Mask:
        return masks.SinkTokens(self._count(5))

    def dilated(self) -> Mask:
        window, dilation = self.draw.integer(0, 8), self.draw.one_of((1, 2, 3, 16, 70))
        return masks.Dilated(window, dilation, self.draw.one_of(_ALIGNMENTS))

    def strided(self) -> Mask:
        return masks.Strided(self.draw.one_of((1, 2, 7, 32, 64, 130)), self.draw.one_of(_ALIGNMENTS))

    def bigbird(self) -> Mask:
        block, window = self.draw.one_of((8, 16, 32, 64, 100)), self.draw.one_of((1, 3, 5), (2, 2, 1))
        numbers = (self.draw.integer(0, 2), self.draw.integer(0, 4), self.draw.integer(0, 99))
        return masks.BigBird(block, window, *numbers, self.draw.one_of(_ALIGNMENTS))

    def longformer(self) -> Mask:
        window, tokens = self.draw.integer(0, max(2, self.len_k // 2)), self.draw.integer(0, 5)
        return masks.Longformer(window, tokens, self.draw.one_of(_ALIGNMENTS))

    def dense(self) -> Mask:
        full = (self.batch, self.heads, self.len_q, self.len_k)
        shape = [n if self.draw.chance(0.6) else 1 for n in full[:3]] + [self.len_k if self.draw.chance(0.9) else 1]
        return masks.Dense(self.draw.bits(shape[self.draw.one_of((0, 1, 2), (6, 1, 1)) :], 0.6))

    def predicate(self) -> Mask:
        modulus = self.draw.integer(2, 7)
        several = [self.draw.integer(0, modulus) if self.draw.chance(0.4) else 0 for _ in range(2)]
        forms = [self.draw.integer(0, modulus) for _ in range(2)]
        return masks.Predicate(Residues(*several, *forms, modulus, self.draw.integer(1, modulus - 1)))

    def per_head(self) -> Mask:
        """Few different masks, so that some heads share one; one in three has blocks."""
        names = ("band", "prefix", "longformer") if self.draw.chance(0.67) else ("strided", "bigbird", "lengths")
        choices = [getattr(self, self.draw.one_of(names))() for _ in range(3)]
        return masks.PerHead([self.draw.one_of(choices) for _ in range(self.heads)])

    def _positions(self, low: int, high: int) -> Tensor:
        draw = self.draw
        numbers = [draw.one_of((draw.integer(low, high), 0, self.len_k), (6, 1, 1)) for _ in range(self.batch)]
        return torch.tensor(numbers, dtype=torch.int32, device=self.draw.device)

    def _count(self, most: int) -> int | Tensor:
        """A number of tokens for all, or one per batch entry."""
        return self._positions(0, most) if self.draw.chance(0.4) else self.draw.integer(0, most)

    def _ids(self, length: int) -> Tensor:
        shape = (length,) if self.draw.chance(0.3) else (self.draw.one_of((1, self.batch)), length)
        return torch.randint(0, self.draw.integer(1, 5), shape, generator=self.draw.generator).to(self.draw.device)
