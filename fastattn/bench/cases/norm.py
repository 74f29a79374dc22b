"""Cases of layer norm and RMS norm, with the residual add in front of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastattn.bench.cases.base import OpCase, Work, generator, itemsize
from fastattn.bench.truth import Expected, norm_truth


@dataclass(frozen=True, kw_only=True)
class NormCase(OpCase):
    """y = norm(z) with z = x + residual, which is given back too; without a residual z = x."""

    suite: ClassVar[str] = "norm"

    kind: Literal["layer", "rms"]
    rows: int
    width: int
    residual: bool = True
    eps: float = 1e-5

    @property
    def outputs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("y", "z") if self.residual else ("y",)

    def parameters(self) -> dict[str, object]:
        return {n: getattr(self, n) for n in ("kind", "rows", "width", "residual", "eps")}

    def work(self, direction: str) -> Work:
        """Bytes of the large tensors: forward reads x (and residual), writes y (and z); backward reads dy and z (and
        dz), writes dx, which is the residual's gradient too."""
        tensor = float(self.rows * self.width * itemsize(self.dtype))
        forward, backward = (4, 4) if self.residual else (2, 3)
        count = {"forward": forward, "backward": backward, "both": forward + backward}[direction]
        flops = 8.0 * self.rows * self.width * {"forward": 1, "backward": 2, "both": 3}[direction]
        return Work(flops, count * tensor, "B")

    def tensors(self) -> dict[str, Tensor]:
        random = generator()
        shapes = {"x": (self.rows, self.width), "weight": (self.width,)}
        if self.kind == "layer":
            shapes["bias"] = (self.width,)
        if self.residual:
            shapes["residual"] = (self.rows, self.width)
        return {n: torch.randn(s, generator=random).to(self.device, self.dtype) for n, s in shapes.items()}

    def leaves(self) -> tuple[str, ...]:
        return tuple(self.tensor_names())

    def tensor_names(self) -> list[str]:
        return ["x", "weight", *(["bias"] if self.kind == "layer" else []), *(["residual"] if self.residual else [])]

    def output_gradients(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        random = generator().manual_seed(1)
        shape = (self.rows, self.width)
        return tuple(torch.randn(shape, generator=random).to(self.device, self.dtype) for _ in self.outputs)

    def expected(self, tensors: Mapping[str, Tensor], grads: tuple[Tensor, ...], *, backward: bool) -> list[Expected]:
        return norm_truth(self, tensors, grads, backward)
