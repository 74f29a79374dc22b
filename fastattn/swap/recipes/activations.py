"""Activation modules of torch, of transformers, and of any class that spells one out, by the names that the kernels
have for them; and modules that multiply one half of their input by the other, activated, as GEGLU and SwiGLU."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import nn

from fastattn.graphs import constant
from fastattn.nn import activations as torch_activations
from fastattn.nn.checks import why_not_unwatched
from fastattn.swap.expression import Expression, Input, Op, Spelling, spelling_of
from fastattn.swap.reading import calls_forward_as_it_is
from fastattn.swap.recipes.norm_spellings import uncast, widenings

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
        spelling = _spelling(kind)
        name = None if spelling is None else spelled_activation(spelling.expression)
        _read[kind] = forward, name
    return name


_read: dict[type[nn.Module], tuple[object, str | None]] = {}


def _spelling(kind: type[nn.Module]) -> Spelling | None:
    """What a class computes that has no helpers, which an instance might replace."""
    spelling = spelling_of(kind) if calls_forward_as_it_is(kind) else None
    return None if spelling is None or len(spelling.methods) > 1 else spelling


def spelled_activation(expression: Expression) -> str | None:
    """The activation of the input that this expression is; in float32 and narrowed again, as kernels do it, too."""
    x = Input(0)
    inner, is_narrowed = uncast(expression)
    found = activation_of(inner)
    if found is not None:
        return found[0] if found[1] == x or (is_narrowed and found[1] in widenings(x)) else None
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


class Halves(NamedTuple):
    """The product of one half of something, activated, and the other."""

    activation: str
    gate: str
    """Which half is activated: "first" or "second"."""
    whole: Any
    """What is cut."""


def halves_of_product(expression: Any) -> Halves | None:
    match expression:
        case Op("mul", (first, second), ()):
            for under, beside in ((first, second), (second, first)):
                match activation_of(under), beside:
                    case (str(name), Op("getitem", (whole, int(i)))), Op("getitem", (other, int(j))) if whole == other:
                        cut = cut_in_halves(whole)
                        if cut is not None and {i, j} == {0, 1}:
                            return Halves(name, "second" if i else "first", cut)
    return None


def cut_in_halves(expression: Any) -> Any:
    """What is cut in halves along its last dimension."""
    match expression:
        case Op("chunk", (whole, 2), (("dim", -1),)):
            return whole
    return None


@constant
def glu_activation(kind: type) -> str | None:
    """The name of the activation in a class that is a product of its input's halves; None for any other."""
    found = _glu(kind)
    return None if found is None else found.activation


@constant
def glu_gate(kind: type) -> str | None:
    """As `glu_activation`: which half is activated."""
    found = _glu(kind)
    return None if found is None else found.gate


def _glu(kind: type) -> Halves | None:
    if not issubclass(kind, nn.Module) or kind.__module__.startswith("torch."):
        return None
    forward, found = _glus.get(kind, (None, None))
    if forward is not kind.forward:
        spelling = _spelling(kind)
        found = None if spelling is None else halves_of_product(spelling.expression)
        found = found if found is not None and found.whole == Input(0) else None
        _glus[kind] = kind.forward, found
    return found


_glus: dict[type[nn.Module], tuple[object, Halves | None]] = {}


def why_not_glu(child: object) -> str | None:
    """None where a gated kernel makes the product that a module is."""
    if isinstance(child, nn.Module) and glu_gate(type(child)) is not None:
        return why_not_unwatched(child)
    return f"is {torch_activations.shown(child)}, which has no kernel"


def why_not_activation(function: object) -> str | None:
    """None where a kernel computes the activation."""
    if activation_name(function) is not None:
        return None
    return f"is {torch_activations.shown(function)}, which has no kernel"
