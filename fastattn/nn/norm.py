"""LayerNorm and RMSNorm: torch.nn's, on fastattn.layer_norm and fastattn.rms_norm."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from fastattn.backends import cpu
from fastattn.functional import layer_norm, rms_norm
from fastattn.functional.checks import resolve_backend
from fastattn.graphs import constant, is_exporting
from fastattn.nn.checks import (
    full_name,
    why_not_eps,
    why_not_input,
    why_not_parameter,
    why_not_tensor,
    why_not_unwatched,
)
from fastattn.nn.counting import note_call, note_choice, note_fallback
from fastattn.nn.fused import Fused, stands_for
from fastattn.ops.library import tracks_gradients

AS_FAST = "torch's kernel is as fast: a plain LayerNorm on a CPU, of so few elements"
_NEVER = sys.maxsize
_FROM_ELEMENTS = {
    # With gradients, AVX-512: from so many elements on our LayerNorm runs.
    (False, True): {torch.float32: 2**16, torch.bfloat16: 2**16, torch.float16: 2**16},
    (False, False): {torch.float32: _NEVER, torch.bfloat16: _NEVER, torch.float16: 2**17},
    (True, True): {torch.float32: 2**19, torch.bfloat16: 2**17, torch.float16: 2**17},
    (True, False): {torch.float32: 2**21, torch.bfloat16: 2**18, torch.float16: 2**18},
}


class LayerNorm(Fused, nn.LayerNorm):
    """nn.LayerNorm on fastattn.layer_norm. Any normalized_shape; x (..., *normalized_shape).

    On a CPU torch's own kernel is good, and called sooner: unless a backend is forced it runs calls of so few elements
    that ours would take longer, call and all (_FROM_ELEMENTS). Times as fast, inference and with a backward, for 64,
    256 and 1,024 rows of 768, one core of an AMD EPYC of Zen 5, torch 2.13.0, 2026-11-27:
        AVX-512     float32 1.05, 1.40, 1.42 and 0.5, 0.8, 0.9     bfloat16 0.95, 1.11, 1.27 and 0.7, 1.1, 1.1
        its AVX2    float32 0.87, 1.09, 1.25 and 0.5, 0.7, 0.6     bfloat16 0.77, 0.84, 0.93 and 0.6, 1.0, 1.2
    On an AMD EPYC with no more than AVX2 float32 inference of 1,024 and 2,048 rows of 768 was 0.94 and 0.98 times as
    fast (2026-11-26).
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
            why_not_input(input, self.fastattn_backend)
            or why_not_tensor("weight", weight)
            or why_not_tensor("bias", bias)
            or why_not_eps(self.eps)
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
            why_not_input(x, self.fastattn_backend)
            or why_not_tensor("weight", weight)
            or (None if self.eps is None else why_not_eps(self.eps))
            or _why_not_together(x, self.normalized_shape, weight, None)
        )
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(x)
        flat, flat_weight, _ = _as_one_dim(self.normalized_shape, x, weight, None)
        return rms_norm(flat, flat_weight, self.eps, backend=self.fastattn_backend).reshape(x.shape)


def torch_is_as_fast(x: Tensor, weight: Tensor | None, bias: Tensor | None, backend: str | None) -> bool:
    """Whether to leave a LayerNorm that no residual is fused into to torch's kernel. Not where it is exported: a
    question about its elements would bound the number of rows that the graph takes."""
    if type(x) is not Tensor or not x.is_cpu or resolve_backend(backend) or is_exporting():
        return False
    least = _FROM_ELEMENTS[tracks_gradients(x, weight, bias), _has_avx512()].get(x.dtype)
    return least is not None and x.numel() < least


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
        or why_not_eps(child.eps)
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
