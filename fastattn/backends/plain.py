"""What runs inside an operator as plain PyTorch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def plain(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Without autograd, and without autocast."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        with torch.no_grad(), without_autocast(device):
            return function(*args, **kwargs)

    return run


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast of that type of device would reach the matrix products inside an operator."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
