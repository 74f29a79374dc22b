"""Cases of packed batches: sequences of different lengths one behind the other, without padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fastattn.bench.cases.attention import AttentionCase
from fastattn.bench.cases.base import OpCase, Work, generator, itemsize
from fastattn.bench.cases.visible import Visible
from fastattn.bench.truth import Expected, attention_truth


@dataclass(frozen=True, kw_only=True)
class PackedCase(OpCase):
    """Attention within each sequence of (tokens, H, D) tensors. lengths: of the sequences. causal: no later keys."""

    suite: ClassVar[str] = "packed"
    outputs: ClassVar[tuple[str, ...]] = ("out",)

    heads_q: int
    heads_kv: int
    lengths: tuple[int, ...]
    dim: int
    causal: bool = False

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.dim)

    @property
    def bounds(self) -> list[int]:
        """Where the sequences begin, and behind them where the last one ends."""
        return [sum(self.lengths[:number]) for number in range(len(self.lengths) + 1)]

    def cu_seqlens(self) -> Tensor:
        return torch.tensor(self.bounds, dtype=torch.int32, device=self.device)

    def padded(self) -> AttentionCase:
        """The same as a batch padded to the longest sequence."""
        longest = max(self.lengths)
        return AttentionCase(
            name=self.name,
            group=self.group,
            device=self.device,
            dtype=self.dtype,
            batch=len(self.lengths),
            heads_q=self.heads_q,
            heads_kv=self.heads_kv,
            len_q=longest,
            len_k=longest,
            dim=self.dim,
            visible=Visible(right=0 if self.causal else None, lengths=self.lengths),
        )

    def pad(self, packed: Tensor) -> Tensor:
        """(B, H, longest, D) from (tokens, H, D), (B, longest, H, D) in memory, zeros behind each sequence."""
        parts = packed.detach().split(list(self.lengths))
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).transpose(1, 2)

    def unpad(self, padded: Tensor) -> Tensor:
        """The inverse."""
        rows = padded.transpose(1, 2)
        return torch.cat([row[:length] for row, length in zip(rows, self.lengths, strict=True)])

    def parameters(self) -> dict[str, object]:
        named = ("heads_q", "heads_kv", "dim", "causal")
        padding = 1 - sum(self.lengths) / (len(self.lengths) * max(self.lengths))
        return {**{n: getattr(self, n) for n in named}, "lengths": list(self.lengths), "padding": padding}

    def work(self, direction: str) -> Work:
        """As of the padded batch, counted on what is visible and on tokens that are there."""
        pairs = sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)
        flops = {"forward": 4.0, "backward": 10.0, "both": 14.0}[direction] * pairs * self.heads_q * self.dim
        row = (self.heads_q + self.heads_kv) * self.dim * itemsize(self.dtype)
        passes = {"forward": 2.0, "backward": 4.0, "both": 6.0}[direction]
        return Work(flops, passes * sum(self.lengths) * row, "FLOP")

    def tensors(self) -> dict[str, Tensor]:
        random, tokens = generator(), sum(self.lengths)
        shapes = {n: (tokens, self.heads_q if n == "q" else self.heads_kv, self.dim) for n in "qkv"}
        return {n: torch.randn(s, generator=random).to(self.device, self.dtype) for n, s in shapes.items()}

    def leaves(self) -> tuple[str, ...]:
        return ("q", "k", "v")

    def output_gradients(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        grad = torch.randn(tensors["q"].shape, generator=generator().manual_seed(1))
        return (grad.to(self.device, self.dtype),)

    def expected(self, tensors: Mapping[str, Tensor], grads: tuple[Tensor, ...], *, backward: bool) -> list[Expected]:
        """The truths of the last sequence, which is a batch of one."""
        own = slice(*self.bounds[-2:])
        length = self.lengths[-1]
        seen = Visible(right=0 if self.causal else None)
        alone = replace(self.padded(), batch=1, len_q=length, len_k=length, visible=seen)

        def batch_of_one(packed: Tensor) -> Tensor:
            return packed[own].transpose(0, 1)[None]

        def picks(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda found: inner(batch_of_one(found))

        grad = batch_of_one(grads[0]) if backward else None
        found = attention_truth(alone, {n: batch_of_one(t) for n, t in tensors.items()}, grad)
        return [replace(one, pick=picks(one.pick)) for one in found]
