"""The lowered form of a bias: what every kernel adds to the scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.masks.lowered import LoweredMask, replaced, visible


class LoweredBias(NamedTuple):
    """The sum of what is given: a tensor read through its strides, and functions of the distance from query to key.

    With d = key - position of the query, which is i + (Skv - Sq), in a packed batch with the lengths of its sequence,
    or i where `top_left` is set:

    dense     4-D, each dimension 1 or full (B, Hq, Sq, Skv), any strides, q's dtype or float32. -inf hides a key.
    table     (1|Hq, n) in the accumulate dtype, contiguous, n >= 1: column clamp(d - first, 0, n - 1) is the bias at d.
    first     the distance of the table's first column.
    slopes    (1|B, Hq) in the accumulate dtype, contiguous: -slopes * |d|.
    """

    dense: Tensor | None = None
    table: Tensor | None = None
    first: int = 0
    slopes: Tensor | None = None
    top_left: bool = False


NO_BIAS = LoweredBias()


def expand(bias: LoweredBias, full: tuple[int, int, int, int], position: Tensor | None = None) -> Tensor | None:
    """The bias as one tensor that broadcasts to `full`, in float32 at least; None where there is none.

    position: int64 (1|B, Sq), where the queries sit for table and slopes; by default as in an unpacked batch.
    """
    terms = []
    if bias.dense is not None:
        terms.append(bias.dense.to(torch.promote_types(bias.dense.dtype, torch.float32)))
    if bias.table is not None:
        terms.append(of_table(bias.table, _distances(bias, full, position, bias.table.device), bias.first))
    if bias.slopes is not None:
        terms.append(of_slopes(bias.slopes, _distances(bias, full, position, bias.slopes.device)))
    if len(terms) < 2:
        return terms[0] if terms else None
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    lowest = torch.finfo(total.dtype).min  # a sum of finite numbers stays finite
    return torch.where(total == -torch.inf, _floor(terms, lowest), total)


def hide(dense: Tensor | None, seen: Tensor) -> Tensor:
    """The dense bias with -inf where a bool mask that broadcasts with it hides a key, whatever the bias is there."""
    if dense is None:
        dense = torch.zeros((), dtype=torch.float32, device=seen.device)
    return torch.where(seen, dense, -torch.inf)


def hide_keys(
    mask: LoweredMask, bias: LoweredBias, len_q: int, len_k: int, device: torch.device
) -> tuple[LoweredMask, LoweredBias]:
    """Key ranges, key bits and dense masks as a bias of -inf, small where the queries are few."""
    if mask.key_start is None and mask.key_end is None and mask.key_bits is None and mask.dense is None:
        return mask, bias
    seen = None if mask.dense is None else _as_small(mask.dense)
    if mask.key_start is not None or mask.key_end is not None or mask.key_bits is not None:
        keys = LoweredMask(key_start=mask.key_start, key_end=mask.key_end, key_bits=mask.key_bits, dense=seen)
        seen = visible(keys, len_q, len_k, device)
    assert seen is not None
    rest = replaced(mask, key_start=None, key_end=None, key_bits=None, dense=None)
    return rest, replaced(bias, dense=hide(bias.dense, seen))


def _as_small(expanded: Tensor) -> Tensor:
    """The tensor with one entry along each dimension in which all are the same in memory."""
    for dim, step in enumerate(expanded.stride()):
        if step == 0 and expanded.shape[dim] > 1:
            expanded = expanded.narrow(dim, 0, 1)
    return expanded


def gradients(
    bias: LoweredBias, dscores: Tensor, wanted: tuple[bool, bool, bool], position: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of dense, table and slopes where wanted, else empty; dscores (B, Hq, Sq, Skv), position as in
    `expand`."""
    dense, table, slopes = (dscores.new_empty(0) for _ in range(3))
    if bias.dense is not None and wanted[0]:
        dense = dscores.sum_to_size(bias.dense.shape)
    full = dscores.shape
    if bias.table is not None and wanted[1]:
        heads, columns = bias.table.shape
        distance = _distances(bias, full, position, dscores.device)
        column = (distance - bias.first).clamp(0, columns - 1).expand(full[0], 1, full[2], full[3])
        rows = dscores if heads > 1 else dscores.sum(dim=1, keepdim=True)
        table = dscores.new_zeros(heads, columns)
        table.index_add_(1, column.flatten(), rows.transpose(0, 1).flatten(1))
    if bias.slopes is not None and wanted[2]:
        distance = _distances(bias, full, position, dscores.device)
        slopes = -(dscores * distance.abs()).sum(dim=(2, 3)).sum_to_size(bias.slopes.shape)
    return dense, table, slopes


def _distances(bias: LoweredBias, full: tuple[int, ...], position: Tensor | None, device: torch.device) -> Tensor:
    """int64 (1|B, 1, Sq, Skv)."""
    _, _, len_q, len_k = full
    if position is None:
        position = torch.arange(len_q, device=device).view(1, -1) + (0 if bias.top_left else len_k - len_q)
    return torch.arange(len_k, device=device) - position[:, None, :, None]


def _floor(terms: list[Tensor], lowest: float) -> Tensor:
    hidden = torch.stack(torch.broadcast_tensors(*(t == -torch.inf for t in terms))).any(dim=0)
    return torch.full(hidden.shape, lowest, dtype=terms[0].dtype, device=hidden.device).masked_fill(hidden, -torch.inf)


def of_table(table: Tensor, distance: Tensor, first: int) -> Tensor:
    """(B, H, Sq, Skv): the table (H, n) at distances (B, 1, Sq, Skv)."""
    column = (distance - first).clamp(0, table.shape[1] - 1).squeeze(1)
    return table[:, column].transpose(0, 1)


def of_slopes(slopes: Tensor, distance: Tensor) -> Tensor:
    """(B, H, Sq, Skv): -slopes (B, H) times |distance| (B, 1, Sq, Skv)."""
    return -slopes[:, :, None, None] * distance.abs()
