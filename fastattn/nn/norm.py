"""LayerNorm and RMSNorm: torch.nn's, on fastattn.layer_norm and fastattn.rms_norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.backends import cpu
from fastattn.functional import layer_norm, rms_norm
from fastattn.functional.checks import resolve_backend
from fastattn.graphs import constant
from fastattn.nn.checks import full_name, why_not_input, why_not_parameter, why_not_tensor, why_not_unwatched
from fastattn.nn.counting import note_call, note_choice, note_fallback
from fastattn.nn.fused import Fused, stands_for
from fastattn.ops.library import tracks_gradients

AS_FAST = "torch's kernel is as fast: float32 inference on a CPU"
_FROM_ELEMENTS = 2**18


class LayerNorm(Fused, nn.LayerNorm):
    """nn.LayerNorm on fastattn.layer_norm. Any normalized_shape; x (..., *normalized_shape).

    float32 inference on a CPU, which has no residual to fuse, runs torch's own kernel unless a backend is forced. Of
    1,024 and 2,048 rows of 768 it takes 0.94 and 0.98 of the time of ours (bench/results, 2 cores of an AMD EPYC with
    AVX2, 2026-11-26), and a small call 5 us where ours takes 25. With AVX-512 ours runs from 2^18 elements on: 1.2 (256
    rows of 768), 1.6 (1,024), 1.7 (4,096) and 1.1 to 1.4 times as fast (8,192; 2 cores of an AMD EPYC, 2026-11-27).
    """

    fastattn_original = nn.LayerNorm

    def forward(self, input: Tensor) -> Tensor:
        note_call(self)
        weight, bias = self.weight, self.bias
        if torch_is_as_fast(input, weight, bias, self.fastattn_backend):
            # First of all: whatever the parameters are, they are torch's to read.
            note_choice(self, AS_FAST)
            return super().forward(input)
        reason = (
            why_not_input(input)
            or why_not_tensor("weight", weight)
            or why_not_tensor("bias", bias)
            or _why_not_together(input, self.normalized_shape, weight, bias)
        )
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(input)
        x, flat_weight, flat_bias = _as_one_dim(self.normalized_shape, input, weight, bias)
        y = layer_norm(x, flat_weight, flat_bias, self.eps, backend=self.fastattn_backend)
        return y.reshape(input.shape)


class RMSNorm(Fused, nn.RMSNorm):
    """nn.RMSNorm on fastattn.rms_norm. Any normalized_shape; eps=None is the machine epsilon of x's dtype."""

    fastattn_original = nn.RMSNorm

    def forward(self, x: Tensor) -> Tensor:
        note_call(self)
        weight = self.weight
        reason = (
            why_not_input(x)
            or why_not_tensor("weight", weight)
            or _why_not_together(x, self.normalized_shape, weight, None)
        )
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(x)
        flat, flat_weight, _ = _as_one_dim(self.normalized_shape, x, weight, None)
        return rms_norm(flat, flat_weight, self.eps, backend=self.fastattn_backend).reshape(x.shape)


def torch_is_as_fast(x: Tensor, weight: Tensor | None, bias: Tensor | None, backend: str | None) -> bool:
    """Whether to leave a LayerNorm that no residual is fused into to torch's kernel."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and x.dtype is torch.float32
        and not resolve_backend(backend)
        and not tracks_gradients(x, weight, bias)
        and not (x.numel() >= _FROM_ELEMENTS and _has_avx512())
    )


@constant
def _has_avx512() -> bool:
    return cpu.has_avx512()


def _why_not_together(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> str | None:
    """Shapes that torch refuses, in its words, and dtypes that it promotes or refuses."""
    if tuple(x.shape[-len(shape) :]) != tuple(shape):
        return f"the input's shape does not end in {tuple(shape)}"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in (x.dtype, torch.float32):
            return f"its {name} is {str(tensor.dtype).removeprefix('torch.')}, not float32 or the input's dtype"
    return None


def why_not_layer_norm(child: nn.Module) -> str | None:
    """None where a parent may read the child's tensors: it is nn.LayerNorm, or stands for it, over the last
    dimension."""
    if not stands_for(child, nn.LayerNorm):
        return f"is a {full_name(child)}"
    if len(child.normalized_shape) != 1:
        return f"normalises over {len(child.normalized_shape)} dimensions"
    return (
        why_not_unwatched(child)
        or why_not_parameter(child, "weight", optional=True)
        or why_not_parameter(child, "bias", optional=True)
    )


def _as_one_dim(
    shape: tuple[int, ...], x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, weight and bias with the dimensions that normalized_shape spans flattened into one."""
    dims = len(shape)
    if dims == 1:
        return x, weight, bias
    weight, bias = (None if t is None else t.flatten() for t in (weight, bias))
    return x.flatten(-dims), weight, bias
