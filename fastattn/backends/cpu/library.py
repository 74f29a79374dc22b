"""Loading libfastattn_cpu.so, and how its functions want their arguments.

torch is imported first, so that the library shares the OpenMP runtime that torch has loaded. The thread count is passed
with every call: a new Python thread would otherwise ignore `torch.set_num_threads`, and a forked worker would hang in a
region of several threads.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from fastattn.reference.philox import dropout_scale, dropout_threshold

NO_DROPOUT = (0, 0, 1.0)


@functools.cache
def nothing(dtype: torch.dtype) -> Tensor:
    """A result that is not asked for, in inference: to make one takes a microsecond, a tenth of a small call. Made in
    the first call, below whatever mode or transform sees that: this module may be imported within one."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=dtype, device="cpu")


@functools.cache
def native() -> ModuleType:
    """The pybind11 module over the library; ImportError where it was not built."""
    from fastattn import _cpu

    return _cpu


@functools.cache
def unavailable_reason() -> str | None:
    """Why the native CPU kernels cannot run here, or None."""
    try:
        module = native()
    except ImportError as error:
        return f"the native CPU library is not installed ({error}); install fastattn where a C++20 compiler is found"
    wanted = os.environ.get("FASTATTN_CPU_ISA")
    if wanted and wanted not in module.available_isas():
        return f"FASTATTN_CPU_ISA={wanted!r} is not one of the available {', '.join(module.available_isas())}"
    return None


matmul_precision: Callable[[], str] = (
    functools.partial(torch._C._get_fp32_precision_getter, "mkldnn", "matmul")  # torch >= 2.9
    if hasattr(torch._C, "_get_fp32_precision_getter")
    else torch._C._get_float32_matmul_precision
)
"""What torch multiplies float32 in on CPUs; not written in Python, as functional.direct needs it."""


def rounds_float32() -> bool:
    """Whether the user lets products on CPUs round float32 operands to bfloat16, where that is faster: by
    `torch.set_float32_matmul_precision("medium")` or `torch.backends.mkldnn.matmul.fp32_precision = "bf16"`."""
    return matmul_precision() in ("bf16", "medium")


def multiplies_rounded() -> bool:
    """Whether the instruction set in use makes use of that: with AMX, and by AVX-512 BF16 on AMD processors."""
    return native().multiplies_rounded()


def isa() -> str:
    """The instruction set in use."""
    return native().isa()


def has_avx512() -> bool:
    """Whether the kernels are here and use AVX-512, with or without its bfloat16 products and AMX."""
    return unavailable_reason() is None and (isa().startswith("avx512") or isa() == "amx")


def available_isas() -> list[str]:
    """The instruction sets that were built and that this machine has, best first."""
    return native().available_isas()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the kernels of another instruction set inside the block, process-wide. ValueError for one not available."""
    before = isa()
    if not native().set_isa(name):
        raise ValueError(f"isa={name!r} is not available here: pass one of {', '.join(available_isas())}")
    try:
        yield
    finally:
        native().set_isa(before)


def dropout_arguments(seed: Tensor | None, dropout_p: float) -> tuple[int, int, float]:
    """Philox key, 16-bit threshold and scale of kept elements."""
    threshold = dropout_threshold(dropout_p)
    if seed is None or threshold == 0:
        return NO_DROPOUT
    return int(seed) & 0xFFFF_FFFF_FFFF_FFFF, threshold, dropout_scale(dropout_p)
