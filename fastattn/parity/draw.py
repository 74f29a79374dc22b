"""Seeded random choices and tensors with awkward memory layouts, shared by the drawing of all cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

THREADS, THREAD_WEIGHTS = (1, 2, 3), (6, 3, 1)  # of the call under test; most cases are too small to need more
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Draw:
    """One stream of choices; (seed, index) names it, and replaying the name replays every choice and every number."""

    def __init__(self, seed: int, index: int, device: str = "cpu") -> None:
        self.numbers = np.random.Generator(np.random.PCG64([seed, index]))
        self.generator = torch.Generator().manual_seed(int(self.numbers.integers(2**62)))
        self.device = device

    def chance(self, probability: float) -> bool:
        return bool(self.numbers.random() < probability)

    def one_of(self, options: Sequence[T], weights: Sequence[float] | None = None) -> T:
        p = None if weights is None else np.asarray(weights, dtype=float) / sum(weights)
        return options[int(self.numbers.choice(len(options), p=p))]

    def integer(self, low: int, high: int) -> int:
        """Uniform in [low, high], both ends included."""
        return int(self.numbers.integers(low, high + 1))

    def size(self, low: int, high: int) -> int:
        """Log-uniform in [low, high]: small sizes as often as large ones."""
        return round(float(np.exp(self.numbers.uniform(np.log(low), np.log(high)))))

    def normal(self, shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Normal random numbers, contiguous, on the device of the draw."""
        return (scale * torch.randn(tuple(shape), generator=self.generator)).to(dtype).to(self.device)

    def bits(self, shape: Sequence[int], density: float) -> Tensor:
        """A bool tensor whose elements are True with the given probability."""
        return (torch.rand(tuple(shape), generator=self.generator) < density).to(self.device)

    def laid_out(self, tensor: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
        """The same values in another memory layout.

        One of: contiguous, one of the given dimension orders (outermost first), such an order with gaps between all
        strides but the last, or (seldom) with a last dimension that is not contiguous. Gaps hold whatever was there;
        the guard bands of a check fill them with NaN.
        """
        kind = self.one_of(("contiguous", "order", "gaps", "strided last"), (4, 4, 3, 0.5))
        if kind == "contiguous":
            return tensor
        order = list(self.one_of(orders)) if kind != "strided last" else list(range(tensor.dim()))
        padded = [tensor.size(d) for d in order]
        if kind == "gaps":
            padded = [n + self.integer(0, 2) for n in padded[:-1]] + [padded[-1] + self.integer(1, 9)]
        step = 2 if kind == "strided last" else 1
        padded[-1] *= step
        buffer = torch.empty(padded, dtype=tensor.dtype, device=tensor.device)
        view = buffer.permute([order.index(d) for d in range(tensor.dim())])[..., ::step]
        view = view[tuple(slice(0, n) for n in tensor.shape)]
        return view.copy_(tensor)
