"""The lowered form of a mask: numbers and tensors on q's device that every kernel understands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastattn.packed import Packed


class Size(NamedTuple):
    """The shapes of a call that its mask has to fit: B, Hq, Sq, Skv."""

    batch: int
    heads: int
    len_q: int
    len_k: int

    @property
    def keys(self) -> int:
        """How many keys the sequence has, where positions count from its end."""
        return self.len_k

    def offset(self, align: str) -> int | Tensor:
        """Query i sits at key position i + offset: a number, or int32 (B,) where it differs between batch entries."""
        return self.len_k - self.len_q if align == "bottom-right" else 0


class PackedSize(Size):
    """The shapes of a packed batch: B sequences of at most Sq queries and Skv keys."""

    packed: Packed

    def __new__(cls, packed: Packed, heads: int) -> PackedSize:
        self = super().__new__(cls, packed.batch, heads, packed.max_len_q, packed.max_len_k)
        self.packed = packed
        return self

    def offset(self, align: str) -> int | Tensor:
        """As in Size, by the lengths of each sequence."""
        if align != "bottom-right":
            return 0
        return self.packed.cu_seqlens_k.diff() - self.packed.cu_seqlens_q.diff()


class SequenceSize(Size):
    """The shapes of a call of which one sequence is looked at that has other lengths: it fills a part of a cache, or is
    cut off behind its first Sq queries and Skv keys."""

    own: tuple[int, int]
    """Its queries and keys."""

    def __new__(cls, size: Size, queries: int, keys: int) -> SequenceSize:
        self = super().__new__(cls, *size)
        self.own = queries, keys
        return self

    @property
    def keys(self) -> int:
        return self.own[1]

    def offset(self, align: str) -> int:
        """As in Size, by the sequence's own lengths."""
        return self.own[1] - self.own[0] if align == "bottom-right" else 0


class Index(NamedTuple):
    """Where a mask is evaluated: int64 tensors that broadcast together, and the shapes of the call."""

    batch: Tensor
    head: Tensor
    query: Tensor
    key: Tensor
    size: Size

    def position(self, align: str) -> Tensor:
        """The key position at which the query sits."""
        offset = self.size.offset(align)
        return self.query + (offset[self.batch] if isinstance(offset, Tensor) else offset)


class Blocks(NamedTuple):
    """Form D: which keys are visible, in base blocks of 64 queries x 64 keys, nq x nk of them; sparse by rows (CSR).

    row_ptr   int32 (1|B, 1|Hq, nq + 1): the blocks of block row r are entries row_ptr[r] to row_ptr[r + 1] of col, id.
    col       int32 (n,): block column, ascending within a block row. A block that is not listed is empty.
    id        int32 (n,): 0 where all of the block is visible, else the row of `bitmaps` that says what is.
    bitmaps   int64 (m, 64), m >= 1, row 0 all ones: bit c of word r says that query r of the block sees its key c. What
              lies past the last query or key does not matter.
    col_ptr   int32 (1|B, 1|Hq, nk + 1): the transpose, for backward: the blocks of block column c.
    row       int32 (n,): block row, ascending within a block column.
    row_id    int32 (n,): `id` in that order.
    """

    row_ptr: Tensor
    col: Tensor
    id: Tensor
    bitmaps: Tensor
    col_ptr: Tensor
    row: Tensor
    row_id: Tensor


class LoweredMask(NamedTuple):
    """visible = keys and band and intervals and blocks and dense; a field left at its default hides nothing.

    key_start    int32 (B,): first visible key. May be negative.
    key_end      int32 (B,): one past the last visible key. May exceed Skv.
    band_offset  query i sits at key position i + band_offset; in a packed batch at that plus the keys less the queries
                 of its sequence.
    band_left    keeps j >= i + band_offset - band_left; None is unbounded. May be negative.
    band_right   keeps j <= i + band_offset + band_right; None is unbounded. May be negative.
    key_bits     int64 (B, ceil(Skv / 64)): bit j % 64 of word j // 64 says that key j is visible.
    intervals    int32 (R, 1|B, 1|Hq, Sq, 2): half-open key intervals per query, their union over R <= 4. Bounds may lie
                 outside [0, Skv]; start >= end is empty.
    bounds       int32 (R, 1|B, 1|Hq, ceil(Sq / 64), 4) beside intervals: per 64 queries the least and greatest start
                 and the least and greatest end. Comes with intervals, except with those a caller gave.
    blocks       form D.
    dense        bool, True is visible, 4-D. Lowering leaves dimensions of size 1; a backend gets it expanded to
                 (B, Hq, Sq, Skv) with strides 0. Strides 0 over heads and queries make it a key mask.
    lengths      (Sq, Skv) that a caller had the mask lowered for; no backend gets it.
    """

    key_start: Tensor | None = None
    key_end: Tensor | None = None
    band_offset: int = 0
    band_left: int | None = None
    band_right: int | None = None
    intervals: Tensor | None = None
    dense: Tensor | None = None
    key_bits: Tensor | None = None
    bounds: Tensor | None = None
    blocks: Blocks | None = None
    lengths: tuple[int, int] | None = None


NOTHING_HIDDEN = LoweredMask()

FLAT_FIELDS = len(LoweredMask._fields) - 2 + len(Blocks._fields)
"""Length of the flat form of a lowered mask: its fields in order, those of its blocks in place of `blocks`, without
`lengths`."""


def copied(lowered: LoweredMask) -> LoweredMask:
    """The same in tensors of its own, but for `dense`, which is the caller's."""
    blocks = None if lowered.blocks is None else Blocks(*(field.clone() for field in lowered.blocks))
    names = ("key_start", "key_end", "intervals", "key_bits", "bounds")
    own = {name: None if (field := getattr(lowered, name)) is None else field.clone() for name in names}
    return replaced(lowered, blocks=blocks, **own)


TupleT = TypeVar("TupleT", bound=tuple[Any, ...])


def replaced(fields: TupleT, **changes: Any) -> TupleT:
    """`fields._replace(**changes)` of a named tuple, which Dynamo of torch 2.7 does not trace."""
    kind: Any = type(fields)
    result: TupleT = kind(*[changes.get(name, value) for name, value in zip(kind._fields, fields, strict=True)])
    return result


def flatten(mask: LoweredMask) -> tuple[Any, ...]:
    """The flat form, which operators take."""
    blocks = (None,) * len(Blocks._fields) if mask.blocks is None else tuple(mask.blocks)
    return (*tuple(mask)[:-2], *blocks)  # a tuple: Dynamo of torch 2.7 cannot slice a named one


def unflatten(flat: Sequence[Any]) -> LoweredMask:
    """The lowered mask of a flat form."""
    own, blocks = flat[: -len(Blocks._fields)], flat[-len(Blocks._fields) :]
    return LoweredMask._make((*own, None if blocks[0] is None else Blocks._make(blocks), None))


def check_lowered(mask: LoweredMask, size: Size, device: torch.device) -> None:
    """TypeError or ValueError where a tensor of a lowered mask does not have the dtype it has in every mask, or the
    shape of a call of this size, or lies elsewhere."""
    batch, heads, len_q, len_k = size
    if mask.lengths is not None and mask.lengths != (len_q, len_k):
        raise ValueError(
            f"mask was lowered for (Sq, Skv) = {tuple(mask.lengths)}, but this call has {(len_q, len_k)}: lower it for "
            "these lengths"
        )
    rows, columns = (len_q + 63) // 64, (len_k + 63) // 64
    several = ((1, batch), (1, heads))
    shapes: dict[str, tuple[Tensor | None, torch.dtype, tuple[Any, ...]]] = {
        "key_start": (mask.key_start, torch.int32, (batch,)),
        "key_end": (mask.key_end, torch.int32, (batch,)),
        "key_bits": (mask.key_bits, torch.int64, (batch, columns)),
        "intervals": (mask.intervals, torch.int32, ((1, 2, 3, 4), *several, len_q, 2)),
        "bounds": (mask.bounds, torch.int32, ((1, 2, 3, 4), *several, rows, 4)),
        "dense": (mask.dense, torch.bool, (*several, (1, len_q), (1, len_k))),
    }
    if mask.blocks is not None:
        visible_blocks = mask.blocks.col.shape[:1]
        shapes["blocks.row_ptr"] = (mask.blocks.row_ptr, torch.int32, (*several, rows + 1))
        shapes["blocks.col_ptr"] = (mask.blocks.col_ptr, torch.int32, (*several, columns + 1))
        shapes["blocks.bitmaps"] = (mask.blocks.bitmaps, torch.int64, (mask.blocks.bitmaps.shape[0], 64))
        for name in ("col", "id", "row", "row_id"):
            shapes[f"blocks.{name}"] = (getattr(mask.blocks, name), torch.int32, visible_blocks)
    for name, (tensor, dtype, wanted) in shapes.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"mask.{name} has dtype {tensor.dtype}: pass {dtype}, as lower() of a mask gives it")
        if tensor.device != device:
            raise ValueError(f"mask.{name} lies on {tensor.device} but q on {device}: lower the mask for q's device")
        fits = tensor.dim() == len(wanted) and all(
            n in w if isinstance(w, tuple) else n == w for n, w in zip(tensor.shape, wanted, strict=True)
        )
        if not fits:
            raise ValueError(
                f"mask.{name} has shape {tuple(tensor.shape)}, which is not that of a call with "
                f"(B, Hq, Sq, Skv) = {tuple(size)}: lower the mask for these shapes"
            )


def visible(
    mask: LoweredMask, len_q: int, len_k: int, device: torch.device, ends: Tensor | None = None
) -> Tensor | None:
    """The mask as a bool tensor, True where visible, broadcastable to (B, Hq, Sq, Skv); None when nothing is hidden.

    ends: (B,), in a packed batch the number of keys less that of queries of each sequence.
    """
    query = torch.arange(len_q, device=device).view(-1, 1)
    key = torch.arange(len_k, device=device)
    terms = []
    if mask.key_start is not None:
        terms.append(key >= mask.key_start.view(-1, 1, 1, 1))
    if mask.key_end is not None:
        terms.append(key < mask.key_end.view(-1, 1, 1, 1))
    batches = 1 if ends is None else ends.shape[0]
    position = query + mask.band_offset + (0 if ends is None else ends.view(-1, 1, 1, 1))
    if mask.band_left is not None:
        terms.append((key >= position - mask.band_left).view(batches, 1, len_q, len_k))
    if mask.band_right is not None:
        terms.append((key <= position + mask.band_right).view(batches, 1, len_q, len_k))
    if mask.intervals is not None:
        start, end = mask.intervals[..., 0:1], mask.intervals[..., 1:2]
        terms.append(((key >= start) & (key < end)).any(dim=0))
    if mask.key_bits is not None:
        terms.append(unpack_words(mask.key_bits)[:, None, None, :len_k])
    if mask.blocks is not None:
        terms.append(_visible_blocks(mask.blocks)[:, :, :len_q, :len_k])
    if mask.dense is not None:
        terms.append(mask.dense)
    if not terms:
        return None
    seen = terms[0]
    for term in terms[1:]:
        seen = seen & term
    return seen


def unpack_words(words: Tensor) -> Tensor:
    """int64 (..., n) to bool (..., 64 n): bit c of a word is element c of its group of 64."""
    lane = torch.arange(64, device=words.device)
    return ((words.unsqueeze(-1) >> lane) & 1).flatten(-2).bool()


def block_lines(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Which line (batch entry, head, block row; counted in that order) each entry belongs to, and the entries, line by
    line; a line may share its entries with another."""
    start = blocks.row_ptr[..., :-1].flatten().long()
    count = blocks.row_ptr[..., 1:].flatten().long() - start
    line = torch.arange(start.numel(), device=start.device).repeat_interleave(count)
    before = count.cumsum(0) - count
    within = torch.arange(line.numel(), device=start.device) - before[line]
    return line, start[line] + within


def _visible_blocks(blocks: Blocks) -> Tensor:
    """bool (1|B, 1|Hq, 64 nq, 64 nk) of the blocks."""
    batches, heads = blocks.row_ptr.shape[:2]
    rows, columns = blocks.row_ptr.shape[2] - 1, blocks.col_ptr.shape[2] - 1
    line, entry = block_lines(blocks)
    words = blocks.bitmaps.new_zeros((batches * heads * rows, columns, 64))
    words[line, blocks.col[entry].long()] = blocks.bitmaps[blocks.id[entry].long()]
    seen = words.view(batches, heads, rows, columns, 64).movedim(4, 3)
    return unpack_words(seen.flatten(2, 3))


def intersect(a: LoweredMask, b: LoweredMask) -> LoweredMask:
    """The mask that keeps what both keep. ValueError where one has intervals or blocks, or they were lowered for other
    lengths: `&` joins any masks before they are lowered."""
    if any(m.intervals is not None or m.blocks is not None for m in (a, b)):
        raise ValueError("intersect takes lowered masks of keys, band and dense alone: lower `a & b` of the masks")
    if a.lengths is not None and b.lengths is not None and a.lengths != b.lengths:
        raise ValueError(f"intersect: one mask was lowered for (Sq, Skv) = {a.lengths}, the other for {b.lengths}")
    return replaced(meet(a, b), lengths=a.lengths or b.lengths)


def meet(a: LoweredMask, b: LoweredMask) -> LoweredMask:
    """What both keep by keys, band and dense; intervals and blocks are left to the caller."""
    offset = a.band_offset if _has_band(a) else b.band_offset
    lefts = [m.band_left + offset - m.band_offset for m in (a, b) if m.band_left is not None]
    rights = [m.band_right + m.band_offset - offset for m in (a, b) if m.band_right is not None]
    return LoweredMask(
        key_start=_meet(a.key_start, b.key_start, torch.maximum),
        key_end=_meet(a.key_end, b.key_end, torch.minimum),
        band_offset=offset,
        band_left=min(lefts) if lefts else None,
        band_right=min(rights) if rights else None,
        dense=_meet(a.dense, b.dense, torch.logical_and),
        key_bits=_meet(a.key_bits, b.key_bits, torch.bitwise_and),
    )


def _has_band(mask: LoweredMask) -> bool:
    return mask.band_left is not None or mask.band_right is not None


def _meet(a: Tensor | None, b: Tensor | None, both: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return both(a, b)
