"""Kernels of other projects, used where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.bench.cases.attention import AttentionCase
from fastattn.bench.cases.base import Case, OpCase, dtype_name
from fastattn.bench.cases.ffn import FfnCase
from fastattn.bench.cases.norm import NormCase
from fastattn.bench.providers.base import Provider, Run


def _first_installed(*modules: str) -> str | None:
    return next((name for name in modules if importlib.util.find_spec(name) is not None), None)


class FlashAttention3(Provider):
    """FlashAttention-3 for Hopper: the package fa3-fwd (forward only), or flash_attn_interface built from source."""

    name = "FlashAttention-3"
    package = "fa3-fwd"
    suites = frozenset({"attention", "decode"})
    _MODULES = ("flash_attn_interface", "fa3_fwd_interface")

    def unavailable_reason(self, device: str) -> str | None:
        if device != "cuda":
            return "it runs on GPUs only"
        if _first_installed(*self._MODULES) is None:
            return "neither fa3-fwd nor flash_attn_interface is installed"
        if torch.cuda.get_device_capability()[0] != 9:
            return "it is for compute capability 9 (Hopper)"
        return None

    def refuses(self, case: Case, direction: str) -> str | None:
        assert isinstance(case, AttentionCase)
        if case.dtype not in (torch.bfloat16, torch.float16):
            return f"it takes bfloat16 and float16, not {dtype_name(case.dtype)}"
        if case.t5_bias:
            return "it takes no bias"
        if case.visible.density is not None:
            return "it takes no block masks"
        if case.visible.lengths is not None and case.suite != "decode":
            return "it takes no key padding mask"
        return self._left_out(case, direction)

    def _left_out(self, case: AttentionCase, direction: str) -> str | None:
        """What the installed build was made without, as its own list of flags says."""
        if _first_installed(*self._MODULES) != "fa3_fwd_interface":
            return None
        flags: dict[str, bool] = importlib.import_module("fa3_fwd_config").CONFIG["build_flags"]
        needs = {
            "FLASHATTENTION_DISABLE_BACKWARD": direction != "forward",
            "FLASHATTENTION_DISABLE_LOCAL": case.visible.left is not None,
            "FLASHATTENTION_DISABLE_FP16": case.dtype == torch.float16,
        }
        missing = [flag for flag, needed in needs.items() if needed and flags.get(flag)]
        return f"this build of fa3-fwd has {missing[0]}" if missing else None

    def prepare(self, case: OpCase, tensors: Mapping[str, Tensor]) -> Run:
        assert isinstance(case, AttentionCase)
        module = self.module()
        q, k, v = (tensors[n].transpose(1, 2) for n in "qkv")
        causal = case.visible.left is None and case.visible.right == 0
        window = tuple(-1 if side is None else side for side in (case.visible.left, case.visible.right))
        options: dict[str, Any] = {"softmax_scale": case.scale, "causal": causal}
        if case.suite == "decode":
            lengths = torch.tensor(case.visible.lengths, dtype=torch.int32, device=case.device)
            return lambda: (self._tensor(module.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **options)),)
        if not causal:
            options["window_size"] = window
        return lambda: (self._tensor(module.flash_attn_func(q, k, v, **options)),)

    def module(self) -> Any:
        return importlib.import_module(_first_installed(*self._MODULES) or "")

    @staticmethod
    def _tensor(found: Any) -> Tensor:
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2)


class Liger(Provider):
    """Liger-Kernel's Triton norms, and its SiLU product between torch's linear layers."""

    name = "Liger"
    package = "liger-kernel"
    suites = frozenset({"norm", "ffn"})

    def unavailable_reason(self, device: str) -> str | None:
        if device != "cuda":
            return "it runs on GPUs only"
        return None if _first_installed("liger_kernel") else "liger-kernel is not installed"

    def refuses(self, case: Case, direction: str) -> str | None:
        if isinstance(case, FfnCase) and not (case.gated and case.activation == "silu"):
            return "of feed-forward blocks it has the gated one with silu"
        return None

    def prepare(self, case: OpCase, tensors: Mapping[str, Tensor]) -> Run:
        return self._norm(case, tensors) if isinstance(case, NormCase) else self._swiglu(tensors)

    @staticmethod
    def _norm(case: NormCase, tensors: Mapping[str, Tensor]) -> Run:
        x, weight, bias, residual = (tensors.get(n) for n in ("x", "weight", "bias", "residual"))
        if case.kind == "layer":
            layer: Any = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction

            def run_layer() -> tuple[Tensor, ...]:
                z = x if residual is None else x + residual  # type: ignore[operator]
                y = layer.apply(z, weight, bias, case.eps)
                return (y,) if residual is None else (y, z)  # type: ignore[return-value]

            return run_layer
        if residual is None:
            rms: Any = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
            return lambda: (rms.apply(x, weight, case.eps, 0.0, "llama", False),)
        fused: Any = importlib.import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
        return lambda: tuple(fused.apply(x, residual, weight, case.eps, 0.0, "llama", False))

    @staticmethod
    def _swiglu(tensors: Mapping[str, Tensor]) -> Run:
        product: Any = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        x, w_gate, w_up, w_down = (tensors[n] for n in ("x", "w_gate", "w_up", "w_down"))
        return lambda: (F.linear(product.apply(F.linear(x, w_gate), F.linear(x, w_up)), w_down),)
