"""The numbers under which the native libraries know dtypes and activations: the enums of csrc/common/problem.h."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "quick_gelu": 5, "relu2": 6}


def dtype_code(tensor: Tensor | None) -> int:
    """The number of its dtype; 0, which nobody reads, for a tensor that is not there."""
    return 0 if tensor is None else DTYPES[tensor.dtype]
