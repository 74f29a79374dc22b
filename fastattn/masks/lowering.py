"""Which of the forms A to D a mask takes: the smallest that serves.

A mask is split into the masks it is the "and" of. Lengths, ranges and windows become A and B: numbers and tensors of
size B, made on every call. Key masks become A's words; what is a few intervals per query becomes C, all such terms
together as long as four intervals hold them. What is left becomes D. Those three are remembered, per term, for the
shapes and the device; under torch.compile A to C are traced and D is built outside of the graph.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from fastattn.masks.blocks import build_blocks
from fastattn.masks.cache import Cache
from fastattn.masks.intervals import MOST, IntervalSet, intersection, intervals_tensor, row_bounds
from fastattn.masks.lowered import Blocks, LoweredMask, Size, intersect

if TYPE_CHECKING:
    from fastattn.masks.base import Mask

T = TypeVar("T")

remembered = Cache(entries=128, size=1 << 29)
"""Words of key masks, intervals and blocks, of all masks."""

_NOTHING_HIDDEN = LoweredMask()


def lower(mask: Mask, size: Size, device: torch.device) -> LoweredMask:
    """The lowered form of the mask. ValueError where one of its tensors does not fit the shapes or the device."""
    mask.check(size, device)
    lowered: LoweredMask | None = None
    light, heavy = [], []
    for term in mask.conjuncts():
        if not term.light:
            heavy.append(term)
            continue
        light.append(term)
        own = term.keys_and_band(size, device) or _NOTHING_HIDDEN
        lowered = own if lowered is None else intersect(lowered, own)
    if heavy:
        return _lower_heavy(lowered or _NOTHING_HIDDEN, heavy, light, size, device)
    return lowered or _NOTHING_HIDDEN


def _lower_heavy(
    lowered: LoweredMask, terms: list[Mask], light: list[Mask], size: Size, device: torch.device
) -> LoweredMask:
    """`lowered` with the words, intervals and blocks of `terms`."""
    simple: list[Mask] = []
    rest: list[Mask] = []
    intervals: IntervalSet | None = None
    for term in terms:
        own = _remember("keys", (term,), size, device, lambda t=term: t.keys_and_band(size, device))  # type: ignore[misc]
        if own is not None:
            lowered = intersect(lowered, own)
            continue
        found = _remember("set", (term,), size, device, lambda t=term: t.intervals(size, device))  # type: ignore[misc]
        both = found if found is None or intervals is None else intersection(intervals, found)
        if both is None or both.slots > MOST:
            rest.append(term)
        else:
            intervals = both
            simple.append(term)
    if intervals is not None and not intervals.is_everything:
        ready = intervals
        tensors = _remember("intervals", tuple(simple), size, device, lambda: _intervals(ready, size, device))
        lowered = lowered._replace(intervals=tensors[0], bounds=tensors[1])
    if rest:
        lowered = lowered._replace(blocks=_blocks(rest, light + simple, size, device))
    return lowered


def _intervals(intervals: IntervalSet, size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    tensor = intervals_tensor(intervals, size.len_q, size.len_k, device)
    return tensor, row_bounds(tensor)


def _blocks(terms: Sequence[Mask], others: Sequence[Mask], size: Size, device: torch.device) -> Blocks:
    """The blocks of all terms together. What hides whole blocks by position alone, and so stays, spares building
    them."""
    mask = functools.reduce(operator.and_, terms)
    limits = [m for m in others if not m.holds() and m.extent(size, device) == (1, 1)]
    within = functools.reduce(operator.and_, limits) if limits else None
    if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in mask.holds() if isinstance(x, Tensor)):
        raise NotImplementedError(
            f"{mask!r} holds a tensor that torch.func transforms and needs blocks, whose building reads values: build "
            "the mask outside of the transform"
        )
    named = (mask,) if within is None else (mask, within)
    return _remember("blocks", named, size, device, lambda: _build_outside_the_graph(mask, size, device, within))


@torch.compiler.disable
def _build_outside_the_graph(mask: Mask, size: Size, device: torch.device, within: Mask | None) -> Blocks:
    return build_blocks(mask, size, device, within)


def _remember(what: str, masks: tuple[Mask, ...], size: Size, device: torch.device, make: Callable[[], T]) -> T:
    if torch.compiler.is_compiling():
        return make()
    holds = tuple(x for mask in masks for x in mask.holds())
    key: tuple[Any, ...] = (what, size, device, *(mask.identity() for mask in masks))
    if device.type == "cuda" and what != "blocks":  # which are finished when they are built
        if torch.cuda.is_current_stream_capturing():
            return make()
        key = (*key, torch.cuda.current_stream(device))
    return remembered.get(key, holds, make)
