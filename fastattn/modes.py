"""Function modes that have nothing to see of a kernel's call."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext


class Transparent(TorchFunctionMode):
    """Base of the modes of our own under which small calls may go the short way, which calls no torch function."""


TRANSPARENT = (Transparent, DeviceContext)
"""Our own, and that of torch.set_default_device and `with torch.device(...)`, which looks at nothing but functions that
make tensors."""


def has_function_mode() -> bool:
    """Whether a mode is on that would see an operator."""
    if not torch._C._is_torch_function_mode_enabled():
        return False
    stack = range(torch._C._len_torch_function_stack())
    return any([not isinstance(torch._C._get_function_stack_at(i), TRANSPARENT) for i in stack])
