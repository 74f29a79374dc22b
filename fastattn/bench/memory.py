"""Peak memory of one call: how far it rises above what was there before, results and kept activations included.

On a GPU, torch's own count. On Linux CPUs, the rise of the process's resident memory during one call, with the C
allocator told to give every freed block above 64 KiB back at once, so that memory is counted that is in use and not
what was kept from earlier; scratch space of native kernels counts too. Unknown (None) elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_GIVE_BACK, _KEEP = 64 * 2**10, 32 * 2**20  # 32 MiB is where glibc's own threshold ends up in a long run


def peak_memory(call: Callable[[], object], device: str, *, grad: bool) -> int | None:
    """Bytes by which memory rises, at its highest, during one call that has run before."""
    with torch.set_grad_enabled(grad):
        return _cuda(call) if device == "cuda" else _resident(call)


def _cuda(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _resident(call: Callable[[], object]) -> int | None:
    if not _STATUS.exists() or not _CLEAR.exists():
        return None
    with _freed_blocks_are_given_back() as give_back:
        if give_back is None:
            return None
        call()  # scratch space that a library keeps for good is not this call's
        give_back(0)  # also the pages of free blocks between used ones
        before = _status("VmRSS")
        try:
            _CLEAR.write_text("5")  # sets the high-water mark back to what is resident now
        except OSError:
            return None
        call()
        return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def _freed_blocks_are_given_back() -> Iterator[Callable[[int], int] | None]:
    """Sets glibc's thresholds inside, and outside to what they grow to by themselves. Gives malloc_trim; None without
    glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield None
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _GIVE_BACK)
    libc.mallopt(_M_TRIM_THRESHOLD, _GIVE_BACK)
    try:
        yield libc.malloc_trim
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _KEEP)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * _KEEP)
