"""The emulation of Hopper's primitives: products of warpgroups, operands where the PTX ISA has them, planted faults."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SOURCE = Path(__file__).with_name("cuda_wgmma.cu")
ROWS, SIZE = 64, 128
FAULTS = [
    "none", "no share", "no wait", "too few arrivals", "no fence", "early claim", "under way", "a warp less",
    "misaligned", "early release", "not prepared", "small alignment", "another product", "too many registers",
    "odd registers",
]  # fmt: skip


@pytest.fixture(scope="module")
def library(emulation_build: ModuleType) -> ctypes.CDLL:
    return ctypes.CDLL(str(emulation_build.build_cuda_test(SOURCE)))


def multiply(library: ctypes.CDLL, fault: str) -> tuple[str, np.ndarray, list[np.ndarray]]:
    """The report of the launch, empty where it succeeded; what it wrote; and what is right."""
    draw = np.random.default_rng(7)
    a = draw.standard_normal((ROWS, SIZE)).astype(np.float16)
    b = draw.standard_normal((SIZE, SIZE)).astype(np.float16)
    out = np.full((2, ROWS, SIZE), np.nan, dtype=np.float32)
    text = ctypes.create_string_buffer(2000)
    given = [array.ctypes.data_as(ctypes.c_void_p) for array in (a, b, out)]
    error = library.run_multiply(*given, FAULTS.index(fault), text, len(text))
    assert (error == 0) == (text.value == b"")
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    return text.value.decode(), out, [wide_a @ wide_b.T, wide_a @ wide_b]


@pytest.fixture(params=range(4))
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the warps, and whether products run early or late."""
    monkeypatch.setenv("FASTATTN_EMULATION_SEED", str(request.param))


@pytest.mark.usefixtures("seed")
def test_operands_lie_where_the_ptx_manual_has_them(library: ctypes.CDLL) -> None:
    report, out, want = multiply(library, "none")
    assert report == ""
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no share", r"reads shared memory \(byte \d+\) that thread 7[67] wrote at line \d+ and did not share"),
        ("no wait", "race: "),
        (
            "too few arrivals",
            r"128 threads from 128 on at the barrier in byte \d+ of shared memory \(1 arrivals missing\)",
        ),
        ("no fence", "a product without a fence of its registers"),
        ("under way", "returns with a product under way"),
        ("a warp less", "warp 6 took part in 0 products, and warp 4 of the same warpgroup in 16"),
        ("misaligned", "misaligned: an operand of a product at byte 128"),
        ("small alignment", "in memory aligned to 128"),
        (
            "another product",
            r"product 1 of the warp is another than that of a warp of the same warpgroup, issued at line",
        ),
        ("too many registers", "its warps ask for 256 registers a thread on average, and were launched with 255"),
        ("odd registers", "100 registers: a multiple of 8 from 24 to 256"),
        ("not prepared", r"byte \d+ of shared memory holds no barrier"),
    ],
)
def test_a_planted_fault_is_found(library: ctypes.CDLL, fault: str, words: str) -> None:
    report, _, _ = multiply(library, fault)
    assert re.search(words, report), report


def test_faults_of_products_that_run_late_are_found(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product may run when it is issued: what is then no fault shows in other orders."""
    words = {"early claim": "asks for accumulators of a product that is under way", "early release": "race: "}
    for fault, expected in words.items():
        reports = []
        for seed in range(8):
            monkeypatch.setenv("FASTATTN_EMULATION_SEED", str(seed))
            reports.append(multiply(library, fault)[0])
        assert any(expected in report for report in reports), reports
