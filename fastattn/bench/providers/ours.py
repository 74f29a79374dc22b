"""fastattn's own backends, each by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.bench.cases.attention import T5_MAX_DISTANCE, AttentionCase
from fastattn.bench.cases.base import Case, OpCase, itemsize
from fastattn.bench.cases.ffn import FfnCase
from fastattn.bench.cases.norm import NormCase
from fastattn.bench.providers.base import Inputs, Job, Provider, Run
from fastattn.bench.providers.torch_eager import scores_do_not_fit
from fastattn.biases import T5Bias
from fastattn.dispatch import ORDER

_SLOW_SCORES = 2**26


class Ours(Provider):
    """The public functions with backend= set. A refusal is raised as NotSupported by the call itself."""

    suites = frozenset({"attention", "decode", "norm", "ffn"})
    ours = True

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.name = f"fastattn {backend}"

    def unavailable_reason(self, device: str) -> str | None:
        reason = fastattn.backends()[self.backend]
        if reason is None and self.backend not in ORDER[device]:
            return f"the {self.backend} backend is not for {device} tensors"
        return reason

    def refuses(self, case: Case, direction: str) -> str | None:
        if self.backend != "reference" or not isinstance(case, AttentionCase):
            return None
        wide = 4 // itemsize(case.dtype)  # it computes in float32
        return scores_do_not_fit(case, direction, wide, slow=_SLOW_SCORES)

    def prepare(self, case: OpCase, tensors: Mapping[str, Tensor]) -> Run:
        if isinstance(case, AttentionCase):
            return self._attention(case, tensors)
        if isinstance(case, NormCase):
            return self._norm(case, tensors)
        assert isinstance(case, FfnCase)
        return self._ffn(case, tensors)

    def note(self, case: Case) -> str:
        if isinstance(case, AttentionCase) and case.t5_bias:
            return "bias given as biases.T5Bias"
        if isinstance(case, AttentionCase) and case.visible.density is not None:
            return "blocks given as masks.Predicate"
        return ""

    def _attention(self, case: AttentionCase, tensors: Mapping[str, Tensor]) -> Run:
        q, k, v = (tensors[n] for n in "qkv")
        options: dict[str, Any] = {
            "mask": case.visible.mask(case.len_q, case.len_k, case.device),
            "scale": case.scale,
            "backend": self.backend,
        }
        if case.t5_bias:
            options["bias"] = T5Bias(tensors["table"], bidirectional=True, max_distance=T5_MAX_DISTANCE)
        return lambda: (fastattn.attention(q, k, v, **options),)

    def _norm(self, case: NormCase, tensors: Mapping[str, Tensor]) -> Run:
        x, weight, bias, residual = (tensors.get(n) for n in ("x", "weight", "bias", "residual"))
        assert x is not None
        options: dict[str, Any] = {"residual": residual, "return_residual": case.residual, "backend": self.backend}

        def run() -> tuple[Tensor, ...]:
            if case.kind == "layer":
                found: Any = fastattn.layer_norm(x, weight, bias, case.eps, **options)
            else:
                found = fastattn.rms_norm(x, weight, case.eps, **options)
            return found if case.residual else (found,)

        return run

    def _ffn(self, case: FfnCase, tensors: Mapping[str, Tensor]) -> Run:
        t = tensors
        options: dict[str, Any] = {"activation": case.activation, "backend": self.backend}
        if case.gated:
            return lambda: (fastattn.gated_ffn(t["x"], t["w_gate"], t["w_up"], t["w_down"], **options),)
        return lambda: (fastattn.ffn(t["x"], t["w1"], t.get("b1"), t["w2"], t.get("b2"), **options),)


class OurHopper(Ours):
    """The CUDA backend with its kernels for Hopper, which have to be asked for."""

    suites = frozenset({"attention"})

    def __init__(self) -> None:
        super().__init__("cuda")
        self.name = "fastattn cuda sm90"

    def unavailable_reason(self, device: str) -> str | None:
        from fastattn.backends.cuda import library

        return super().unavailable_reason(device) or library.kernels_reason("sm90", library.devices())

    def refuses(self, case: Case, direction: str) -> str | None:
        if isinstance(case, AttentionCase) and case.dim > 128:
            return "head dims above 128 have no kernel for Hopper"
        return super().refuses(case, direction)

    def job(self, case: OpCase, direction: str, inputs: Inputs) -> Job:
        """Forward and backward each ask which kernels are chosen when they run."""
        from fastattn.backends.cuda import library

        with library.use_kernels("sm90"):
            job = super().job(case, direction, inputs)

        def on_hopper() -> tuple[Tensor, ...]:
            with library.use_kernels("sm90"):
                return job.call()

        return replace(job, call=on_hopper)


class OurDecode(Provider):
    """fastattn.attention_decode."""

    suites = frozenset({"decode"})
    ours = True

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.name = f"fastattn {backend} attention_decode"

    def unavailable_reason(self, device: str) -> str | None:
        return Ours(self.backend).unavailable_reason(device)

    def prepare(self, case: OpCase, tensors: Mapping[str, Tensor]) -> Run:
        assert isinstance(case, AttentionCase)
        q, k, v = (tensors[n] for n in "qkv")
        ends = case.visible.lengths or (case.len_k,) * case.batch
        lengths = torch.tensor(ends, dtype=torch.int32, device=case.device)
        options: dict[str, Any] = {"scale": case.scale, "backend": self.backend}
        return lambda: (fastattn.attention_decode(q, k, v, lengths, **options),)
