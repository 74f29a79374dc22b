"""Lowering a mask for a packed batch, in coordinates within each sequence.

Bands, key ranges and intervals follow from cu_seqlens on the device. What needs blocks is built sequence by sequence,
which reads the lengths on the host, and is remembered as long as the mask's tensors and cu_seqlens stay the same.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor

from fastattn.masks import lowering
from fastattn.masks.base import Mask
from fastattn.masks.blocks import build_blocks
from fastattn.masks.lowered import Blocks, Index, LoweredMask, PackedSize, SequenceSize, Size, meet, replaced
from fastattn.masks.tiles import TileRule, tile_count


def lower_packed(mask: Mask, size: PackedSize, device: torch.device) -> LoweredMask:
    """The lowered form of the mask for these sequences; a band's offset is relative to each sequence's end.

    Raises ValueError where a tensor of the mask does not fit, and under torch.compile for masks that need blocks.
    """
    mask.check(size, device)
    lowered, heavy = LoweredMask(), []
    for term in mask.conjuncts():
        own = term.keys_and_band(size, device) if term.light else None
        if own is None:
            heavy.append(term)
        else:
            lowered = meet(lowered, own)
    if not heavy:
        return lowered
    own, rest = lowering.lower_simple(heavy, size, device)
    lowered = replaced(meet(lowered, own), intervals=own.intervals, bounds=own.bounds)
    if not rest or size.batch == 0:
        return lowered
    if torch.compiler.is_compiling():
        raise ValueError(
            f"mask={mask!r} needs blocks of each sequence, whose building reads the lengths: call attention_varlen "
            "outside of torch.compile, or with a mask of windows, ranges and intervals"
        )
    whole = functools.reduce(operator.and_, rest)
    cu_seqlens = (size.packed.cu_seqlens_q, size.packed.cu_seqlens_k)
    holds = (*whole.holds(), *cu_seqlens)
    name = ("packed", tuple(size), device, whole.identity())
    return replaced(lowered, blocks=lowering.remembered.get(name, holds, lambda: _blocks(whole, size, device)))


class OfEntry(Mask):
    """What one batch entry of a mask sees, as a mask for a batch of one whose sizes are those of the entry."""

    def __init__(self, mask: Mask, entry: int, size: Size) -> None:
        self.mask = mask
        self.entry = entry
        self.size = size

    def parts(self) -> tuple[Any, ...]:
        return self.mask, self.entry

    def rule(self, at: Index) -> Tensor:
        return self.mask.rule(at._replace(batch=at.batch + self.entry, size=self.size))

    def check(self, size: Size, device: torch.device | None) -> None:
        """Nothing: the tensors have the sizes of the whole batch."""

    @property
    def by_distance(self) -> bool:
        return self.mask.by_distance

    def extent(self, size: Size, device: torch.device) -> tuple[int, int]:
        return 1, self.mask.extent(self.size, device)[1]

    def at_head(self, head: int) -> Mask:
        return OfEntry(self.mask.at_head(head), self.entry, self.size)

    def tile_rule(self, size: Size, device: torch.device) -> TileRule:
        rule = self.mask.tile_rule(self.size, device)
        return lambda batch, rows: rule(self.entry, rows)

    def __repr__(self) -> str:
        return f"entry {self.entry} of {self.mask!r}"


def _blocks(mask: Mask, size: PackedSize, device: torch.device) -> Blocks:
    """The blocks of every sequence; where the mask is the same for all, built once per pair of lengths."""
    lengths = zip(size.packed.cu_seqlens_q.diff().tolist(), size.packed.cu_seqlens_k.diff().tolist(), strict=True)
    alike = mask.extent(size, device)[0] == 1
    built: dict[tuple[int, ...], Blocks] = {}
    found = []
    for entry, (queries, keys) in enumerate(lengths):
        key = (queries, keys) if alike else (queries, keys, entry)
        if key not in built:
            first = min(queries, size.len_q), min(keys, size.len_k)  # of those positions count from the whole one's end
            own = SequenceSize(Size(size.batch, size.heads, *first), queries, keys)
            built[key] = build_blocks(OfEntry(mask, entry, own), Size(1, size.heads, *first), device)
        found.append(built[key])
    return _stack(found, tile_count(size.len_q), tile_count(size.len_k))


def _stack(found: list[Blocks], rows: int, columns: int) -> Blocks:
    """The blocks of several batch entries as those of one batch of rows x columns blocks."""
    heads = max(own.row_ptr.shape[1] for own in found)  # an empty sequence may have blocks for one head only
    entries = bitmaps = 0
    parts: list[Blocks] = []
    for own in found:
        parts.append(
            Blocks(
                _lengthen(own.row_ptr, heads, rows) + entries,
                own.col,
                torch.where(own.id > 0, own.id + bitmaps, 0),
                own.bitmaps[1:] if parts else own.bitmaps,
                _lengthen(own.col_ptr, heads, columns) + entries,
                own.row,
                torch.where(own.row_id > 0, own.row_id + bitmaps, 0),
            )
        )
        entries += own.col.numel()
        bitmaps += own.bitmaps.shape[0] - 1
    return Blocks(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _lengthen(pointers: Tensor, heads: int, lines: int) -> Tensor:
    """The pointers for so many heads and lines; lines behind the last one are empty."""
    pointers = pointers.expand(-1, heads, -1)
    missing = lines + 1 - pointers.shape[2]
    return torch.cat([pointers, pointers[..., -1:].expand(-1, -1, missing)], dim=2)
