"""The dense bias: a float tensor added to the scores."""

from __future__ import annotations

from torch import Tensor

from fastattn.masks.arguments import describe


class Dense:
    """A float tensor that broadcasts to (B, Hq, Sq, Skv), in q's dtype or float32, on q's device.

    -inf hides a key; every finite value stays finite. It receives a gradient in its own shape.
    """

    def __init__(self, tensor: Tensor) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Dense: tensor is a {type(tensor).__name__}: pass a float tensor")
        if not tensor.is_floating_point():
            raise TypeError(
                f"Dense: tensor has dtype {tensor.dtype}: pass a float tensor (bool masks go to attention(mask=...))"
            )
        self.tensor = tensor

    def to_dense(self, batch: int, heads: int, len_q: int, len_k: int) -> Tensor:
        """The bias expanded to (batch, heads, len_q, len_k)."""
        return self.tensor.expand(batch, heads, len_q, len_k)

    def __repr__(self) -> str:
        return f"Dense({describe(self.tensor)})"
