"""What torch compiles: the formula under torch.compile, and FlexAttention."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn.bench.cases.attention import AttentionCase
from fastattn.bench.cases.base import Case, OpCase
from fastattn.bench.cases.visible import BLOCK
from fastattn.bench.providers.base import Provider, Run
from fastattn.bench.providers.formulas import formula
from fastattn.bench.providers.torch_eager import scores_do_not_fit


def compile_fresh(run: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile for these shapes only. Buffers are not donated, so that a kept graph can be run backward again."""
    from torch._functorch import config

    config.donated_buffer = False
    return torch.compile(run, dynamic=False, **options)


def no_compiler(device: str) -> str | None:
    """Why torch.compile cannot work here, or None."""
    if device == "cpu" and shutil.which("g++") is None and shutil.which("c++") is None:
        return "torch.compile needs a C++ compiler, and there is none"
    return None


class Compiled(Provider):
    """The formula under torch.compile, which fuses it and may put SDPA in its place."""

    name = "torch.compile"
    suites = frozenset({"attention", "norm", "ffn"})
    compiles = True

    def unavailable_reason(self, device: str) -> str | None:
        return no_compiler(device)

    def refuses(self, case: Case, direction: str) -> str | None:
        return scores_do_not_fit(case, direction)

    def prepare(self, case: OpCase, tensors: Mapping[str, Tensor]) -> Run:
        run, arguments = formula(case, tensors)
        compiled = compile_fresh(run)
        return lambda: compiled(*arguments)


_BLOCK = 128  # FlexAttention's own choice


class Flex(Provider):
    """FlexAttention, compiled. Its block mask is made once, outside the timing, as for many layers."""

    name = "FlexAttention (compiled)"
    suites = frozenset({"attention"})
    compiles = True

    def unavailable_reason(self, device: str) -> str | None:
        return no_compiler(device)

    def refuses(self, case: Case, direction: str) -> str | None:
        if case.device == "cpu" and direction != "forward":
            return "FlexAttention has no backward on CPUs"
        return None

    def prepare(self, case: OpCase, tensors: Mapping[str, Tensor]) -> Run:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        assert isinstance(case, AttentionCase)
        block_mask = None
        if not case.visible.everything:
            entries = None if case.visible.lengths is None else case.batch
            rule, lengths = self._rule(case), (case.len_q, case.len_k)
            # Of the mask's own blocks where it is made of blocks: in larger ones few are empty, and none is full.
            block = _BLOCK if case.visible.density is None else BLOCK
            block_mask = create_block_mask(rule, entries, None, *lengths, device=case.device, BLOCK_SIZE=block)
        score = self._bias(case, tensors["table"]) if case.t5_bias else None
        options = {
            "score_mod": score,
            "block_mask": block_mask,
            "scale": case.scale,
            "enable_gqa": case.heads_q != case.heads_kv,
        }
        q, k, v = (tensors[n] for n in "qkv")
        compiled = compile_fresh(functools.partial(flex_attention, **options))
        return lambda: (compiled(q, k, v),)

    @staticmethod
    def _rule(case: AttentionCase) -> Callable[..., Tensor]:
        shift, seen = case.len_k - case.len_q, case.visible
        lengths = None if seen.lengths is None else torch.tensor(seen.lengths, device=case.device)
        layout = None if seen.density is None else seen.layout(case.len_q, case.len_k).to(case.device)

        def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            kept = j >= 0
            if seen.left is not None:
                kept = kept & (j >= i + shift - seen.left)
            if seen.right is not None:
                kept = kept & (j <= i + shift + seen.right)
            if lengths is not None:
                kept = kept & (j < lengths[b])
            if layout is not None:
                kept = kept & layout[i // BLOCK, j // BLOCK]
            return kept

        return rule

    @staticmethod
    def _bias(case: AttentionCase, table: Tensor) -> Callable[..., Tensor]:
        buckets = case.buckets()
        return lambda score, b, h, i, j: score + table[buckets[i, j], h]
