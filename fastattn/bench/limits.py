"""What the machine can do at most, measured in the same run as the rows that are compared with it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from fastattn.bench.cases.base import dtype_name
from fastattn.bench.providers.base import Job
from fastattn.bench.timing import Effort, empty_graph_ms, time_jobs

_SMALL_PRODUCT, _LONG_PRODUCT_SECONDS = 128, 1.0


@dataclass(frozen=True)
class Limits:
    """product: FLOP/s of a large matrix product, per dtype. fma: FLOP/s of a loop of float32 multiply-adds (CPUs with
    a C compiler). copy: B/s of a large copy, bytes read plus bytes written. empty_ms: what the GPU clock shows for
    an empty graph. notes: what could not be measured, and why."""

    product: dict[str, float]
    copy: float
    fma: float | None = None
    empty_ms: float | None = None
    notes: tuple[str, ...] = ()

    def seconds(self, flops: float, bytes: float, dtype: str) -> float:
        """The least time that the measured limits allow for that work: arithmetic or memory, whichever is longer."""
        rate = max(self.product[dtype], self.fma or 0.0)  # a CPU can do the arithmetic of every dtype in float32
        return max(flops / rate, bytes / self.copy)

    def best(self, other: Limits) -> Limits:
        """The better of two measurements, with the dtypes of both."""

        def better(choose: Callable[[Iterable[float]], float], a: float | None, b: float | None) -> float | None:
            known = [x for x in (a, b) if x is not None]
            return choose(known) if known else None

        return Limits(
            product={
                dtype: max(rates.product.get(dtype, 0.0) for rates in (self, other))
                for dtype in {**self.product, **other.product}
            },
            copy=max(self.copy, other.copy),
            fma=better(max, self.fma, other.fma),
            empty_ms=better(min, self.empty_ms, other.empty_ms),
            notes=tuple(dict.fromkeys([*self.notes, *other.notes])),
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "notes": list(self.notes)}


def limits_from_json(found: dict[str, Any]) -> Limits:
    """The inverse of `Limits.to_json`."""
    return Limits(**{**found, "notes": tuple(found["notes"])})


def measure_limits(device: str, dtypes: list[torch.dtype], *, quick: bool = False) -> Limits:
    """Measures them. Takes one to three seconds on a CPU; quick: small sizes, whose rates mean nothing."""
    size = 128 if quick else 8192 if device == "cuda" else 2048
    length = 2**12 if quick else 2**30 if device == "cuda" else 2**28
    product = {dtype_name(dtype): _product_rate(device, dtype, size) for dtype in dtypes}
    source = torch.ones(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies: list[Callable[[], object]] = [lambda: target.copy_(source)]
    if device == "cuda":  # a graph replays a copy as a memcpy: 2.77 TB/s on an H200 whose kernels copy at 4.28
        copies.append(lambda: torch.neg(source.view(torch.float32), out=target.view(torch.float32)))
    copy = 2.0 * length / min(_seconds(device, call) for call in copies)
    fma, note = _fma(quick) if device == "cpu" else (None, "")
    empty = empty_graph_ms() if device == "cuda" else None
    return Limits(product, copy, fma, empty, (note,) if note else ())


def _seconds(device: str, call: Callable[[], object]) -> float:
    """The fastest of some calls: a limit is what the machine can do, not what it does on average."""
    with torch.no_grad():
        job = Job(lambda: (call(),), ("",))  # type: ignore[arg-type, return-value]
        return min(time_jobs({"": job}, device, Effort(rounds=7, seconds=0.3, most=60))[""].samples) / 1e3


def _product_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a product of matrices of that size, or of one an eighth as large where that alone takes long: torch
    multiplies half dtypes element by element on CPUs without instructions for them."""
    if size > 8 * _SMALL_PRODUCT:
        small = _product_rate(device, dtype, size // 8)
        if 2.0 * size**3 / small > _LONG_PRODUCT_SECONDS:
            return small
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _seconds(device, lambda: torch.mm(a, b))


def _fma(quick: bool) -> tuple[float | None, str]:
    library, reason = _fma_library()
    if library is None:
        return None, reason
    threads, rounds = torch.get_num_threads(), 10_000 if quick else 5_000_000
    library.fma_loop.argtypes, library.fma_loop.restype = [ctypes.c_long], ctypes.c_float
    library.fma_flops.restype = ctypes.c_long
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:  # a foreign call holds no interpreter lock, and needs no OpenMP
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(library.fma_loop, [rounds] * threads))
            best = max(best, library.fma_flops() * rounds * threads / (time.perf_counter() - began))
    return best, ""


@cache
def _fma_library() -> tuple[Any, str]:
    """fma.c compiled for this processor and loaded, or None and why not."""
    compiler = next((name for name in ("gcc", "cc", "clang") if shutil.which(name)), None)
    if compiler is None:
        return None, "no FMA loop: there is no C compiler"
    with tempfile.TemporaryDirectory() as folder, as_file(files("fastattn.bench") / "fma.c") as source:
        target = Path(folder) / "fma.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-ffp-contract=fast"]
        done = subprocess.run([compiler, *flags, str(source), "-o", str(target)], capture_output=True, text=True)
        if done.returncode:
            return None, f"no FMA loop: {compiler} does not compile it: {done.stderr.strip().splitlines()[-1][:120]}"
        return ctypes.CDLL(str(target)), ""
