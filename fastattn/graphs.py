"""What torch.compile is told of functions, without Dynamo being imported for it: that takes most of a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """As torch.compiler.assume_constant_result: a graph holds what the function gives while it is traced."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_exporting() -> bool:
    """Whether torch.export traces, to whom sizes are any. torch 2.7, whose own function says so of every graph, does
    not tell a strict export from torch.compile: there it is False for both."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))
