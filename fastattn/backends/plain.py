"""What runs inside an operator as plain PyTorch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def plain(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Without autograd, and without autocast, which would otherwise reach the matrix products inside an operator."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        has_autocast = torch.amp.is_autocast_available(device)
        with torch.no_grad(), torch.autocast(device, enabled=False) if has_autocast else contextlib.nullcontext():
            return function(*args, **kwargs)

    return run
