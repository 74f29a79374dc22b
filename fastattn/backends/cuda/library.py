"""fastattn._cuda: whether it is there, what it was compiled for, which devices it sees."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import TypedDict

import torch

_OLDEST_CAPABILITY = (8, 0)


class Device(TypedDict):
    """One CUDA device as the driver describes it."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int


def load() -> ModuleType:
    """The module fastattn._cuda; ImportError where it was not built."""
    return importlib.import_module("fastattn._cuda")


def architectures() -> list[str]:
    """The architectures of the compiled kernels, such as sm_80 or, as PTX, compute_90; empty without the library."""
    try:
        return list(load().architectures())
    except ImportError:
        return []


def devices() -> list[Device]:
    """The devices that the library sees. ImportError without the library, RuntimeError without a driver."""
    return list(load().devices())


@functools.cache
def unavailable_reason() -> str | None:
    """Why the CUDA kernels cannot run on this machine, or None."""
    try:
        load()
    except ModuleNotFoundError:
        return "this installation has no CUDA library; it is built where nvcc is found (FASTATTN_CUDA=1 insists on it)"
    except ImportError as error:
        return f"the CUDA library does not load: {error}"
    try:
        found = devices()
    except RuntimeError as error:
        return str(error)
    if not found:
        return "the CUDA driver sees no device"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device: it may be built without CUDA"
    for index, device in enumerate(found):
        if device["capability"] < _OLDEST_CAPABILITY:
            major, minor = device["capability"]
            return f"cuda:{index} ({device['name']}) has compute capability {major}.{minor}; the kernels need 8.0"
    return None
