"""What every case has: a name, a place in a sweep, tensors, the work that counts, and the truth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastattn.bench.truth import Expected

DIRECTIONS = ("forward", "backward", "both")
"""forward without gradients; backward alone, through a kept graph; both: forward and backward."""

_SEED = 20261122


@dataclass(frozen=True)
class Work:
    """The least that a call must do: floating-point operations on visible work, and bytes of tensors moved once.

    counted: "FLOP" or "B", the one that rates are given in.
    """

    flops: float
    bytes: float
    counted: str

    @property
    def amount(self) -> float:
        return self.flops if self.counted == "FLOP" else self.bytes


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One computation at one size.

    group: the title of the table or plot that the case belongs to. axis: what varies within the group ("length", ...),
    with x the case's place on it; None for a list of unlike cases. compiled: the directions in which providers join
    that compile anew for every shape (torch.compile, FlexAttention), for seconds.
    """

    suite: ClassVar[str]

    name: str
    group: str
    device: str
    dtype: torch.dtype
    axis: str | None = None
    x: float = 0.0
    directions: tuple[str, ...] = ("forward", "both")
    compiled: tuple[str, ...] = DIRECTIONS

    @abstractmethod
    def parameters(self) -> dict[str, object]:
        """The sizes and options, as they go into the JSON file."""

    @abstractmethod
    def work(self, direction: str) -> Work:
        """What counts as done in that direction."""


@dataclass(frozen=True, kw_only=True)
class OpCase(Case):
    """A case of one operation: tensors in, tensors out."""

    outputs: ClassVar[tuple[str, ...]]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The inputs, the same for every provider; drawn anew from a fixed seed."""

    @abstractmethod
    def leaves(self) -> tuple[str, ...]:
        """The names of the inputs that get gradients."""

    @abstractmethod
    def output_gradients(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """A random gradient for each output."""

    @abstractmethod
    def expected(self, tensors: Mapping[str, Tensor], grads: tuple[Tensor, ...], *, backward: bool) -> list[Expected]:
        """The truths of the outputs and, if backward, of the gradients of the leaves ("d" + name)."""


def generator() -> torch.Generator:
    """The random numbers of a case: drawn on the CPU, so that every device gets the same ones."""
    return torch.Generator().manual_seed(_SEED)


def itemsize(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
