"""Cases of feed-forward blocks: plain and gated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastattn.bench.cases.base import OpCase, Work, generator, itemsize
from fastattn.bench.truth import Expected, ffn_truth
from fastattn.parity.magnitude import near_kink


@dataclass(frozen=True, kw_only=True)
class FfnCase(OpCase):
    """act(x W1^T + b1) W2^T + b2 or, gated, (act(x Wg^T) * x Wu^T) Wd^T without biases."""

    suite: ClassVar[str] = "ffn"
    outputs: ClassVar[tuple[str, ...]] = ("y",)

    rows: int
    width: int
    hidden: int
    activation: str
    gated: bool = False
    bias: bool = True

    def parameters(self) -> dict[str, object]:
        return {n: getattr(self, n) for n in ("rows", "width", "hidden", "activation", "gated", "bias")}

    def work(self, direction: str) -> Work:
        """A matrix product counts 2 per multiplication and addition; the backward of each is two of its size."""
        products = 3 if self.gated else 2
        forward = 2.0 * products * self.rows * self.width * self.hidden
        weights, rows = products * self.width * self.hidden, self.rows * self.width
        size = itemsize(self.dtype)
        flops = {"forward": forward, "backward": 2 * forward, "both": 3 * forward}[direction]
        moved = {"forward": weights + 2 * rows, "backward": 2 * weights + 3 * rows, "both": 3 * weights + 5 * rows}
        return Work(flops, float(moved[direction] * size), "FLOP")

    def leaves(self) -> tuple[str, ...]:
        if self.gated:
            return ("x", "w_gate", "w_up", "w_down")
        return ("x", "w1", "b1", "w2", "b2") if self.bias else ("x", "w1", "w2")

    def tensors(self) -> dict[str, Tensor]:
        random = generator()
        into, out_of = (self.hidden, self.width), (self.width, self.hidden)
        shapes: dict[str, tuple[int, ...]] = {"x": (self.rows, self.width)}
        if self.gated:
            shapes |= {"w_gate": into, "w_up": into, "w_down": out_of}
        else:
            shapes |= {"w1": into, "b1": (self.hidden,), "w2": out_of, "b2": (self.width,)}

        def draw(name: str) -> Tensor:
            spread = 1.0 if name == "x" else shapes[name][-1] ** -0.5
            return (torch.randn(shapes[name], generator=random) * spread).to(self.device, self.dtype)

        return {name: draw(name) for name in self.leaves()}

    def output_gradients(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Rows in which a pre-activation lies at the kink of relu get gradient 0: rounding alone decides theirs."""
        grad = torch.randn((self.rows, self.width), generator=generator().manual_seed(1))
        grad = grad.to(self.device, self.dtype)
        if self.activation == "relu":
            undecided = near_kink(tensors["x"], tensors["w1"], tensors.get("b1"), self.activation)
            grad = grad.masked_fill(undecided.unsqueeze(-1), 0)
        return (grad,)

    def expected(self, tensors: Mapping[str, Tensor], grads: tuple[Tensor, ...], *, backward: bool) -> list[Expected]:
        return ffn_truth(self, tensors, grads[0] if backward else None)
