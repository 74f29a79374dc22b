"""The attention kernels compile ahead of time for the GPUs they are written for, within the committed stack sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

# Under TRITON_INTERPRET=1 nothing compiles, and other tests set it: so this runs in a process of its own.
RULES = """
import json
from fastattn.kernels import compile_check as check

good = check.Compiled("attention_forward_kernel", "x", 90, 200, 0, 1000, "wgmma.mma_async", 0)
half, options = check.Variant("bfloat16", 128, 128, "none"), check.Variant("bfloat16", 128, 128, "none", options=True)
cases = [
    (good, half, {good.key: 0}),
    (good._replace(shared=300000), half, {good.key: 0}),
    (good._replace(tensor_core="-"), half, {good.key: 0}),
    (good._replace(tensor_core="-"), half._replace(dtype="float32"), {good.key: 0}),
    (good._replace(stack=8), half, {good.key: 8}),
    (good._replace(stack=8), options, {good.key: 8}),
    (good._replace(stack=8), options, {good.key: 0}),
    (good, half, {}),
    (good._replace(one_by_one=3), half, {good.key: 0}),
    (good._replace(one_by_one=3), options, {good.key: 0}),
]
print(json.dumps([check.troubles(*case) for case in cases]))
"""


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_the_rules(fresh_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = fresh_process(RULES, TRITON_CACHE_DIR=str(tmp_path))
    assert found.returncode == 0, found.stderr[-4000:]
    fine, shared, slow, wide, spilled, allowed, grown, unknown, single, mixed = json.loads(found.stdout)
    assert fine == wide == allowed == mixed == []
    assert "shared memory" in shared[0]
    assert slow == ["no tensor-core instruction"]
    assert spilled == ["a stack of 8 bytes in a plain forward"]
    assert grown == ["a stack of 8 bytes, 0 in compiled.json"]
    assert single == ["3 loads of single elements"]
    assert "not in compiled.json" in unknown[0]


def test_arguments_are_typed_as_a_launch_types_them() -> None:
    from fastattn.kernels.compile_check import argument_type

    tensor = torch.empty(4, dtype=torch.bfloat16, device="meta")
    assert argument_type(tensor, False, True) == ("*bf16", True)
    assert argument_type(None, False, True) == argument_type(1, False, True) == ("constexpr", False)
    assert argument_type(64, True, True) == ("constexpr", False)
    assert argument_type(64, False, True) == ("i32", True)
    assert argument_type(64, False, False) == argument_type(1, False, False) == ("i32", False)
    assert argument_type(2**40 + 1, False, True) == ("i64", False)
    assert argument_type(0.5, False, True) == ("fp32", False)


def test_a_short_selection(tmp_path: Path) -> None:
    found = run("-m", "fastattn.kernels.compile_check", "--short", "--processes", "2", folder=tmp_path)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    assert found.stdout.splitlines()[-1] == "11 kernels compiled, 0 failed"


def test_drawn_cases_launch_without_a_gpu(fresh_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    script = (
        "from fastattn.kernels import compile_check as check\n"
        "for op, kernels in (('attention_decode', {'attention_decode_kernel'}), ('norm', {'norm_forward_kernel'})):\n"
        "    jobs = check.unlike_launches(op, 2, 90)\n"
        "    found = {check.drawn_launches(*job[:2], 90)[job[2]].kernel.__name__ for job in jobs}\n"
        "    assert len(jobs) >= 2 and found >= kernels, (op, jobs, found)\n"
    )
    found = fresh_process(script, TRITON_CACHE_DIR=str(tmp_path))
    assert found.returncode == 0, found.stderr[-4000:]


@pytest.mark.slow
def test_drawn_cases_compile(tmp_path: Path) -> None:
    found = run("-m", "fastattn.kernels.compile_check", "--drawn", "25", folder=tmp_path)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]


@pytest.mark.slow
def test_all(tmp_path: Path) -> None:
    found = run("-m", "fastattn.kernels.compile_check", folder=tmp_path)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
