"""Masks: pure descriptions of which keys a query may see, combined with `&`, and their lowering."""

from __future__ import annotations

from fastattn.masks.base import And, Mask
from fastattn.masks.keys import Dense, KeyLengths, KeyMask, KeyRange
from fastattn.masks.lowered import LoweredMask, intersect, visible
from fastattn.masks.positional import Causal, SlidingWindow

__all__ = [
    "And",
    "Causal",
    "Dense",
    "KeyLengths",
    "KeyMask",
    "KeyRange",
    "LoweredMask",
    "Mask",
    "SlidingWindow",
    "intersect",
    "visible",
]
