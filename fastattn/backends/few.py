"""Calls of `attention` that are decoding: few new tokens over a cache, as in generation."""

from __future__ import annotations

from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import LoweredMask

FEW = 8
"""Queries up to which the CPU's kernel for decoding is faster, which reads a key once for all heads of its group and
shares out the keys. Of one query: 1.7 to 10 times as fast, of four 1.4 to 3.6, of eight equal to 2.1, of sixteen 0.7 to
1.2 (caches of 256 to 4,096 keys, 1 to 4 heads a group, float32 and bfloat16, 2 cores of an AMD EPYC (Zen 3, AVX2, VM),
2026-11-26). On GPUs unmeasured."""


def is_decoding(len_q: int, len_k: int, mask: LoweredMask, bias: LoweredBias) -> bool:
    """Whether `attention_decode` of the same backend, with len_k keys in every cache, computes the call. It knows bands
    about the last position, intervals and biases; and no dropout, which is for the caller to look at."""
    has_band = mask.band_left is not None or mask.band_right is not None
    return (
        0 < len_q <= FEW
        and len_q <= len_k
        and not (has_band and mask.band_offset != len_k - len_q)
        and mask.key_start is None
        and mask.key_end is None
        and mask.key_bits is None
        and mask.blocks is None
        and mask.dense is None
        and not bias.top_left
    )
