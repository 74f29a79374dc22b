"""Masks that are known only element by element: a bool tensor, a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.masks.arguments import as_4d, check_bool, check_device, describe
from fastattn.masks.base import Mask
from fastattn.masks.lowered import Index, LoweredMask, Size

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Dense(Mask):
    """Keeps what a bool tensor says, True is visible; any shape that broadcasts to (B, Hq, Sq, Skv), on q's device."""

    light = True

    def __init__(self, tensor: Tensor) -> None:
        check_bool("Dense", "tensor", tensor)
        if tensor.dim() > 4:
            raise ValueError(f"Dense: tensor has shape {tuple(tensor.shape)}: at most 4 dimensions (B, Hq, Sq, Skv)")
        self.tensor = tensor
        self._shown = True

    def parts(self) -> tuple[Any, ...]:
        return self.tensor, self._shown

    def check(self, size: Size, device: torch.device | None) -> None:
        check_device("Dense", self.tensor, device)
        as_4d("mask", self.tensor, size)

    def extent(self, size: Size, device: torch.device) -> tuple[int, int]:
        shape = (1,) * (4 - self.tensor.dim()) + tuple(self.tensor.shape)
        return shape[0], shape[1]

    def rule(self, at: Index) -> Tensor:
        tensor = self.tensor[(None,) * (4 - self.tensor.dim())].to(at.batch.device)
        index = (i if n > 1 else torch.zeros_like(i) for i, n in zip(at[:4], tensor.shape, strict=True))
        return tensor[tuple(index)] == self._shown

    def negated(self) -> Mask:
        other = Dense(self.tensor)
        other._shown = not self._shown
        return other

    def keys_and_band(self, size: Size, device: torch.device) -> LoweredMask:
        tensor = as_4d("mask", self.tensor, size)
        return LoweredMask(dense=tensor if self._shown else ~tensor)

    def __repr__(self) -> str:
        return f"Dense({describe(self.tensor)})"


class Predicate(Mask):
    """Keeps key k for query q where fn(b, h, q, k) is True.

    fn: a torch function of int64 index tensors (batch entry, query head, query, key, each counted from 0) that
    broadcast together; it returns a bool tensor of their common shape, or one that broadcasts to it. It is called on
    tiles of 64 x 64, never on Sq x Skv, once per mask and shapes, and its results are kept: what it captures must not
    change. It promises memory, not time: every tile is evaluated that no mask joined by `&` hides as a whole.

    Raises TypeError where fn is no function, and on use where it returns no bool tensor, ValueError where that does not
    broadcast to the shape of the indices.
    """

    def __init__(self, fn: Rule) -> None:
        if not callable(fn):
            raise TypeError(f"Predicate: fn is a {type(fn).__name__}: pass a function fn(b, h, q, k) of index tensors")
        self.fn = fn

    def parts(self) -> tuple[Any, ...]:
        return (self.fn,)

    def extent(self, size: Size, device: torch.device) -> tuple[int, int]:
        """Known from the shape of a result for one query and key, not from values."""
        if 0 in size:
            return 1, 1
        batch = torch.arange(size.batch, device=device).view(-1, 1, 1, 1)
        head = torch.arange(size.heads, device=device).view(1, -1, 1, 1)
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
        at = Index(batch, head, zero, zero, size)
        shape = self.rule(at).shape
        shape = torch.Size((1,) * (4 - len(shape))) + shape
        return shape[0], shape[1]

    def rule(self, at: Index) -> Tensor:
        seen = self.fn(*at[:4])
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
            found = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
            raise TypeError(f"Predicate: fn returned {found}: return a bool tensor, True where visible")
        shape = torch.broadcast_shapes(*(index.shape for index in at[:4]))
        sizes = zip(seen.shape[::-1], shape[::-1], strict=False)
        if seen.dim() > len(shape) or any(own not in (1, size) for own, size in sizes):
            raise ValueError(
                f"Predicate: fn returned a tensor of shape {tuple(seen.shape)}, which does not broadcast to the "
                f"{tuple(shape)} of its indices: index a tensor that it captures by them, as in table[h]"
            )
        return seen

    def __repr__(self) -> str:
        return f"Predicate({getattr(self.fn, '__qualname__', None) or repr(self.fn)})"
