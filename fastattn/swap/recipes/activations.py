"""Activation modules of torch, of transformers, and of any class that spells one out, by the names that the kernels
have for them."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from fastattn.graphs import constant
from fastattn.nn import activations as torch_activations
from fastattn.nn.checks import why_not_unwatched
from fastattn.swap.expression import Expression, Input, Op, spelling_of
from fastattn.swap.reading import calls_forward_as_it_is

_TRANSFORMERS = "transformers.activations"
_MODULES = {
    "NewGELUActivation": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLUSquaredActivation": "relu2",
    "SiLUActivation": "silu",
}


def activation_name(function: object) -> str | None:
    """The kernel's name of an activation; None where no kernel computes exactly it, or a hook watches it."""
    if type(function).__module__ != _TRANSFORMERS:
        name = torch_activations.activation_name(function)
        if name is None and isinstance(function, nn.Module) and why_not_unwatched(function) is None:
            name = _name_by_forward(type(function))
        return name
    if not isinstance(function, nn.Module) or why_not_unwatched(function) is not None:
        return None
    kind = type(function).__name__
    module: Any = function
    if kind == "GELUActivation":
        return "gelu" if module.act in (nn.functional.gelu, module._gelu_python) else None
    if kind == "GELUTanh":
        return "gelu_tanh" if _is_gelu_tanh(module) else None
    return _MODULES.get(kind)


def _is_gelu_tanh(function: Any) -> bool:
    act = function.act
    if isinstance(act, functools.partial):
        return act.func is nn.functional.gelu and not act.args and act.keywords == {"approximate": "tanh"}
    return act == function._gelu_tanh_python


@constant
def _name_by_forward(kind: type[nn.Module]) -> str | None:
    """The name of what a class's forward spells out; where it was replaced since it was read, it is read again."""
    if kind.__module__.startswith("torch."):
        return None
    forward, name = _read.get(kind, (None, None))
    if forward is not kind.forward:
        forward = kind.forward
        spelling = spelling_of(kind) if calls_forward_as_it_is(kind) else None
        name = None if spelling is None or len(spelling.methods) > 1 else spelled_activation(spelling.expression)
        _read[kind] = forward, name
    return name


_read: dict[type[nn.Module], tuple[object, str | None]] = {}


def spelled_activation(expression: Expression) -> str | None:
    """The activation of the input that this expression is."""
    x = Input(0)
    found = activation_of(expression)
    if found is not None:
        return found[0] if found[1] == x else None
    match expression:
        case Op("mul", (Input(0), Op("sigmoid", (inner,), ())) | (Op("sigmoid", (inner,), ()), Input(0)), ()):
            factors = (Op("mul", (x, 1.702)), Op("mul", (1.702, x)))
            return "silu" if inner == x else "quick_gelu" if inner in factors else None
    return None


def activation_of(expression: Any) -> tuple[str, Any] | None:
    """The name of an activation in torch's functions, and what it is done to."""
    match expression:
        case Op("relu" | "silu" as name, (inner,), ()):
            return name, inner
        case Op("gelu", (inner,), (("approximate", "tanh"),)):
            return "gelu_tanh", inner
        case Op("gelu", (inner,), () | (("approximate", "none"),)):
            return "gelu", inner
        case Op("square", (Op("relu", (inner,), ()),), ()) | Op("pow", (Op("relu", (inner,), ()), 2), ()):
            return "relu2", inner
    return None


def why_not_activation(function: object) -> str | None:
    """None where a kernel computes the activation."""
    if activation_name(function) is not None:
        return None
    return f"is {torch_activations.shown(function)}, which has no kernel"
