"""Plain attention that swapped modules leave to torch's own function, where that was measured to be the faster one.

On Hopper torch may choose cuDNN's kernels, which no mask but the causal one and no bias slows down. Measured: time of
the Triton kernels over that of torch's scaled_dot_product_attention, bf16, 16,384 tokens in sequences of 2,048 to
8,192, 2,048 columns of all heads, torch 2.11, H200, 2026-11-27 (bench/results/nvidia-h200-2026-11-27/attention.json):
    head dim 64   forward 1.11 to 1.13, causal 1.01 to 1.10, with the backward 1.53, causal 1.45
            128           1.43 to 1.48,        1.32 to 1.39,                   1.72,        1.57
            256           1.50,                1.46,                           1.62,        1.63
On an H100 GPT-2's, 16 x 1,024, took 1.19 and 1.37. Padding is another matter: at BERT's sizes ours took 0.54 there.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from fastattn.functional.checks import HALVES, resolve_backend
from fastattn.ops.library import is_recorded

_SHORTEST = 1024
"""The least queries with which it was measured; over a cache of keys a few are the decoding kernel's."""

AS_FAST = "torch's kernel is as fast: cuDNN's, of plain attention in a half dtype on compute capability 9.0"


def torch_is_as_fast(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, backend: str | None
) -> bool:
    """Whether to leave a call with no mask, or the causal one from the top left, and nothing else to torch: where it
    would run cuDNN's kernels on the GPUs that these were measured on, eagerly and with no backend forced.

    query (B, Hq, L, E), key (B, Hkv, S, E), value (B, Hkv, S, Ev).
    """
    if not query.is_cuda or query.dtype not in HALVES or query.shape[2] < _SHORTEST or torch.compiler.is_compiling():
        return False
    if resolve_backend(backend) or is_recorded() or _capability(query.device) != (9, 0):
        return False
    return _chooses_cudnn(query, key, value, is_causal, scale)


def on_torch(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    """A call for which `torch_is_as_fast`: (B, Hq, L, Ev)."""
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped)


def _chooses_cudnn(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> bool:
    grouped = query.shape[1] != key.shape[1]
    chosen = torch._fused_sdp_choice(query, key, value, None, 0.0, is_causal, scale=scale, enable_gqa=grouped)
    return chosen == int(SDPBackend.CUDNN_ATTENTION.value)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
