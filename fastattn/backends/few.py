"""Calls of `attention` that are decoding: few new tokens over a cache, as in generation.

Up to FEW_QUERIES queries the CPU's kernel for decoding is faster, which reads a key once for all heads of its group and
shares out the keys. Of one query: 1.7 to 10 times as fast, of four 1.4 to 3.6, of eight equal to 2.1, of sixteen 0.7 to
1.2 (caches of 256 to 4,096 keys, 1 to 4 heads a group, float32 and bfloat16, 2 cores of an AMD EPYC (Zen 3, AVX2, VM),
2026-11-26). On GPUs unmeasured.
"""

from __future__ import annotations

import torch

from fastattn.biases.lowered import LoweredBias, hide_keys
from fastattn.masks.lowered import LoweredMask
from fastattn.problems import FEW_QUERIES


def as_decoding(
    mask: LoweredMask, bias: LoweredBias, len_q: int, len_k: int, device: torch.device
) -> tuple[LoweredMask, LoweredBias] | None:
    """The mask and bias with which `attention_decode` of the same backend computes the call, len_k keys in every cache;
    None where it does not. It knows bands about the last position, intervals and biases, and no dropout, which is for
    the caller to look at."""
    has_band = mask.band_left is not None or mask.band_right is not None
    if (
        not 0 < len_q <= FEW_QUERIES
        or len_q > len_k
        or (has_band and mask.band_offset != len_k - len_q)
        or mask.blocks is not None
        or bias.top_left
    ):
        return None
    return hide_keys(mask, bias, len_q, len_k, device)
