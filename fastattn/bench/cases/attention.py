"""Attention and decode cases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fastattn.bench.cases.base import OpCase, Work, generator, itemsize
from fastattn.bench.cases.visible import Visible
from fastattn.bench.truth import Expected, attention_truth

T5_BUCKETS, T5_MAX_DISTANCE = 32, 128


def t5_buckets(distance: Tensor) -> Tensor:
    """The bucket of T5's bidirectional relative bias for each distance, key position - query position.

    Half of the buckets are for keys behind the query. Of each half, the first half are single distances, the others
    widen by equal factors up to T5_MAX_DISTANCE (Raffel et al. 2020, https://arxiv.org/abs/1910.10683).
    """
    half = T5_BUCKETS // 2
    exact = half // 2
    size = distance.abs()
    ratio = torch.log(size.clamp(min=1).float() / exact) / math.log(T5_MAX_DISTANCE / exact)
    wide = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(size < exact, size, wide) + half * (distance > 0)


@dataclass(frozen=True, kw_only=True)
class AttentionCase(OpCase):
    """softmax(scale q k^T + bias, masked) v.

    t5_bias: a bias from a table (T5_BUCKETS, heads) of learned numbers, one per distance bucket; with scale 1, as in
    T5. The inputs lie as models make them: (B, S, H, D) in memory, transposed.
    """

    suite: ClassVar[str] = "attention"
    outputs: ClassVar[tuple[str, ...]] = ("out",)

    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    len_k: int
    dim: int
    visible: Visible = field(default_factory=Visible)
    t5_bias: bool = False

    @property
    def scale(self) -> float:
        return 1.0 if self.t5_bias else 1.0 / math.sqrt(self.dim)

    @property
    def score_bytes(self) -> int:
        """The size of one matrix of scores, what implementations that write it down need several of."""
        return self.batch * self.heads_q * self.len_q * self.len_k * itemsize(self.dtype)

    def parameters(self) -> dict[str, object]:
        named = ("batch", "heads_q", "heads_kv", "len_q", "len_k", "dim", "t5_bias")
        pairs = self.visible.pairs(self.batch, self.len_q, self.len_k)
        density = pairs / (self.batch * self.len_q * self.len_k)
        return {**{n: getattr(self, n) for n in named}, "visible": self.visible.describe(), "density": density}

    def work(self, direction: str) -> Work:
        """A matrix product of n x m visible pairs over D counts 2 n m D: 2 products forward, 5 backward."""
        pairs = self.visible.pairs(self.batch, self.len_q, self.len_k) * self.heads_q
        forward, backward = 4.0 * pairs * self.dim, 10.0 * pairs * self.dim
        q = self.batch * self.heads_q * self.len_q * self.dim * itemsize(self.dtype)
        keys = self._visible_keys() * self.heads_kv * self.dim * itemsize(self.dtype)
        read_once, read_again = 2 * q + 2 * keys, 4 * q + 4 * keys
        flops = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
        moved = {"forward": read_once, "backward": read_again, "both": read_once + read_again}[direction]
        return Work(flops, moved, self.counted)

    @property
    def counted(self) -> str:
        return "FLOP"

    def _visible_keys(self) -> int:
        return sum(self.visible.lengths) if self.visible.lengths is not None else self.batch * self.len_k

    def tensors(self) -> dict[str, Tensor]:
        random = generator()

        def draw(heads: int, length: int, spread: float = 1.0) -> Tensor:
            shape = (self.batch, length, heads, self.dim)
            return (torch.randn(shape, generator=random) * spread).to(self.device, self.dtype).transpose(1, 2)

        # With scale 1, T5 keeps its scores small by small weights.
        q = draw(self.heads_q, self.len_q, self.dim**-0.5 if self.t5_bias else 1.0)
        found = {"q": q, "k": draw(self.heads_kv, self.len_k), "v": draw(self.heads_kv, self.len_k)}
        if self.t5_bias:
            table = torch.randn(T5_BUCKETS, self.heads_q, generator=random)
            found["table"] = table.to(self.device, self.dtype)
        return found

    def leaves(self) -> tuple[str, ...]:
        return ("q", "k", "v", "table") if self.t5_bias else ("q", "k", "v")

    def output_gradients(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        shape = (self.batch, self.len_q, self.heads_q, self.dim)
        grad = torch.randn(shape, generator=generator().manual_seed(1)).to(self.device, self.dtype)
        return (grad.transpose(1, 2),)

    def buckets(self) -> Tensor:
        """The T5 bucket of each (query, key), int64 (len_q, len_k)."""
        query = torch.arange(self.len_q, device=self.device).view(-1, 1) + (self.len_k - self.len_q)
        return t5_buckets(torch.arange(self.len_k, device=self.device) - query)

    def expected(self, tensors: Mapping[str, Tensor], grads: tuple[Tensor, ...], *, backward: bool) -> list[Expected]:
        return attention_truth(self, tensors, grads[0] if backward else None)


@dataclass(frozen=True, kw_only=True)
class DecodeCase(AttentionCase):
    """One new token per sequence against a key-value cache; bound by reading the cache, (B, H, S, D) in memory as the
    caches of transformers are."""

    suite: ClassVar[str] = "decode"

    directions: tuple[str, ...] = ("forward",)
    compiled: tuple[str, ...] = ()

    @property
    def counted(self) -> str:
        return "B"

    def tensors(self) -> dict[str, Tensor]:
        found = super().tensors()
        return {**found, "k": found["k"].contiguous(), "v": found["v"].contiguous()}
