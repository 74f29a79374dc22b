"""Philox dropout inside a Triton kernel, bit for bit as in fastattn.reference.philox.

One Philox call yields eight 16-bit lanes: half e of word w of the call with counter (row, 4 g + p, entry, 0) belongs to
column 32 g + 8 w + 2 p + e. So a block of BLOCK columns makes BLOCK / 8 calls and lays their lanes out in column order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dropout_factor(seed, row, entry, first_column, threshold, keep_scale, BLOCK: tl.constexpr):
    """float32 (BLOCK,): keep_scale where (row, first_column + k) is kept, else 0.

    seed int64; row, entry int32; first_column a multiple of 32; BLOCK a power of two from 32 on.
    """
    calls = first_column // 8 + tl.arange(0, BLOCK // 8)
    zero = calls * 0
    w0, w1, w2, w3 = tl.philox(seed, zero + row, calls, zero + entry, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # (calls, 2, 2), word 2a + b at (a, b)
    words = tl.reshape(words, (BLOCK // 32, 4, 4))  # (group, pair, word)
    lanes = tl.join(words & 0xFFFF, words >> 16)  # (group, pair, word, half)
    lanes = tl.reshape(tl.permute(lanes, (0, 2, 1, 3)), (BLOCK,)).to(tl.int32)
    return tl.where(lanes >= threshold, keep_scale, 0.0)


@triton.jit
def dropout_tile(seed, rows, entry, first_column, threshold, keep_scale, BLOCK: tl.constexpr):
    """float32 (R, BLOCK): keep_scale where (rows[r], first_column + k) is kept, else 0.

    rows int32 (R,); the others as in dropout_factor.
    """
    calls = first_column // 8 + tl.arange(0, BLOCK // 8)
    zero = rows[:, None] * 0 + calls[None, :] * 0
    w0, w1, w2, w3 = tl.philox(seed, zero + rows[:, None], zero + calls[None, :], zero + entry, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, (rows.shape[0], BLOCK // 32, 4, 4))  # (row, group, pair, word)
    lanes = tl.join(words & 0xFFFF, words >> 16)
    lanes = tl.reshape(tl.permute(lanes, (0, 1, 3, 2, 4)), (rows.shape[0], BLOCK)).to(tl.int32)
    return tl.where(lanes >= threshold, keep_scale, 0.0)
