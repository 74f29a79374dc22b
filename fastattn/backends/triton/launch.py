"""The one place where Triton kernels are launched, and where compile_check listens to what would be."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fastattn.backends.triton.interpreter import at_speed


class Launch(NamedTuple):
    """One launch: the kernel, its arguments by name (tensors, numbers, None, constants) and the compiler's options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


class Recorder(NamedTuple):
    """What `recording` hands out: the architecture to plan for and the launches that would have been made."""

    arch: int
    launches: list[Launch]


_recorder: Recorder | None = None


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Within the block nothing is launched: the backend's functions, called with meta tensors, leave their launches in
    the list, planned for compute capability `arch` (90 for 9.0). Not for threads."""
    global _recorder
    before, _recorder = _recorder, Recorder(arch, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = before


def is_recording() -> bool:
    """Whether launches are recorded, of tensors on any device."""
    return _recorder is not None


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], **options: int) -> None:
    """Runs a kernel with those of `arguments` that it names. An empty grid launches nothing."""
    if 0 in grid:
        return
    taken = {name: arguments[name] for name in kernel.arg_names}
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, taken, options))
        return
    device = next(a.device for a in taken.values() if isinstance(a, torch.Tensor))
    # Triton launches on the current device's current stream; this makes it that of the arguments.
    with torch.cuda.device(device) if device.type == "cuda" else at_speed():
        kernel[grid](**taken, **options)


def architecture(device: torch.device) -> int:
    """Compute capability to choose tiles by, as 90 for 9.0; 0 for the interpreter."""
    if _recorder is not None:
        return _recorder.arch
    return _capability(device.index or 0) if device.type == "cuda" else 0


def multiprocessors(device: torch.device) -> int:
    """Those to share work out among; a Hopper GPU's where launches are recorded, 0 for the interpreter."""
    if device.type == "cuda":
        return _count(device.index or 0)
    return 132 if _recorder is not None else 0


def dot_precision() -> str:
    """What tl.dot multiplies float32 tiles in: "tf32" where the user lets torch's products round so, else "ieee"."""
    matmul = torch.backends.cuda.matmul
    allowed = getattr(matmul, "fp32_precision", None)  # torch >= 2.9; once it is set, the older question raises
    if allowed is None:
        allowed = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if allowed == "tf32" else "ieee"


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@functools.cache
def _count(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
