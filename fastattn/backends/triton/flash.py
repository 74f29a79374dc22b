"""Gradients of plain attention by torch's FlashAttention-2 (Dao 2023), where its kernels were measured to be faster.

They add up dq with atomics, and so serve only where a backward need not be repeatable. What they need of a forward,
out and lse, ours gives too, and ours is the faster forward.

Measured: forward and backward in bf16, 16,384 tokens in sequences of 2,048 (of 4,096 at head dim 256), 2,048 columns of
all heads, H200, 2026-11-27; ms with attention_queries_kernel and attention_keys_kernel, with these, and of torch's
scaled_dot_product_attention, which there is cuDNN's:
    head dim 64   3.34, 3.36, 2.20   causal 2.06, 2.01, 1.39
            128   2.99, 3.17, 1.74          1.71, 1.85, 1.09
            256   9.29, 6.69, 4.14          4.70, 3.74, 2.30
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastattn.masks.lowered import NOTHING_HIDDEN, LoweredMask

_CAPABILITY = 9  # the major one of the GPUs it was measured on
_DIM = 256


@functools.cache
def is_built() -> bool:
    """Whether this torch has FlashAttention-2 for GPUs."""
    return bool(torch.backends.cuda.is_flash_attention_available())


def is_faster(arch: int, q: Tensor, k: Tensor, v: Tensor, mask: LoweredMask) -> bool:
    """Whether it takes and wins a call of compute capability `arch` (90 for 9.0) that has no bias, softcap, dropout or
    sinks."""
    return (
        arch // 10 == _CAPABILITY
        and q.shape[3] == v.shape[3] == _DIM
        and q.dtype in (torch.bfloat16, torch.float16)
        and 0 not in k.shape
        and hides(mask, q.shape[2], k.shape[2]) is not None
        and is_built()
    )


def hides(mask: LoweredMask, len_q: int, len_k: int) -> str | None:
    """What its kernels know this mask as: "nothing", "future", or None for any other."""
    band = (mask.band_left, mask.band_right)
    rest = mask._replace(band_offset=0, band_left=None, band_right=None, lengths=None)
    if any(own is not default for own, default in zip(rest, NOTHING_HIDDEN, strict=True)):
        return None
    if band == (None, None):
        return "nothing"
    return "future" if band == (None, 0) and mask.band_offset == 0 and len_q == len_k else None


def gradients(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: LoweredMask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of shapes and dtypes of q, k and v, from a call for which is_faster()."""
    len_q, len_k = q.shape[2], k.shape[2]
    no_seed = torch.empty(0, dtype=torch.uint64, device=q.device)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    is_causal = hides(mask, len_q, len_k) == "future"
    dq, dk, dv = backward(
        grad_out, q, k, v, out, lse, None, None, len_q, len_k, 0.0, is_causal, no_seed, no_seed, scale=scale
    )
    return dq, dk, dv
