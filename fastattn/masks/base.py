"""The mask protocol and its algebra: and, or, not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.masks import lowering, tiles
from fastattn.masks.arguments import as_whole
from fastattn.masks.intervals import IntervalSet, complement, intersection, union
from fastattn.masks.lowered import Index, LoweredMask, Size, copied, replaced
from fastattn.masks.tiles import EMPTY, FULL, TileRule, rule_of_intervals, unknown

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_PAIRS_AT_ONCE = 1 << 22


class Mask(ABC):
    """Which keys each query may see. Masks are descriptions: they hold no shapes but those of their own tensors.

    `a & b` keeps what both keep, `a | b` what either keeps, `~a` what a hides. Query i and key j count from 0 within
    their sequence. Two masks are equal when they are built alike from equal numbers and the very same tensors and
    functions; a mask is not changed after it was built, and a function or tensor in it is one whose results stay.
    """

    # ---------------------------------------------------------------------------------------------- what a user calls

    def lower(self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device | str) -> LoweredMask:
        """The lowered form for these shapes, its tensors on `device`; see `fastattn.masks.lowering` for its choice.

        `attention` does this itself, and takes the result in the mask's place: a mask that needs blocks is lowered
        before a graph that may not break, under torch.compile(fullgraph=True) or while a CUDA graph is captured.

        Raises ValueError where a tensor of the mask does not fit the shapes or lies on another device, TypeError for
        sizes that are no whole numbers.
        """
        size = _sizes(batch, heads, len_q, len_k)
        lowered = copied(lowering.lower(self, size, torch.device(device)))  # which the caller may write to
        return replaced(lowered, lengths=(size.len_q, size.len_k))

    def to_dense(
        self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device | str | None = None
    ) -> Tensor:
        """A bool tensor (batch, heads, len_q, len_k), True where visible, from the mask's definition.

        It does not go through the lowering, so that one checks the other. `device` defaults to that of the mask's
        tensors, or the CPU.
        """
        size = _sizes(batch, heads, len_q, len_k)
        self.check(size, None)
        place = self.home() if device is None else torch.device(device)
        entry, head, query, key = (torch.arange(n, device=place) for n in size)
        step = max(1, _PAIRS_AT_ONCE // max(1, batch * heads * len_k))
        parts = []
        for rows in query.split(step):
            at = Index(entry.view(-1, 1, 1, 1), head.view(-1, 1, 1), rows.view(-1, 1), key, size)
            parts.append(self.rule(at).expand(batch, heads, rows.numel(), len_k))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def tiles(self, len_q: int, len_k: int, batch: int | None = None, heads: int | None = None) -> Tensor:
        """int8 (1|B, 1|Hq, ceil(Sq / 64), ceil(Skv / 64)): 0 where a tile of 64 queries x 64 keys is empty, 1 where it
        is partly visible, 2 where it is full. batch and heads default to those of the mask's tensors, or 1; it has a
        row per batch entry or head only where they differ. On the device of the mask's tensors."""
        return tiles.tile_grid(self, *self._sized(len_q, len_k, batch, heads))

    def density(self, len_q: int, len_k: int, batch: int | None = None, heads: int | None = None) -> float:
        """The share of (query, key) pairs that are visible, from 0 to 1; 0 where there are none. Exact, and counted
        tile by tile. batch and heads default to those of the mask's tensors, or 1."""
        return tiles.density(self, *self._sized(len_q, len_k, batch, heads))

    def plot(self, len_q: int, len_k: int, ax: Axes | None = None, *, entry: int = 0, head: int = 0) -> Axes:
        """Draws the tiles of one batch entry and head, keys to the right and queries downwards, and returns the axes.

        ax: matplotlib axes to draw on; a new figure by default. Raises ImportError without matplotlib.
        """
        from fastattn.masks.plot import plot

        return plot(self, len_q, len_k, ax, entry, head)

    def __and__(self, other: Mask) -> Mask:
        return And(self, other) if isinstance(other, Mask) else _no_mask(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other) if isinstance(other, Mask) else _no_mask(self, other)

    __rand__ = __ror__ = __and__  # of what is no mask: none of them gets here

    def __bool__(self) -> bool:
        raise TypeError(
            f"{self!r} has no truth value, so `and`, `or` and `not` would drop a mask: combine masks with &, | and ~"
        )

    def __invert__(self) -> Mask:
        return Not(self)

    def __eq__(self, other: object) -> bool:
        return self.identity() == other.identity() if isinstance(other, Mask) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.identity())

    @abstractmethod
    def __repr__(self) -> str:
        """The mask as one would write it."""

    # ------------------------------------------------------------------------------------------- what defines a mask

    @abstractmethod
    def parts(self) -> tuple[Any, ...]:
        """What the mask is built from: numbers, strings, tensors, functions, masks."""

    @abstractmethod
    def rule(self, at: Index) -> Tensor:
        """The definition: a bool tensor that broadcasts to the index, True where visible."""

    def check(self, size: Size, device: torch.device | None) -> None:
        """Raises ValueError where a tensor does not fit these shapes, or lies elsewhere than `device` if given."""
        for part in self.parts():
            if isinstance(part, Mask):
                part.check(size, device)

    def extent(self, size: Size, device: torch.device) -> tuple[int, int]:
        """(1|B, 1|Hq): over how many batch entries and heads the mask differs, from the shapes of its tensors."""
        batches, heads = 1, 1
        for part in self.parts():
            if isinstance(part, Mask):
                own_batches, own_heads = part.extent(size, device)
                batches, heads = max(batches, own_batches), max(heads, own_heads)
        return batches, heads

    def at_head(self, head: int) -> Mask:
        """The mask that one head sees."""
        return self

    # ------------------------------------------------------------------------------ what the lowering asks of a mask

    light = False
    """Lowers to keys, band or a tensor as it is, without work that would be worth remembering."""

    @property
    def by_distance(self) -> bool:
        """Whether the rule knows nothing but the distance from the query's position to the key's."""
        simpler = self.simpler()
        return simpler is not None and simpler.by_distance

    def simpler(self) -> Mask | None:
        """The same mask in terms of others, if it has a name only for convenience."""
        return None

    def negated(self) -> Mask | None:
        """What the mask hides, if that is again a mask with a form of its own."""
        return None

    def conjuncts(self) -> tuple[Mask, ...]:
        """Masks that together, by and, are this one."""
        simpler = self.simpler()
        return (self,) if simpler is None else simpler.conjuncts()

    def keys_and_band(self, size: Size, device: torch.device) -> LoweredMask | None:
        """The form A and B of the mask, or its tensor, if it is no more than that."""
        return None

    def intervals(self, size: Size, device: torch.device) -> IntervalSet | None:
        """The keys that each query sees, as intervals; None where it is not a few of them."""
        simpler = self.simpler()
        return None if simpler is None else simpler.intervals(size, device)

    def tile_rule(self, size: Size, device: torch.device) -> TileRule:
        """What is known of whole tiles without looking at their elements."""
        simpler = self.simpler()
        if simpler is not None:
            return simpler.tile_rule(size, device)
        intervals = self.intervals(size, device)
        return unknown(size, device) if intervals is None else rule_of_intervals(intervals, size, device)

    # --------------------------------------------------------------------------------------------- built on the above

    def identity(self) -> tuple[Any, ...]:
        """What equality compares: the class and the parts, tensors and functions by their identity."""
        return (type(self), *(_identity(part) for part in self.parts()))

    def holds(self) -> tuple[Any, ...]:
        """The tensors and functions in the mask, whose identity is part of the mask's."""
        found: list[Any] = []
        for part in self.parts():
            if isinstance(part, Mask):
                found += part.holds()
            elif isinstance(part, Tensor) or callable(part):
                found.append(part)
        return tuple(found)

    def split(self) -> lowering.Split:
        """`lowering.split` of the mask, which is done once."""
        found: lowering.Split | None = self.__dict__.get("_split")
        if found is None:
            found = self.__dict__["_split"] = lowering.split(self)
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Without what names tensors by their identity, which a copy does not share."""
        return {name: value for name, value in self.__dict__.items() if name != "_split"}

    def home(self) -> torch.device:
        """Where the mask's tensors lie: the first device that is not the CPU."""
        devices = [x.device for x in self.holds() if isinstance(x, Tensor)]
        return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))

    def _sized(self, len_q: int, len_k: int, batch: int | None, heads: int | None) -> tuple[Size, torch.device]:
        device = self.home()
        own_batch, own_heads = self.extent(Size(1, 1, len_q, len_k), device)
        size = Size(batch or own_batch, heads or own_heads, len_q, len_k)
        self.check(size, None)
        return size, device


def _sizes(*numbers: int) -> Size:
    """B, Hq, Sq, Skv; TypeError or ValueError where one is no number of 0 or more."""
    names = ("batch", "heads", "len_q", "len_k")
    return Size(*(as_whole("mask", name, n, 0, "") for name, n in zip(names, numbers, strict=True)))


def _no_mask(mask: Mask, other: object) -> Any:
    if isinstance(other, Tensor):
        raise TypeError(
            f"{mask!r} is combined with a tensor: make a mask of it first, Dense(tensor) of one that broadcasts to (B, "
            "Hq, Sq, Skv) or KeyMask(tensor) of one of (B, Skv), both bool and True where visible"
        )
    return NotImplemented


def _identity(part: Any) -> Any:
    if isinstance(part, Mask):
        return part.identity()
    return id(part) if isinstance(part, Tensor) or callable(part) else part


class And(Mask):
    """What both masks keep; written `a & b`."""

    def __init__(self, first: Mask, second: Mask) -> None:
        self.first = first
        self.second = second

    def parts(self) -> tuple[Any, ...]:
        return self.first, self.second

    def rule(self, at: Index) -> Tensor:
        return self.first.rule(at) & self.second.rule(at)

    @property
    def by_distance(self) -> bool:
        return self.first.by_distance and self.second.by_distance

    def at_head(self, head: int) -> Mask:
        return And(self.first.at_head(head), self.second.at_head(head))

    def negated(self) -> Mask:
        return Or(~self.first, ~self.second)

    def conjuncts(self) -> tuple[Mask, ...]:
        return self.first.conjuncts() + self.second.conjuncts()

    def intervals(self, size: Size, device: torch.device) -> IntervalSet | None:
        first, second = self.first.intervals(size, device), self.second.intervals(size, device)
        return None if first is None or second is None else intersection(first, second)

    def tile_rule(self, size: Size, device: torch.device) -> TileRule:
        first, second = self.first.tile_rule(size, device), self.second.tile_rule(size, device)
        return lambda batch, rows: torch.minimum(first(batch, rows), second(batch, rows))

    def __repr__(self) -> str:
        return f"{_bracketed(self.first, Or)} & {_bracketed(self.second, Or)}"


class Or(Mask):
    """What either mask keeps; written `a | b`."""

    def __init__(self, first: Mask, second: Mask) -> None:
        self.first = first
        self.second = second

    def parts(self) -> tuple[Any, ...]:
        return self.first, self.second

    def rule(self, at: Index) -> Tensor:
        return self.first.rule(at) | self.second.rule(at)

    @property
    def by_distance(self) -> bool:
        return self.first.by_distance and self.second.by_distance

    def at_head(self, head: int) -> Mask:
        return Or(self.first.at_head(head), self.second.at_head(head))

    def negated(self) -> Mask:
        return And(~self.first, ~self.second)

    def intervals(self, size: Size, device: torch.device) -> IntervalSet | None:
        first, second = self.first.intervals(size, device), self.second.intervals(size, device)
        return None if first is None or second is None else union(first, second)

    def tile_rule(self, size: Size, device: torch.device) -> TileRule:
        first, second = self.first.tile_rule(size, device), self.second.tile_rule(size, device)
        return lambda batch, rows: torch.maximum(first(batch, rows), second(batch, rows))

    def __repr__(self) -> str:
        return f"{self.first!r} | {self.second!r}"


class Not(Mask):
    """What a mask hides; written `~a`."""

    def __init__(self, operand: Mask) -> None:
        self.operand = operand

    def parts(self) -> tuple[Any, ...]:
        return (self.operand,)

    def rule(self, at: Index) -> Tensor:
        return ~self.operand.rule(at)

    @property
    def by_distance(self) -> bool:
        return self.operand.by_distance

    def at_head(self, head: int) -> Mask:
        return Not(self.operand.at_head(head))

    def simpler(self) -> Mask | None:
        return self.operand.negated()

    def negated(self) -> Mask:
        return self.operand

    def intervals(self, size: Size, device: torch.device) -> IntervalSet | None:
        inner = self.operand.intervals(size, device)
        return None if inner is None else complement(inner)

    def tile_rule(self, size: Size, device: torch.device) -> TileRule:
        inner = self.operand.tile_rule(size, device)
        return lambda batch, rows: EMPTY + FULL - inner(batch, rows)

    def __repr__(self) -> str:
        return f"~{_bracketed(self.operand, (And, Or))}"


def _bracketed(mask: Mask, looser: type[Mask] | tuple[type[Mask], ...]) -> str:
    """The mask's text, in brackets where its operator binds less tightly than the one around it."""
    return f"({mask!r})" if isinstance(mask, looser) else repr(mask)
