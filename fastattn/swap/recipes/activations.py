"""Activation modules of torch and of transformers, by the names that the kernels have for them."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from fastattn.nn import activations as torch_activations
from fastattn.nn.checks import why_not_unwatched

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
        return torch_activations.activation_name(function)
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


def why_not_activation(function: object) -> str | None:
    """None where a kernel computes the activation."""
    if activation_name(function) is not None:
        return None
    return f"is {torch_activations.shown(function)}, which has no kernel"
