"""The CPU kernels of instruction sets that this machine lacks, emulated: drawn cases, and every test of the backend."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastattn.backends import cpu

HERE = Path(__file__).parent
NATIVE = [] if cpu.unavailable_reason() else cpu.available_isas()
SUITES = [
    "test_cpu.py",
    "test_cpu_math.py",
    "test_cpu_packed.py",
    "test_cpu_attention_masks.py",
    "test_cpu_attention_packed.py",
]

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or "avx2" not in NATIVE, reason="the emulation is compiled for AVX2"
)


def run_emulated(build: ModuleType, instruction_sets: list[str], *arguments: str) -> None:
    """Runs `python -m arguments` where the CPU library holds those of the instruction sets that this machine lacks."""
    missing = [isa for isa in instruction_sets if isa not in NATIVE]
    if not missing:
        pytest.skip(f"this processor has {' and '.join(instruction_sets)}")
    folder = build.build_cpu(missing)
    command = [sys.executable, "-m", *arguments]
    run = subprocess.run(command, env={**os.environ, "LD_LIBRARY_PATH": str(folder)}, capture_output=True, text=True)
    said = run.stdout[-6000:] + run.stderr[-2000:]
    assert run.returncode == 0, f"LD_LIBRARY_PATH={folder} {' '.join(command)}\n{said}"


MANY = [pytest.param(isa, 40, marks=pytest.mark.slow) for isa in ("amx", "neon", "avx512", "avx512bf16")]


@pytest.mark.parametrize(("isa", "cases"), [("amx", 12), *MANY])
def test_drawn_cases_keep_the_parity_rule(emulation_build: ModuleType, isa: str, cases: int) -> None:
    verify = ["fastattn", "verify", "--backend", "cpu", "--isa", isa, "--cases", str(cases), "--seed", "7"]
    run_emulated(emulation_build, [isa], *verify)


@pytest.mark.slow
def test_every_test_of_the_backend_passes(emulation_build: ModuleType) -> None:
    suites = [str(HERE / suite) for suite in SUITES]
    everything = list(emulation_build.CPU_INSTRUCTION_SETS)
    run_emulated(emulation_build, everything, "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *suites)
