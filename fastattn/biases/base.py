"""What every bias is: a description around one tensor that may be learned."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fastattn.biases.lowered import LoweredBias
from fastattn.masks.arguments import describe
from fastattn.masks.lowered import Size


class Bias(ABC):
    """A term added to the scores. It holds no shapes but those of its tensor, which receives the gradient."""

    tensor: Tensor

    def __init__(self, name: str, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{type(self).__name__}: {name} is a {type(tensor).__name__}: pass a float tensor")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}: {name} has dtype {tensor.dtype}: pass a float tensor (bool masks go to "
                "attention(mask=...))"
            )
        self.tensor = tensor

    @abstractmethod
    def with_tensor(self, tensor: Tensor) -> Bias:
        """The same bias around another tensor of that shape."""

    @abstractmethod
    def to_dense(self, batch: int, heads: int, len_q: int, len_k: int) -> Tensor:
        """The bias as a tensor (batch, heads, len_q, len_k), from its definition; differentiable."""

    @abstractmethod
    def lower(self, size: Size, dtype: torch.dtype) -> LoweredBias:
        """The lowered form for a call of this size, its functions of distance in `dtype`.

        ValueError where the tensor does not fit.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe(self.tensor)})"
