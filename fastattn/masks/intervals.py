"""Form C: sets of keys per query as a few sorted half-open intervals, with union, complement and intersection.

The algebra is elementwise over queries and runs on the tensors' device: no value is read on the host and nothing of
size Sq x Skv is made. How many intervals a result needs follows from the operands' counts alone. It is taken over all
whole numbers, LOWEST and HIGHEST standing for the infinities, so that the complement of "up to p" is the single
interval "from p + 1"; only the finished set is clamped to the keys that there are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOWEST, HIGHEST = -(2**30), 2**30
"""What an unbounded interval starts and ends at; every position lies between them."""

MOST = 4
"""How many intervals per query the lowered form holds."""

BLOCK = 64
"""Queries per row of bounds, and the side of a base block."""

Edge = Tensor | int


class IntervalSet(NamedTuple):
    """Per query the union of the intervals [edges[0], edges[1]), [edges[2], edges[3]), ...

    edges       numbers, or int32 tensors that broadcast to (B, Hq, Sq); at no query does one exceed the next, so the
                intervals are sorted and disjoint, and some may be empty.
    from_lowest edges[0] is LOWEST at every query; to_highest: the last edge is HIGHEST.
    """

    edges: tuple[Edge, ...]
    from_lowest: bool = False
    to_highest: bool = False

    # Methods, not properties: Dynamo of torch 2.7 to 2.10 follows none of a named tuple.
    def slots(self) -> int:
        """Intervals per query, the empty ones included."""
        return len(self.edges) // 2

    def is_everything(self) -> bool:
        """Whether the set has every key by construction."""
        return self.slots() == 1 and self.from_lowest and self.to_highest


NOTHING = IntervalSet(())
EVERYTHING = IntervalSet((LOWEST, HIGHEST), True, True)


def interval(start: Edge | None, end: Edge | None) -> IntervalSet:
    """One interval per query; None is unbounded. Positions beyond LOWEST and HIGHEST count as those."""
    first = LOWEST if start is None else _bounded(start)
    last = HIGHEST if end is None else _bounded(end)
    return IntervalSet((first, _greater(first, last)), start is None, end is None)


def complement(a: IntervalSet) -> IntervalSet:
    """The keys that `a` leaves out: its edges, with the infinities added where they are missing."""
    edges = a.edges[1:] if a.from_lowest else (LOWEST, *a.edges)
    edges = edges[:-1] if a.to_highest else (*edges, HIGHEST)
    return IntervalSet(edges, not a.from_lowest, not a.to_highest)


def union(a: IntervalSet, b: IntervalSet) -> IntervalSet:
    """The keys in either; at most as many intervals as both have, one less for each infinity that both reach."""
    if a.is_everything() or b.is_everything():
        return EVERYTHING
    left, right = _pairs(a), _pairs(b)
    if a.from_lowest and b.from_lowest:
        left[0] = (LOWEST, _greater(left[0][1], right.pop(0)[1]))
    if a.to_highest and b.to_highest:
        right.append((_lesser(left.pop()[0], right.pop()[0]), HIGHEST))
    merged = left
    for pair in right:
        _insert(merged, pair)
    edges: list[Edge] = []
    reached: Edge = LOWEST
    for start, end in merged:  # what an earlier interval covers is cut off a later one's start
        start = _greater(start, reached)
        reached = _greater(end, start)
        edges += (start, reached)
    return IntervalSet(tuple(edges), a.from_lowest or b.from_lowest, a.to_highest or b.to_highest)


def intersection(a: IntervalSet, b: IntervalSet) -> IntervalSet:
    """The keys in both; at most one interval less than both have."""
    if a.is_everything() or b.is_everything():
        return b if a.is_everything() else a
    return complement(union(complement(a), complement(b)))


def per_head(sets: list[IntervalSet]) -> IntervalSet:
    """sets[h] for head h."""
    count = max(x.slots() for x in sets)
    padded = [x.edges + (HIGHEST,) * (2 * (count - x.slots())) for x in sets]
    shape = torch.broadcast_shapes(*(e.shape for edges in padded for e in edges if isinstance(e, Tensor)))
    device = next((e.device for edges in padded for e in edges if isinstance(e, Tensor)), None)
    if device is None:
        shape = torch.Size((1, 1, 1))
    columns = []
    for column in zip(*padded, strict=True):
        if all(isinstance(e, int) and e == column[0] for e in column):
            columns.append(column[0])
        else:
            columns.append(torch.cat([_filled(e, shape, device) for e in column], dim=1))
    return IntervalSet(tuple(columns), all(x.from_lowest for x in sets), all(x.to_highest for x in sets))


def intervals_tensor(a: IntervalSet, len_q: int, len_k: int, device: torch.device) -> Tensor:
    """`LoweredMask.intervals` of the set: int32 (R, 1|B, 1|Hq, Sq, 2), clamped to [0, Skv]; R is at least 1."""
    edges = a.edges or (0, 0)
    shape = torch.broadcast_shapes((1, 1, len_q), *(e.shape for e in edges if isinstance(e, Tensor)))
    filled = [_filled(e, shape, device) for e in edges]
    return torch.stack(filled).clamp(0, len_k).unflatten(0, (-1, 2)).movedim(1, -1).contiguous()


def row_bounds(intervals: Tensor) -> Tensor:
    """`LoweredMask.bounds`: per 64 queries the least and greatest start and the least and greatest end."""
    len_q = intervals.shape[3]
    rows = (len_q + BLOCK - 1) // BLOCK
    if len_q == 0:
        return intervals.new_empty((*intervals.shape[:3], 0, 4))
    query = torch.arange(rows * BLOCK, device=intervals.device).clamp(max=len_q - 1)
    grouped = intervals[:, :, :, query].unflatten(3, (rows, BLOCK))
    least, greatest = grouped.amin(dim=4), grouped.amax(dim=4)
    return torch.stack([least[..., 0], greatest[..., 0], least[..., 1], greatest[..., 1]], dim=-1)


def _pairs(a: IntervalSet) -> list[tuple[Edge, Edge]]:
    return list(zip(a.edges[::2], a.edges[1::2], strict=True))


def _insert(pairs: list[tuple[Edge, Edge]], pair: tuple[Edge, Edge]) -> None:
    """Adds a pair to pairs sorted by start; per query, as one pass of a sorting network."""
    pairs.append(pair)
    for i in range(len(pairs) - 1, 0, -1):
        (start, end), (later_start, later_end) = pairs[i - 1], pairs[i]
        if isinstance(start, int) and start == LOWEST:
            return
        swap = later_start < start
        if isinstance(swap, bool):
            if swap:
                pairs[i - 1], pairs[i] = pairs[i], pairs[i - 1]
            continue
        pairs[i - 1] = (_lesser(start, later_start), _where(swap, later_end, end))
        pairs[i] = (_greater(start, later_start), _where(swap, end, later_end))


def _bounded(edge: Edge) -> Edge:
    """The edge strictly between the infinities, so that only an unbounded interval reaches them."""
    if isinstance(edge, Tensor):
        return edge.clamp(LOWEST + 1, HIGHEST - 1)
    return min(max(edge, LOWEST + 1), HIGHEST - 1)


def _greater(a: Edge, b: Edge) -> Edge:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    if isinstance(a, Tensor):
        a, b = b, a
    if isinstance(b, Tensor):
        return b if a == LOWEST else HIGHEST if a == HIGHEST else b.clamp(min=a)
    return max(a, b)


def _lesser(a: Edge, b: Edge) -> Edge:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    if isinstance(a, Tensor):
        a, b = b, a
    if isinstance(b, Tensor):
        return b if a == HIGHEST else LOWEST if a == LOWEST else b.clamp(max=a)
    return min(a, b)


def _where(condition: Tensor, a: Edge, b: Edge) -> Edge:
    return a if a is b else torch.where(condition, a, b).to(torch.int32)


def _filled(edge: Edge, shape: torch.Size | tuple[int, ...], device: torch.device | None) -> Tensor:
    if isinstance(edge, Tensor):
        return edge.to(torch.int32).expand(shape)
    return torch.full(shape, edge, dtype=torch.int32, device=device)
