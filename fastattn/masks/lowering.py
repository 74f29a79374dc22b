"""Which of the forms A to D a mask takes: the smallest that serves.

A mask is split into the masks it is the "and" of. Lengths, ranges and windows become A and B: numbers and tensors of
size B, made on every call. Key masks become A's words; what is a few intervals per query becomes C, all such terms
together as long as four intervals hold them. What is left becomes D. Those three are remembered for the shapes and the
device, D also by itself, so that it stays when tensors beside it change; under torch.compile A to C are traced and D is
built outside of the graph.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastattn.graphs import is_exporting
from fastattn.masks.blocks import build_blocks
from fastattn.masks.cache import Cache, is_capturing, stream_of
from fastattn.masks.intervals import MOST, IntervalSet, intersection, intervals_tensor, row_bounds
from fastattn.masks.lowered import NOTHING_HIDDEN, Blocks, LoweredMask, Size, meet, replaced

if TYPE_CHECKING:
    from fastattn.masks.base import Mask

T = TypeVar("T")

remembered = Cache(entries=128, size=1 << 29)
"""Words of key masks, intervals and blocks, of all masks."""


class Split(NamedTuple):
    """A mask as the "and" of others.

    light     terms that every call lowers anew, and `heavy` those whose lowering is remembered.
    limits    of the light ones those without tensors: they hide whole blocks once and for all.
    identity, holds  of heavy and limits, what their lowering is remembered by.
    """

    light: tuple[Mask, ...]
    heavy: tuple[Mask, ...]
    limits: tuple[Mask, ...]
    identity: tuple[Any, ...]
    holds: tuple[Any, ...]


def split(mask: Mask) -> Split:
    """The mask in its parts."""
    terms = mask.conjuncts()
    light = tuple(term for term in terms if term.light)
    heavy = tuple(term for term in terms if not term.light)
    limits = tuple(term for term in light if heavy and not term.holds())
    named = heavy + limits
    identity = tuple(term.identity() for term in named)
    return Split(light, heavy, limits, identity, tuple(x for term in named for x in term.holds()))


def lower(mask: Mask, size: Size, device: torch.device) -> LoweredMask:
    """The lowered form of the mask. ValueError where one of its tensors does not fit the shapes or the device."""
    mask.check(size, device)
    if torch.compiler.is_compiling():
        terms = mask.conjuncts()
        lowered = _lower_light([term for term in terms if term.light], size, device)
        heavy = tuple(term for term in terms if not term.light)
        limits = tuple(term for term in terms if term.light and not term.holds())
        own = _lower_heavy(heavy, limits, size, device)
    else:
        light, heavy, limits, identity, holds = mask.split()
        lowered = _lower_light(light, size, device)
        if not heavy:
            return lowered
        own = _remember("all", identity, holds, size, device, lambda: _lower_heavy(heavy, limits, size, device))
    if own.key_bits is None and own.intervals is None and own.blocks is None:
        return lowered
    return replaced(lowered, key_bits=own.key_bits, intervals=own.intervals, bounds=own.bounds, blocks=own.blocks)


def _lower_light(terms: Sequence[Mask], size: Size, device: torch.device) -> LoweredMask:
    lowered: LoweredMask | None = None
    for term in terms:
        own = term.keys_and_band(size, device) or NOTHING_HIDDEN
        lowered = own if lowered is None else meet(lowered, own)
    return lowered or NOTHING_HIDDEN


def _lower_heavy(terms: tuple[Mask, ...], limits: tuple[Mask, ...], size: Size, device: torch.device) -> LoweredMask:
    """The words, intervals and blocks of `terms`."""
    lowered, rest = lower_simple(terms, size, device)
    if rest:
        simple = [term for term in terms if term not in rest]
        lowered = replaced(lowered, blocks=_blocks(rest, [*limits, *simple], size, device))
    return lowered


def lower_simple(terms: Sequence[Mask], size: Size, device: torch.device) -> tuple[LoweredMask, list[Mask]]:
    """The words and intervals of `terms`, and those of them that need blocks."""
    lowered = NOTHING_HIDDEN
    intervals: IntervalSet | None = None
    rest: list[Mask] = []
    for term in terms:
        own = term.keys_and_band(size, device)
        if own is not None:
            lowered = meet(lowered, own)
            continue
        found = term.intervals(size, device)
        both = found if found is None or intervals is None else intersection(intervals, found)
        if both is None or both.slots() > MOST:
            rest.append(term)
        else:
            intervals = both
    if intervals is not None and not intervals.is_everything():
        tensor = intervals_tensor(intervals, size.len_q, size.len_k, device)
        # An exported graph would serve either one row of blocks or several, not both.
        bounds = None if is_exporting() else row_bounds(tensor)
        lowered = replaced(lowered, intervals=tensor, bounds=bounds)
    return lowered, rest


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
    if is_exporting() or device.type == "meta":
        raise NotImplementedError(
            f"{mask!r} needs blocks, whose building reads values, and here are none: pass what its lower(...) gave for "
            "real tensors, as an input of the graph"
        )
    if torch.compiler.is_compiling():
        from fastattn.masks.outside import blocks_outside

        return blocks_outside(mask, size, device, within)
    return remembered_blocks(mask, size, device, within)


def remembered_blocks(mask: Mask, size: Size, device: torch.device, within: Mask | None) -> Blocks:
    """The blocks of a mask, but for what `within` hides."""
    identity = (mask.identity(), None if within is None else within.identity())
    return _remember("blocks", identity, mask.holds(), size, device, lambda: build_blocks(mask, size, device, within))


def _remember(
    what: str,
    identity: tuple[Any, ...],
    holds: tuple[Any, ...],
    size: Size,
    device: torch.device,
    make: Callable[[], T],
) -> T:
    key: tuple[Any, ...] = (what, size, device, identity)
    if device.type == "cuda" and what != "blocks":  # which are finished when they are built
        if is_capturing():
            return make()
        key = (*key, stream_of(device))
    return remembered.get(key, holds, make)
