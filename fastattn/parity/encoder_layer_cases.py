"""Random encoder layers: sizes beside the thresholds of the kernels, masks, packed sequences, both orders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.masks import Causal, KeyLengths, SlidingWindow
from fastattn.parity.draw import DTYPES, THREAD_WEIGHTS, THREADS, Draw
from fastattn.parity.rule import Conditions, ParityRow, check_encoder_layer

_ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "relu2", None)
_HEAD_DIMS = (8, 16, 24, 32, 64, 17)
_MOST_SCORES = 400_000  # elements of all score matrices of a case: keeps the float64 truth at some 20 milliseconds


class EncoderLayerCase:
    """One drawn encoder_layer call."""

    def __init__(self, draw: Draw) -> None:
        self.dtype = draw.one_of(DTYPES, (2, 1, 1))
        heads, dim = draw.integer(1, 4), draw.one_of(_HEAD_DIMS, (2, 3, 2, 4, 1, 1))
        if draw.chance(0.04):
            heads, dim = 9, 64  # features past one block of the products
        if self.dtype is not torch.float32:
            dim = max(dim, 16)  # over fewer features the largest rounding error is a matter of luck
        features, hidden = heads * dim, draw.size(16, 900)
        self.options: dict[str, Any] = {
            "heads": heads,
            "activation": draw.one_of(_ACTIVATIONS, (1, 4, 1, 1, 1, 1, 1)),
            "norm_first": draw.chance(0.4),
            "eps1": draw.one_of((1e-5, 1e-12)),
            "eps2": draw.one_of((1e-5, 1e-6)),
        }
        if draw.chance(0.2):
            self.options["scale"] = draw.one_of((0.5, 1.5)) * dim**-0.5
        x = self._input(draw, heads, features)
        self.tensors = {"x": x}
        for name, rows, columns in (
            *((n, features, features) for n in "qkvo"),
            ("1", hidden, features),
            ("2", features, hidden),
        ):
            weight = draw.normal((rows, columns), self.dtype, columns**-0.5)
            self.tensors["w" + name] = draw.laid_out(weight, ((0, 1),))
            if draw.chance(0.8):
                self.tensors["b" + name] = draw.normal((rows,), self.dtype)
        for number in (1, 2):
            kind = draw.one_of((self.dtype, torch.float32))
            if draw.chance(0.9):
                self.tensors[f"norm{number}_weight"] = draw.normal((features,), kind)
                if draw.chance(0.9):
                    self.tensors[f"norm{number}_bias"] = draw.normal((features,), kind)
        self.conditions = Conditions(
            grad=False,
            poison=draw.chance(0.5),
            shift=draw.one_of((0, 1, 3), (3, 1, 1)),
            threads=draw.one_of(THREADS, THREAD_WEIGHTS),
        )

    def _input(self, draw: Draw, heads: int, features: int) -> Tensor:
        """x, with the mask or the bounds of packed sequences that belong to it among the options."""
        rows = draw.one_of((draw.integer(1, 40), draw.integer(33, 130), draw.integer(100, 700)), (2, 3, 3))
        rows = min(rows, 200_000 // features)
        if draw.chance(0.25):
            bounds = sorted(draw.integer(0, rows) for _ in range(draw.integer(0, 5)))
            bounds = [b for b in bounds for _ in range(draw.one_of((1, 2), (5, 1)))]  # some sequences are empty
            self.options["cu_seqlens"] = torch.tensor([0, *bounds, rows], dtype=torch.int32, device=draw.device)
            return draw.laid_out(draw.normal((rows, features), self.dtype), ((0, 1), (1, 0)))
        batch = draw.integer(1, 5)
        length = max(1, min(rows // batch, int((_MOST_SCORES / (batch * heads)) ** 0.5)))
        if draw.chance(0.05):
            length = 1
        self.options["mask"] = self._mask(draw, batch, heads, length)
        x = draw.normal((0 if draw.chance(0.02) else batch, length, features), self.dtype)
        if x.numel() == 0:
            self.options["mask"] = None
        return draw.laid_out(x, ((0, 1, 2), (1, 0, 2)))

    def _mask(self, draw: Draw, batch: int, heads: int, length: int) -> Any:
        kind = draw.one_of(("none", "keys", "lengths", "causal", "window", "ranges", "dense"), (3, 4, 1, 1, 1, 2, 1))
        if kind == "keys":
            keys = draw.bits((batch, 1, 1, length), 0.7)
            if draw.chance(0.3):
                keys[0] = False  # a wholly padded sample
            return keys
        if kind == "lengths":
            lengths = [draw.integer(0, length) for _ in range(batch)]
            return KeyLengths(torch.tensor(lengths, dtype=torch.int32, device=draw.device))
        if kind == "causal":
            return Causal("top-left")
        if kind == "window":
            return SlidingWindow(draw.integer(0, length), draw.integer(0, length))
        if kind == "ranges":
            ends = draw.normal((batch, 1, length, 2), torch.float32, length / 2).abs().to(torch.int32)
            return ends.sort(dim=-1).values
        if kind == "dense":
            return draw.bits((batch, draw.one_of((1, heads)), length, length), 0.6)
        return None

    def describe(self) -> str:
        shown = [
            f"{n} {str(t.dtype).removeprefix('torch.')}{tuple(t.shape)} strides {tuple(t.stride())}"
            for n, t in self.tensors.items()
        ]
        options = {
            n: f"{v.dtype!s} {tuple(v.shape)}" if isinstance(v, Tensor) and n == "mask" else repr(v)
            for n, v in self.options.items()
        }
        return ", ".join([*shown, *(f"{n}={text}" for n, text in options.items())])

    def run(self, backend: str | None) -> list[ParityRow]:
        return check_encoder_layer(self.tensors, **self.options, backend=backend, conditions=self.conditions)
