"""The dense bias: a float tensor added to the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.biases.base import Bias
from fastattn.biases.lowered import LoweredBias
from fastattn.masks.arguments import as_4d
from fastattn.masks.lowered import Size


class Dense(Bias):
    """A float tensor that broadcasts to (B, Hq, Sq, Skv), in q's dtype or float32, on q's device.

    -inf hides a key; every finite value stays finite. It receives a gradient in its own shape.
    """

    def __init__(self, tensor: Tensor) -> None:
        super().__init__("tensor", tensor)

    def with_tensor(self, tensor: Tensor) -> Dense:
        return Dense(tensor)

    def to_dense(self, batch: int, heads: int, len_q: int, len_k: int) -> Tensor:
        return self.tensor.expand(batch, heads, len_q, len_k)

    def lower(self, size: Size, dtype: torch.dtype) -> LoweredBias:
        return LoweredBias(dense=as_4d("bias", self.tensor, size))
