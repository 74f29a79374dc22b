"""Packed batches: fastattn.attention_varlen, and what torch has for sequences of different lengths."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.bench.cases.base import Case, OpCase
from fastattn.bench.cases.packed import PackedCase
from fastattn.bench.cases.visible import Visible
from fastattn.bench.providers.base import Inputs, Job, Provider, Run
from fastattn.bench.providers.compiled import Flex, compile_fresh
from fastattn.bench.providers.ours import Ours
from fastattn.bench.providers.peers import FlashAttention3
from fastattn.bench.providers.torch_eager import Sdpa
from fastattn.masks import Causal

_SUITE = frozenset({"packed"})


class OurPacked(Ours):
    """fastattn.attention_varlen."""

    suites = _SUITE

    def __init__(self, backend: str) -> None:
        super().__init__(backend)
        self.name = f"fastattn {backend} attention_varlen"

    def refuses(self, case: Case, direction: str) -> str | None:
        assert isinstance(case, PackedCase)
        return super().refuses(case.padded(), direction)

    def prepare(self, case: OpCase, tensors: Mapping[str, Tensor]) -> Run:
        assert isinstance(case, PackedCase)
        bounds, longest = case.cu_seqlens(), max(case.lengths)
        options: dict[str, Any] = {"mask": Causal() if case.causal else None, "backend": self.backend}
        q, k, v = (tensors[n] for n in "qkv")
        return lambda: (
            fastattn.attention_varlen(
                q, k, v, bounds, bounds, max_seqlen_q=longest, max_seqlen_k=longest, scale=case.scale, **options
            ),
        )


class PaddedSdpa(Sdpa):
    """SDPA on the batch padded to its longest sequence, with a mask; that the batch is padded is not timed."""

    suites = _SUITE

    def __init__(self, backend: str, name: str) -> None:
        super().__init__(backend, name)
        self.name += ", padded"

    def refuses(self, case: Case, direction: str) -> str | None:
        assert isinstance(case, PackedCase)
        return super().refuses(case.padded(), direction)

    def job(self, case: OpCase, direction: str, inputs: Inputs) -> Job:
        assert isinstance(case, PackedCase)
        tensors = {n: case.pad(t) for n, t in inputs.tensors.items()}
        padded = Inputs(tensors, tuple(case.pad(grad) for grad in inputs.grads))
        made = super().job(case.padded(), direction, padded)
        return replace(made, verify=lambda: tuple(case.unpad(found) for found in made.call()))


class NestedSdpa(Provider):
    """SDPA on nested tensors of the jagged layout; torch chooses its backend."""

    name = "torch sdpa, nested"
    suites = _SUITE

    def prepare(self, case: OpCase, tensors: Mapping[str, Tensor]) -> Run:
        assert isinstance(case, PackedCase)
        bounds = case.cu_seqlens().long()
        shortest, longest = min(case.lengths), max(case.lengths)
        grouped = case.heads_q != case.heads_kv

        def nested(packed: Tensor) -> Tensor:
            made: Tensor = torch.nested.nested_tensor_from_jagged(
                packed, bounds, min_seqlen=shortest, max_seqlen=longest
            )
            return made.transpose(1, 2)

        def run() -> tuple[Tensor, ...]:
            Sdpa.any()
            q, k, v = (nested(tensors[n]) for n in "qkv")
            out = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, scale=case.scale, enable_gqa=grouped)
            return (out.transpose(1, 2).values(),)

        return run


class PackedFlex(Flex):
    """FlexAttention over all tokens, with a block mask that keeps each query in its sequence."""

    suites = _SUITE

    def prepare(self, case: OpCase, tensors: Mapping[str, Tensor]) -> Run:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        assert isinstance(case, PackedCase)
        lengths = torch.tensor(case.lengths, device=case.device)
        owner = torch.repeat_interleave(torch.arange(len(case.lengths), device=case.device), lengths)

        def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            kept = owner[i] == owner[j]
            return kept & (j <= i) if case.causal else kept

        tokens = sum(case.lengths)
        block_mask = create_block_mask(rule, None, None, tokens, tokens, device=case.device)
        options = {"block_mask": block_mask, "scale": case.scale, "enable_gqa": case.heads_q != case.heads_kv}
        compiled = compile_fresh(functools.partial(flex_attention, **options))
        q, k, v = (tensors[n].transpose(0, 1)[None] for n in "qkv")
        return lambda: (compiled(q, k, v)[0].transpose(0, 1),)


class PackedFlashAttention3(FlashAttention3):
    """FlashAttention-3's own function for packed batches."""

    suites = _SUITE

    def refuses(self, case: Case, direction: str) -> str | None:
        assert isinstance(case, PackedCase)
        return super().refuses(replace(case.padded(), visible=Visible(right=0 if case.causal else None)), direction)

    def prepare(self, case: OpCase, tensors: Mapping[str, Tensor]) -> Run:
        assert isinstance(case, PackedCase)
        varlen: Any = self.module().flash_attn_varlen_func
        bounds, longest = case.cu_seqlens(), max(case.lengths)
        options: dict[str, Any] = {"softmax_scale": case.scale, "causal": case.causal}
        q, k, v = (tensors[n] for n in "qkv")

        def run() -> tuple[Tensor, ...]:
            found = varlen(q, k, v, bounds, bounds, longest, longest, **options)
            return (found[0] if isinstance(found, tuple) else found,)

        return run
