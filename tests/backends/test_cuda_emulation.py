"""The emulation of the CUDA primitives: right kernels give right numbers, and planted faults are found and named."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SOURCE = Path(__file__).with_name("cuda_emulation.cu")
THREADS = 128
FAULTS = [
    "none", "no barrier", "shared off by one", "global off by one", "misaligned", "early read", "deadlock", "diverged",
    "no warp barrier", "no arrival", "in flight",
]  # fmt: skip
SEEDS = range(4)


class Kernels:
    """The planted kernels; every call returns the report of the launch, empty where it succeeded."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def call(self, name: str, *arguments: object) -> str:
        text = ctypes.create_string_buffer(2000)
        given = [a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in arguments]
        error = getattr(self.library, name)(*given, text, len(text))
        assert (error == 0) == (text.value == b"")
        return text.value.decode()

    def rotate(self, fault: str, *, asynchronous: bool) -> tuple[str, np.ndarray]:
        numbers, out = np.arange(THREADS, dtype=np.float32) + 1, np.full(THREADS, np.nan, dtype=np.float32)
        flag = ctypes.c_bool(asynchronous)
        return self.call("run_rotate", aligned(numbers), out, THREADS, FAULTS.index(fault), flag), out

    def exchange(self, fault: str) -> tuple[str, np.ndarray]:
        numbers, out = np.arange(THREADS, dtype=np.float32), np.full(THREADS, np.nan, dtype=np.float32)
        return self.call("run_exchange", numbers, out, THREADS, FAULTS.index(fault)), out


def aligned(numbers: np.ndarray) -> np.ndarray:
    """A copy that starts at a multiple of 64 bytes."""
    room = np.empty(numbers.nbytes + 64, dtype=np.uint8)
    first = -room.ctypes.data % 64
    copy = room[first : first + numbers.nbytes].view(numbers.dtype)
    copy[:] = numbers
    return copy


@pytest.fixture(scope="module")
def kernels(emulation_build: ModuleType) -> Kernels:
    return Kernels(emulation_build.build_cuda_test(SOURCE))


@pytest.fixture(params=SEEDS)
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setenv("FASTATTN_EMULATION_SEED", str(request.param))
    yield request.param


def line_of(marker: str) -> int:
    """The number of the first line of the planted kernels with these words."""
    return next(i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if marker in line)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_right_kernels_give_right_numbers(kernels: Kernels, seed: int, asynchronous: bool) -> None:
    report, out = kernels.rotate("none", asynchronous=asynchronous)
    assert report == ""
    assert out.tolist() == [float((i + 40) % THREADS + 1) for i in range(THREADS)]
    report, out = kernels.exchange("none")
    assert report == ""
    assert not out.any()


def test_a_missing_barrier_is_found(kernels: Kernels, seed: int) -> None:
    report, _ = kernels.rotate("no barrier", asynchronous=False)
    assert re.search(r"rotate, block \(0,0,0\), thread \(\d+,0,0\) at cuda_emulation\.cu:\d+: race: ", report), report
    assert f".cu:{line_of('tile.get(from)')}:" in report or f".cu:{line_of('tile.set(i, in.get')}:" in report
    assert "with no barrier in between" in report


def test_a_missing_warp_barrier_is_found(kernels: Kernels, seed: int) -> None:
    report, _ = kernels.exchange("no warp barrier")
    assert "race: reads shared memory" in report
    assert f"wrote at line {line_of('tile.set(i, value)')}, with nothing that joins the lanes" in report


def test_an_off_by_one_in_shared_memory_is_found(kernels: Kernels, seed: int) -> None:
    report, _ = kernels.rotate("shared off by one", asynchronous=False)
    place = f"thread (127,0,0) at cuda_emulation.cu:{line_of('tile.get(from)')}: "
    assert place + "out of bounds: read of 1 elements at 128 of a shared array of 128" in report


def test_an_off_by_one_in_global_memory_is_found(kernels: Kernels) -> None:
    report, _ = kernels.rotate("global off by one", asynchronous=False)
    assert "thread (127,0,0)" in report
    assert "out of bounds: read of 1 elements at 128 of a buffer that ends at 128" in report


def test_a_misaligned_access_is_found(kernels: Kernels) -> None:
    report, _ = kernels.rotate("misaligned", asynchronous=True)
    assert f".cu:{line_of('copy_async(tile')}: misaligned: asynchronous copy of 16 bytes at element " in report


def test_an_early_read_of_an_asynchronous_copy_is_found(kernels: Kernels, seed: int) -> None:
    report, _ = kernels.rotate("early read", asynchronous=True)
    assert "reads shared memory" in report
    assert "that an unfinished asynchronous copy owns" in report


def test_copies_under_way_at_the_end_are_found(kernels: Kernels) -> None:
    report, _ = kernels.rotate("in flight", asynchronous=True)
    assert "returns with asynchronous copies under way" in report


def test_a_deadlock_names_the_threads_and_their_barriers(kernels: Kernels, seed: int) -> None:
    report, _ = kernels.exchange("deadlock")
    barrier = f"at barrier 0 (96 of 128 threads there), cuda_emulation.cu:{line_of('DEADLOCK && i < WARP') + 1}"
    assert f"96 threads from 32 on {barrier}" in report
    assert "32 threads from 0 on returned" in report
    report, _ = kernels.exchange("no arrival")
    assert "64 threads from 64 on at barrier 1 (64 of 128 threads there)" in report


def test_lanes_in_different_collectives_are_found(kernels: Kernels, seed: int) -> None:
    report, _ = kernels.exchange("diverged")
    assert re.search(
        r"lane \d+ calls (vote|shuffle_xor) while other lanes of the warp wait at (vote|shuffle_xor)", report
    ), report


def test_tensor_core_fragments_are_those_of_the_ptx_manual(kernels: Kernels) -> None:
    draw = np.random.default_rng(5)
    a, b = draw.standard_normal((16, 16)).astype(np.float16), draw.standard_normal((8, 16)).astype(np.float16)
    want = a.astype(np.float64) @ b.astype(np.float64).T
    out = np.full((2, 16, 8), np.nan, dtype=np.float32)
    assert kernels.call("run_multiply", a, b, out, 256, ctypes.c_bool(False)) == ""
    np.testing.assert_allclose(out[0], want, rtol=0, atol=1e-5)
    out[:] = np.nan
    assert kernels.call("run_multiply", a, b, out, 256, ctypes.c_bool(True)) == ""
    np.testing.assert_allclose(out, [want, want], rtol=0, atol=1e-5)


def test_every_thread_of_every_block_runs_once(kernels: Kernels) -> None:
    total = np.zeros(1, dtype=np.int32)
    assert kernels.call("run_count", total, 37, 96) == ""
    assert total[0] == 37 * 96


def test_static_shared_memory_beside_dynamic_is_counted(kernels: Kernels) -> None:
    """A launch that asks for nothing has 48 KiB of both together, one that asks 227: of dynamic ones above 47."""
    out = np.full(THREADS, np.nan, dtype=np.float32)
    kib = 1024
    for dynamic in (0, 46 * kib, 47 * kib + 16, 225 * kib):
        assert kernels.call("run_fill", out, dynamic) == ""
        assert out.tolist() == [1.0] * THREADS
    for dynamic, most in ((47 * kib, 48 * kib), (226 * kib, 227 * kib)):
        together = f"{dynamic + 2048} bytes of static and dynamic shared memory, and the launch asks for {most} at most"
        assert together in kernels.call("run_fill", out, dynamic)


def test_impossible_launches_are_refused(kernels: Kernels) -> None:
    total = np.zeros(1, dtype=np.int32)
    assert "invalid configuration" in kernels.call("run_count", total, 1, 256)  # over the launch bound
    assert "whole warps" in kernels.call("run_count", total, 1, 33)
    assert "no blocks" in kernels.call("run_count", total, 0, 32)
