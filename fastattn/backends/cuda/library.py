"""fastattn._cuda: whether it is there, what it was compiled for, which devices it sees.

FASTATTN_CUDA_EMULATION names a folder with a build of the same module whose kernels run on the CPU, made for tests by
csrc/cuda/emulation; no wheel holds it. The backend then takes CPU tensors, where it is asked for by name: dispatch
never chooses it for them.

FASTATTN_CUDA_KERNELS chooses between kernels for the same call: sm80, the default, multiplies by mma.sync on every
device; sm90, on Hopper alone, by wgmma in attention with head dims up to 128, forward and backward. The latter were not
run on a device yet, which is why they have to be asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TypedDict

import torch
from torch import Tensor

from fastattn.reference.philox import dropout_scale, dropout_threshold

_OLDEST_CAPABILITY = (8, 0)
_HOPPER = (9, 0)
KERNELS = {"sm80": 80, "sm90": 90}
_kernels = os.environ.get("FASTATTN_CUDA_KERNELS") or "sm80"
_EMULATION = "fastattn._cuda_emulation"
NO_DROPOUT = (0, 0, 1.0)


class Device(TypedDict):
    """One CUDA device as the driver describes it."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int


def load() -> ModuleType:
    """The module fastattn._cuda, or its emulation; ImportError where it was not built."""
    if emulated():
        return sys.modules.get(_EMULATION) or _load_emulation(os.environ["FASTATTN_CUDA_EMULATION"])
    return importlib.import_module("fastattn._cuda")


def emulated() -> bool:
    """Whether the kernels run in the emulation, on CPU tensors."""
    return bool(os.environ.get("FASTATTN_CUDA_EMULATION"))


def kernels() -> int:
    """80 or 90: which kernels a call asks for."""
    return KERNELS[_kernels]


@contextmanager
def use_kernels(name: str) -> Iterator[None]:
    """Within the block every call of the process asks for these kernels, where `kernels_reason` has nothing against
    them."""
    global _kernels
    before, _kernels = _kernels, name
    try:
        yield
    finally:
        _kernels = before


def kernels_reason(name: str, found: Sequence[Device]) -> str | None:
    """Why these kernels cannot run on the devices of this machine, or None."""
    for index, device in enumerate(found):
        if name == "sm90" and not emulated() and device["capability"] != _HOPPER:
            major, minor = device["capability"]
            return f"the sm90 kernels need compute capability 9.0, and cuda:{index} has {major}.{minor}"
    return None


def device_type() -> str:
    """The type of the tensors that the kernels take."""
    return "cpu" if emulated() else "cuda"


def _load_emulation(folder: str) -> ModuleType:
    files = sorted(Path(folder).glob("_cuda.*"))
    if not files:
        raise ImportError(f"FASTATTN_CUDA_EMULATION={folder!r} holds no _cuda module")
    # The name of the module inside decides what it is initialised as, so it is loaded as _cuda and kept under its own.
    spec = importlib.util.spec_from_file_location("_cuda", files[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return sys.modules.setdefault(_EMULATION, module)


def architectures() -> list[str]:
    """The architectures of the compiled kernels, such as sm_80 or, as PTX, compute_80; empty without the library."""
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
    if _kernels not in KERNELS:
        return f"FASTATTN_CUDA_KERNELS={_kernels!r} is unknown: set it to {' or '.join(KERNELS)}, or leave it unset"
    try:
        load()
    except ModuleNotFoundError:
        return "this installation has no CUDA library; it is built where nvcc is found (FASTATTN_CUDA=1 insists on it)"
    except ImportError as error:
        return f"the CUDA library does not load: {error}"
    try:
        found = devices()
    except RuntimeError as error:
        return f"no CUDA device answers: {error}"
    against = kernels_reason(_kernels, found)
    if against is not None or emulated():
        return against
    if not found:
        return "the CUDA driver sees no device"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device: it may be built without CUDA"
    for index, device in enumerate(found):
        if device["capability"] < _OLDEST_CAPABILITY:
            major, minor = device["capability"]
            return (
                f"cuda:{index} ({device['name']}) has compute capability {major}.{minor}; the kernels need 8.0 on "
                "every visible GPU (hide older ones: CUDA_VISIBLE_DEVICES)"
            )
    return None


def device_reasons(problem_device_type: str) -> list[str]:
    """Why the kernels refuse tensors of this device type; empty when they take them."""
    if problem_device_type == device_type():
        return []
    return [f"the CUDA backend does not run on {problem_device_type} tensors"]


def place(x: Tensor) -> dict[str, int]:
    """The device of x and its current stream, as every call of the module takes them."""
    if x.device.type != "cuda":
        return {"device": 0, "stream": 0}
    stream = torch.cuda.current_stream(x.device)
    return {"device": x.device.index, "stream": int(stream.cuda_stream)}


def multiprocessors(x: Tensor) -> int:
    """Of the device of x; a handful in the emulation."""
    if x.device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)


def dropout_arguments(seed: Tensor | None, p: float) -> tuple[int, int, float]:
    """The seed's address (it is read on the device), 16-bit threshold and scale of kept elements."""
    return NO_DROPOUT if seed is None or p == 0.0 else (seed.data_ptr(), dropout_threshold(p), dropout_scale(p))
