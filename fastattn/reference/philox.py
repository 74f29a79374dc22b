"""Philox4x32-10 in torch integer arithmetic, and the dropout masks that every backend draws from it.

The 128-bit counter is (i, 4*(j >> 5) + ((j & 7) >> 1), entry, 0) for row i, column j; of the eight 16-bit lanes of the
output, lane 2*((j & 31) >> 3) + (j & 1) belongs to (i, j). Lane n is the low (n even) or high half of word n >> 1.
An element is kept where its lane >= t = round(65536 p), and scaled by 65536 / (65536 - t).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF


def dropout_threshold(dropout_p: float) -> int:
    """t of the module's rule: an element is dropped where its 16-bit lane is below t."""
    return int(65536.0 * dropout_p + 0.5)


def dropout_scale(dropout_p: float) -> float:
    """The factor of kept elements, 65536 / (65536 - t)."""
    return 65536.0 / (65536.0 - dropout_threshold(dropout_p))


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds. Counter and key words: int64 tensors that hold 32-bit values and broadcast together; so the
    result."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _WEYL[0]) & _LOW32
        k1 = (k1 + _WEYL[1]) & _LOW32
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, dropout_p: float, entries: int, rows: int, columns: int) -> Tensor:
    """Bool (entries, rows, columns), True where dropout keeps. seed: int64 tensor of one element."""
    device = seed.device
    word = seed.reshape(()).to(torch.int64)
    key = (word & _LOW32, (word >> 32) & _LOW32)
    groups = 4 * ((columns + 31) // 32)
    entry = torch.arange(entries, device=device).view(-1, 1, 1)
    row = torch.arange(rows, device=device).view(1, -1, 1)
    group = torch.arange(groups, device=device).view(1, 1, -1)
    words = philox4x32((row, group, entry, torch.zeros_like(word)), key)
    words = tuple(w.expand(entries, rows, groups) for w in words)
    lanes = torch.stack([half for w in words for half in (w & 0xFFFF, w >> 16)], dim=-1)
    j = torch.arange(columns, device=device)
    lane_of_column = 2 * ((j & 31) >> 3) + (j & 1)
    group_of_column = 4 * (j >> 5) + ((j & 7) >> 1)
    return lanes[:, :, group_of_column, lane_of_column] >= dropout_threshold(dropout_p)


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 without overflow."""
    low = constant * (word & 0xFFFF)
    high = constant * (word >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
