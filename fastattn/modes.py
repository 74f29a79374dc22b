"""Function modes of our own that have nothing to see of a kernel's call."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


class Transparent(TorchFunctionMode):
    """Base of the modes under which small calls may go the short way, which calls no torch function."""


def has_function_mode() -> bool:
    """Whether a mode is on that would see an operator."""
    if not torch._C._is_torch_function_mode_enabled():
        return False
    return torch._C._len_torch_function_stack() != 1 or not isinstance(torch._C._get_function_stack_at(0), Transparent)
