"""Packed batches: sequences of different lengths, one behind the other along one dimension, without padding."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """Where the sequences of a packed batch lie. Sequence b owns rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q, and
    keys likewise.

    cu_seqlens_q, cu_seqlens_k  int32 (B + 1,), not decreasing, on q's device.
    max_len_q, max_len_k        what the longest sequence has at most; longer ones are cut off there.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_len_q: int
    max_len_k: int

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return self.cu_seqlens_q.shape[0] - 1


def check_bounds(name: str, cu_seqlens: Tensor, rows_of: str, rows: int, *, every_row: bool) -> None:
    """ValueError where the bounds do not cut `rows` rows into sequences, all of them or some from the first on.

    Read here, on the host's own tensors only: in a traced call they have no values, on a GPU reading them would wait.
    """
    if cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.tolist()
    reaches = bounds[-1] == rows if every_row else bounds[0] >= 0 and bounds[-1] <= rows
    if not reaches or (every_row and bounds[0] != 0) or any(a > b for a, b in pairwise(bounds)):
        shown = str(bounds if len(bounds) <= 8 else [*bounds[:4], "...", *bounds[-3:]])
        raise ValueError(
            f"{name}={shown} does not cut {rows_of}'s {rows} rows into sequences: pass 0, then the end of each "
            f"sequence, never decreasing, up to {rows}"
        )


class Places(NamedTuple):
    """The rows of a packed tensor by sequence: `row` int64 (B, max_len), in bounds, and `valid` bool (B, max_len)."""

    row: Tensor
    valid: Tensor


def places(cu_seqlens: Tensor, max_len: int, rows: int) -> Places:
    """Where each sequence's elements lie among `rows` rows; not valid past its length, or past the last row."""
    step = torch.arange(max_len, device=cu_seqlens.device)
    start, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    row = start + step
    valid = (row < end) & (row < rows) & (row >= 0)
    return Places(row.clamp(0, max(rows - 1, 0)), valid)


def pad(packed: Tensor, at: Places) -> Tensor:
    """(1, H, T, ...) to (B, H, max_len, ...), zero where no element of the sequence lies."""
    batch, max_len = at.row.shape
    rest = packed.shape[3:]
    if packed.shape[2] == 0:
        return packed.new_zeros(batch, packed.shape[1], max_len, *rest)
    padded = packed[0][:, at.row.flatten()].unflatten(1, (batch, max_len)).transpose(0, 1)
    return padded.masked_fill(~at.valid.view(batch, 1, max_len, *(1,) * len(rest)), 0.0)


def unpad(padded: Tensor, at: Places, rows: int, fill: float = 0.0) -> Tensor:
    """The inverse of `pad`: (B, H, max_len, ...) to (1, H, rows, ...), `fill` in rows that belong to no sequence."""
    heads, rest = padded.shape[1], padded.shape[3:]
    packed = padded.new_full((rows, heads, *rest), fill)
    packed[at.row[at.valid]] = padded.transpose(1, 2)[at.valid]
    return packed.transpose(0, 1).unsqueeze(0)
