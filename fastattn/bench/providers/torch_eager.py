"""torch itself, uncompiled: the formula written out, its norm functions, and each SDPA backend by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.bench.cases.attention import AttentionCase
from fastattn.bench.cases.base import Case, OpCase
from fastattn.bench.cases.norm import NormCase
from fastattn.bench.providers.base import Provider, Run, too_large
from fastattn.bench.providers.formulas import formula, gathered_bias, torch_norm

_SCORE_MATRICES = {"forward": 3, "backward": 5, "both": 5}
_SLOW_SCORES = 2**29


def scores_do_not_fit(case: Case, direction: str, widened: int = 1, slow: int = _SLOW_SCORES) -> str | None:
    """Why matrices of scores are not written down, for implementations that do. widened: the bytes of an element in
    them, over those of an input's. slow: the bytes of one above which it takes a CPU too long."""
    if not isinstance(case, AttentionCase):
        return None
    if case.device == "cpu" and case.score_bytes > slow:
        return f"left out: it writes down {case.score_bytes / 1e9:.1f} GB of scores, for seconds"
    wanted = _SCORE_MATRICES[direction] * widened * case.score_bytes
    return too_large(wanted, "its matrices of scores", case.device)


class Eager(Provider):
    """The formula, operation by operation."""

    name = "torch eager"
    suites = frozenset({"attention", "decode", "norm", "ffn"})

    def refuses(self, case: Case, direction: str) -> str | None:
        return scores_do_not_fit(case, direction)

    def prepare(self, case: OpCase, tensors: Mapping[str, Tensor]) -> Run:
        run, arguments = formula(case, tensors)
        return lambda: run(*arguments)


class TorchNorm(Provider):
    """F.layer_norm and F.rms_norm."""

    name = "torch F.norm"
    suites = frozenset({"norm"})

    def prepare(self, case: OpCase, tensors: Mapping[str, Tensor]) -> Run:
        assert isinstance(case, NormCase)
        run, arguments = torch_norm(case), tuple(tensors[n] for n in case.leaves())
        return lambda: run(*arguments)


class Sdpa(Provider):
    """torch's scaled_dot_product_attention held to one of its backends.

    The switches are set before every call and cost well under a microsecond; every provider that calls SDPA sets them.
    """

    suites = frozenset({"attention", "decode"})
    _SWITCHES = ("math", "flash", "mem_efficient", "cudnn")

    def __init__(self, backend: str, name: str) -> None:
        self.backend = backend
        self.name = f"torch sdpa {name}"

    def unavailable_reason(self, device: str) -> str | None:
        if device == "cpu" and self.backend in ("mem_efficient", "cudnn"):
            return "torch has it for GPUs only"
        return None

    def refuses(self, case: Case, direction: str) -> str | None:
        return scores_do_not_fit(case, direction) if self.backend == "math" else None

    def only(self) -> None:
        """Leaves SDPA no choice but this backend."""
        for name in self._SWITCHES:
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(name == self.backend)

    @classmethod
    def any(cls) -> None:
        """Gives SDPA its choice back."""
        for name in cls._SWITCHES:
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(True)

    def prepare(self, case: OpCase, tensors: Mapping[str, Tensor]) -> Run:
        assert isinstance(case, AttentionCase)
        q, k, v = (tensors[n] for n in "qkv")
        buckets = case.buckets() if case.t5_bias else None
        causal = case.visible.causal_only and case.len_q == case.len_k
        mask = None if causal else case.visible.dense(case.batch, case.len_q, case.len_k, case.device)
        if mask is not None:
            mask = mask.expand(-1, -1, case.len_q, -1)
        grouped, scale = case.heads_q != case.heads_kv, case.scale
        if buckets is not None and not tensors["table"].requires_grad:  # T5 gathers it once for all layers
            mask, buckets = gathered_bias(tensors["table"], buckets).contiguous(), None

        def run() -> tuple[Tensor, ...]:
            self.only()
            # With keys next to one another, as SDPA's kernels for GPUs want a mask.
            added = mask if buckets is None else gathered_bias(tensors["table"], buckets).contiguous()
            return (
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=added, is_causal=causal, scale=scale, enable_gqa=grouped
                ),
            )

        self._try(run)
        return run

    @staticmethod
    def _try(run: Run) -> None:
        """Runs it once; RuntimeError with what torch warned of, which says more than its error does."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                run()
            except RuntimeError as error:
                reasons = [str(w.message).split(" (Triggered")[0].strip() for w in said]
                said_why = [r for r in reasons if not r.endswith("because:") and "has been runtime disabled" not in r]
                raise RuntimeError("; ".join(dict.fromkeys(said_why)) or str(error)) from None
