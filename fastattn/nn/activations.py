"""Which activation functions the kernels compute, by the names that `fastattn.ffn` takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.nn.checks import why_not_unwatched
from fastattn.reference.ffn import ACTIVATIONS

Activation = str | Callable[[Tensor], Tensor]

_FUNCTIONS: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.SiLU: "silu"}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def activation_name(activation: object) -> str | None:
    """The kernel's name of an activation: a name itself, a function or a module of torch; None where no kernel computes
    exactly it."""
    if isinstance(activation, str):
        return activation if activation in ACTIVATIONS else None
    if isinstance(activation, nn.Module):
        if why_not_unwatched(activation) is not None:
            return None
        if type(activation) is nn.GELU:
            return _GELU.get(activation.approximate)
        return _MODULES.get(type(activation))
    if isinstance(activation, functools.partial):
        is_gelu = activation.func is F.gelu and not activation.args and set(activation.keywords) <= {"approximate"}
        return _GELU.get(activation.keywords.get("approximate", "none")) if is_gelu else None
    try:
        return _FUNCTIONS.get(activation)
    except TypeError:  # a callable that does not hash
        return None


def activation_function(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The activation as a function in torch operations."""
    return ACTIVATIONS[activation] if isinstance(activation, str) else activation


def why_not_activation(activation: object) -> str | None:
    """None where a kernel computes the activation."""
    if activation_name(activation) is not None:
        return None
    return f"is {shown(activation)}, which has no kernel"


def shown(activation: object) -> str:
    """A function's name, or that of a module's class."""
    return getattr(activation, "__name__", type(activation).__name__)
