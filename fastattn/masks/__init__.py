"""Masks: pure descriptions of which keys a query may see, combined with `&`, `|` and `~`, and their lowering."""

from __future__ import annotations

from fastattn.masks.base import And, Mask, Not, Or
from fastattn.masks.bigbird import BigBird
from fastattn.masks.blocks import Tiles, retile
from fastattn.masks.documents import Document
from fastattn.masks.elementwise import Dense, Predicate
from fastattn.masks.heads import PerHead
from fastattn.masks.keys import KeyLengths, KeyMask, KeyRange
from fastattn.masks.lowered import Blocks, LoweredMask, intersect, visible
from fastattn.masks.positional import Causal, GlobalTokens, PrefixLM, SinkTokens, SlidingWindow
from fastattn.masks.sparse import Dilated, Longformer, Strided

__all__ = [
    "And",
    "BigBird",
    "Blocks",
    "Causal",
    "Dense",
    "Dilated",
    "Document",
    "GlobalTokens",
    "KeyLengths",
    "KeyMask",
    "KeyRange",
    "Longformer",
    "LoweredMask",
    "Mask",
    "Not",
    "Or",
    "PerHead",
    "Predicate",
    "PrefixLM",
    "SinkTokens",
    "SlidingWindow",
    "Strided",
    "Tiles",
    "intersect",
    "retile",
    "visible",
]
