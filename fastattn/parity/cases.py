"""The drawing of cases: (op, seed, index) names one random call, and naming it again draws it again."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastattn.parity.attention_cases import AttentionCase
from fastattn.parity.decode_cases import DecodeCase
from fastattn.parity.draw import DTYPES, THREAD_WEIGHTS, THREADS, Draw
from fastattn.parity.encoder_layer_cases import EncoderLayerCase
from fastattn.parity.rule import Conditions, ParityRow, check_ffn, check_gated_ffn, check_linear_act, check_norm

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "relu2")
_LEARNED = (
    *("q", "k", "v", "bias", "mask", "sinks", "x", "weight", "residual"),
    *("w1", "b1", "w2", "b2", "w_gate", "b_gate", "w_up", "b_up", "w_down", "b_down"),
)
"""The inputs of all operations that may have a gradient."""
_TOKEN = re.compile(r"(\d+)\.(\d+)")


class Case(Protocol):
    """One drawn call of an operation."""

    dtype: torch.dtype
    conditions: Conditions

    def describe(self) -> str:
        """What is called, in one line."""

    def run(self, backend: str | None) -> list[ParityRow]:
        """Checks the call; raises fastattn.NotSupported where the backend refuses it."""


def token(seed: int, index: int) -> str:
    """The name of a case of one op, as `fastattn verify --repro` takes it."""
    return f"{seed}.{index}"


def parse_token(text: str) -> tuple[int, int]:
    """Seed and index of a token. Raises ValueError for anything else."""
    found = _TOKEN.fullmatch(text)
    if found is None:
        raise ValueError(f"repro={text!r} is no case: pass what a failure printed, like 0.17")
    return int(found[1]), int(found[2])


def draw_case(op: str, seed: int, index: int, device: str = "cpu") -> Case:
    """Draws a case. op: a key of `OPERATIONS`; raises ValueError for another."""
    if op not in OPERATIONS:
        raise ValueError(f"op={op!r} is unknown: pass one of {', '.join(OPERATIONS)}")
    draw = Draw(seed, index, device)
    case: Case = OPERATIONS[op](draw)
    if case.conditions.grad and draw.chance(0.25):  # after all else, which stays what it was
        case.conditions = replace(case.conditions, frozen=frozenset(name for name in _LEARNED if draw.chance(0.5)))
    return case


def _conditions(draw: Draw, without: tuple[str, ...] = ()) -> Conditions:
    return Conditions(
        grad=draw.chance(0.85),
        seed=draw.integer(0, 2**31),
        poison=draw.chance(0.5),
        shift=draw.one_of((0, 1, 3), (3, 1, 1)),
        without_gradient=frozenset({draw.one_of(without)}) if without and draw.chance(0.15) else frozenset(),
        strided_gradients=draw.chance(0.3),
        threads=draw.one_of(THREADS, THREAD_WEIGHTS),
    )


def _lead(draw: Draw, most: int, least: int = 1) -> tuple[int, ...]:
    """Leading dimensions of x: 0 to 3 of them, mostly `least` to `most` rows together, seldom one or none at all."""
    if draw.chance(0.02):
        return draw.one_of(((0,), (2, 0)))
    rows = 1 if draw.chance(0.1) else draw.size(least, most)
    dims = draw.one_of((0, 1, 2, 3), (0.5, 3, 5, 1))
    if dims == 0:
        return ()
    lead = [1] * dims
    for d in range(dims - 1):
        lead[d] = draw.integer(1, max(1, min(4, rows)))
        rows = max(1, rows // lead[d])
    lead[-1] = rows
    return tuple(lead)


def _rows_laid_out(draw: Draw, x: Tensor) -> Tensor:
    orders = {2: ((0, 1),), 3: ((1, 0, 2), (0, 1, 2)), 4: ((2, 0, 1, 3), (0, 2, 1, 3))}
    return draw.laid_out(x, orders[x.dim()]) if x.dim() in orders else x


def _text(tensors: dict[str, Tensor], options: dict[str, Any]) -> str:
    shown = [
        f"{n} {str(t.dtype).removeprefix('torch.')}{tuple(t.shape)} strides {tuple(t.stride())}"
        for n, t in tensors.items()
    ]
    shown += [f"{n}={v.item() if isinstance(v, Tensor) else repr(v)}" for n, v in options.items()]
    return ", ".join(shown)


HIDDEN_SIZES = (64, 384, 768, 1024, 2048, 3584, 4096, 5120, 8192)  # of models: kernels have instances for whole chunks


class NormCase:
    """One drawn layer_norm or rms_norm call, with or without dropout and residual."""

    def __init__(self, draw: Draw) -> None:
        self.dtype = draw.one_of(DTYPES, (2, 1, 1))
        width = draw.one_of((draw.size(1, 5000), draw.one_of(HIDDEN_SIZES)), (1, 1))
        lead = _lead(draw, max(1, min(300, 40_000 // width)))
        kind = draw.one_of(("layer", "rms"))
        x = draw.normal((*lead, width), self.dtype, draw.one_of((1.0, 0.01, 30.0), (8, 1, 1)))
        if draw.chance(0.2):
            x = x + draw.one_of((0.5, 3.0))  # a mean that does not vanish
        self.tensors = {"x": _rows_laid_out(draw, x)}
        other = draw.one_of((self.dtype, torch.float32))
        if draw.chance(0.8):
            self.tensors["weight"] = draw.normal((width,), other)
        if kind == "layer" and draw.chance(0.7) and "weight" in self.tensors:
            self.tensors["bias"] = draw.normal((width,), other)
        self.options: dict[str, Any] = {"kind": kind, "eps": draw.one_of((1e-5, 1e-6, 1e-12, None), (4, 2, 1, 1))}
        if kind == "rms" and "weight" in self.tensors and draw.chance(0.3):
            self.options["offset"] = 1.0
        if draw.chance(0.5):
            residual = draw.normal((*lead, width), draw.one_of((self.dtype, torch.float32)))
            self.tensors["residual"] = _rows_laid_out(draw, residual)
        if draw.chance(0.3):
            self.options["dropout_p"] = draw.one_of((0.1, 0.5))
            self.options["dropout_seed"] = torch.tensor([draw.integer(-(2**62), 2**62)], device=draw.device)
        self.options["return_residual"] = draw.chance(0.6)
        self.conditions = _conditions(draw, ("y", "z") if self.options["return_residual"] else ())

    def describe(self) -> str:
        return _text(self.tensors, self.options)

    def run(self, backend: str | None) -> list[ParityRow]:
        return check_norm(**self.tensors, **self.options, backend=backend, conditions=self.conditions)


class LinearActCase:
    """One drawn linear_act call."""

    def __init__(self, draw: Draw) -> None:
        self.dtype = draw.one_of(DTYPES, (2, 1, 1))
        features = [draw.size(_smallest(self.dtype), 400) for _ in range(2)]
        self.tensors = _linear_inputs(draw, self.dtype, features[0])
        _add_linear(draw, self.tensors, "weight", "bias", features[1], features[0])
        self.options = {"activation": draw.one_of((None, "none", *ACTIVATIONS))}
        self.conditions = _conditions(draw)

    def describe(self) -> str:
        return _text(self.tensors, self.options)

    def run(self, backend: str | None) -> list[ParityRow]:
        return check_linear_act(**self.tensors, **self.options, backend=backend, conditions=self.conditions)


class FfnCase:
    """One drawn ffn call."""

    def __init__(self, draw: Draw) -> None:
        self.dtype = draw.one_of(DTYPES, (2, 1, 1))
        features, hidden, out = (draw.size(_smallest(self.dtype), most) for most in (200, 400, 200))
        self.tensors = _linear_inputs(draw, self.dtype, features)
        _add_linear(draw, self.tensors, "w1", "b1", hidden, features)
        _add_linear(draw, self.tensors, "w2", "b2", out, hidden)
        self.options = {"activation": draw.one_of(ACTIVATIONS)}
        self.conditions = _conditions(draw)
        self.options |= _hidden_dropout(draw)

    def describe(self) -> str:
        return _text(self.tensors, self.options)

    def run(self, backend: str | None) -> list[ParityRow]:
        tensors = {"b1": None, "b2": None, **self.tensors}
        return check_ffn(**tensors, **self.options, backend=backend, conditions=self.conditions)


class GatedFfnCase:
    """One drawn gated_ffn call."""

    def __init__(self, draw: Draw) -> None:
        self.dtype = draw.one_of(DTYPES, (2, 1, 1))
        features, hidden, out = (draw.size(_smallest(self.dtype), most) for most in (200, 400, 200))
        self.tensors = _linear_inputs(draw, self.dtype, features)
        _add_linear(draw, self.tensors, "w_gate", "b_gate", hidden, features)
        _add_linear(draw, self.tensors, "w_up", "b_up", hidden, features)
        _add_linear(draw, self.tensors, "w_down", "b_down", out, hidden)
        self.options = {"activation": draw.one_of(ACTIVATIONS)}
        self.conditions = _conditions(draw)
        self.options |= _hidden_dropout(draw)

    def describe(self) -> str:
        return _text(self.tensors, self.options)

    def run(self, backend: str | None) -> list[ParityRow]:
        return check_gated_ffn(**self.tensors, **self.options, backend=backend, conditions=self.conditions)


def _smallest(dtype: torch.dtype) -> int:
    """The smallest number of features to draw.

    The rule compares two maxima of rounding errors. A half dtype rounds intermediates, and the maximum over few
    elements is then a matter of luck: below 16 features a faultless kernel fails about once in a thousand cases.
    """
    return 1 if dtype is torch.float32 else 16


def _linear_inputs(draw: Draw, dtype: torch.dtype, features: int) -> dict[str, Tensor]:
    lead = _lead(draw, 120) if draw.chance(0.93) else _lead(draw, 1200, least=240)  # kernels change at 256 and 400 rows
    return {"x": _rows_laid_out(draw, draw.normal((*lead, features), dtype))}


def _add_linear(draw: Draw, tensors: dict[str, Tensor], weight: str, bias: str, rows: int, columns: int) -> None:
    dtype = tensors["x"].dtype
    scale = columns**-0.5
    if draw.chance(0.2):  # a transposed weight, as a Conv1D holds it
        tensors[weight] = draw.normal((columns, rows), dtype, scale).t()
    else:
        tensors[weight] = draw.laid_out(draw.normal((rows, columns), dtype, scale), ((0, 1),))
    if draw.chance(0.7):
        tensors[bias] = draw.normal((rows,), dtype)


def _hidden_dropout(draw: Draw) -> dict[str, Any]:
    if not draw.chance(0.3):
        return {}
    seed = torch.tensor([draw.integer(-(2**62), 2**62)], device=draw.device)
    return {"dropout_p": draw.one_of((0.1, 0.5)), "dropout_seed": seed}


OPERATIONS: dict[str, Any] = {
    "attention": AttentionCase,
    "attention_decode": DecodeCase,
    "norm": NormCase,
    "linear_act": LinearActCase,
    "ffn": FfnCase,
    "gated_ffn": GatedFfnCase,
    "encoder_layer": EncoderLayerCase,
}
