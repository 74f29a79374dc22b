"""The mask protocol and the intersection of two masks."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fastattn.masks.lowered import LoweredMask, intersect


class Mask(ABC):
    """Which keys each query may see. Masks are descriptions: they hold no shapes but those of their own tensors.

    `a & b` keeps what both keep. Query i and key j count from 0 within their sequence.
    """

    @abstractmethod
    def lower(self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device) -> LoweredMask:
        """The lowered form for these shapes, its tensors on `device`.

        Raises ValueError where a tensor of the mask does not fit the shapes or lies on another device.
        """

    @abstractmethod
    def to_dense(
        self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device | str | None = None
    ) -> Tensor:
        """A bool tensor (batch, heads, len_q, len_k), True where visible, from the mask's definition.

        It does not go through the lowering, so that one checks the other. `device` defaults to that of the mask's
        tensors, or the CPU.
        """

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return And(self, other)


class And(Mask):
    """What both masks keep; written `a & b`."""

    def __init__(self, first: Mask, second: Mask) -> None:
        self.first = first
        self.second = second

    def lower(self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device) -> LoweredMask:
        return intersect(
            self.first.lower(batch, heads, len_q, len_k, device), self.second.lower(batch, heads, len_q, len_k, device)
        )

    def to_dense(
        self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device | str | None = None
    ) -> Tensor:
        first = self.first.to_dense(batch, heads, len_q, len_k, device)
        second = self.second.to_dense(batch, heads, len_q, len_k, device)
        if first.device != second.device:  # a positional mask beside one that holds tensors on an accelerator
            target = second.device if first.device.type == "cpu" else first.device
            first, second = first.to(target), second.to(target)
        return first & second

    def __repr__(self) -> str:
        return f"{self.first!r} & {self.second!r}"
