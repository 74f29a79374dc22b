"""The CUDA kernels, run on the CPU by the emulation: drawn cases under the parity rule, and edges of their tiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NORMS, ATTENTION, DECODE = (
    Path(__file__).with_name(f"cuda_emulated{suffix}.py") for suffix in ("", "_attention", "_decode")
)


def environment(folder: Path, seed: int = 0, kernels: str = "") -> dict[str, str]:
    """Of a process that emulates: on one thread, as the fibres do, and torch's would wait for tests beside it."""
    own = {"FASTATTN_CUDA_EMULATION": str(folder), "FASTATTN_EMULATION_SEED": str(seed), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, "FASTATTN_CUDA_KERNELS": kernels}


@pytest.mark.parametrize(
    ("op", "cases", "checked", "forward_only", "kernels"),
    [
        ("all", 20, 95, 6, ""),
        ("attention", 60, 25, 12, ""),
        ("attention", 60, 25, 12, "sm90"),
        ("attention_decode", 60, 25, 0, ""),
    ],
)
def test_verify_runs_in_the_emulation(
    fresh_process, emulated_cuda: Path, op: str, cases: int, checked: int, forward_only: int, kernels: str
) -> None:
    script = "from fastattn.cli import main; main()"
    asked = ("verify", "--backend", "cuda", "--json", "--op", op, "--cases", str(cases))
    seed = "0" if op == "all" else "8"
    run = fresh_process(script, *asked, "--seed", seed, **environment(emulated_cuda, kernels=kernels))
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    report = json.loads(run.stdout)
    assert report["failures"] == []
    allowed = {"attention": "the CUDA attention", "attention_decode": "the CUDA decoding takes bfloat16 and float16"}
    for row in report["refusals"]:
        assert allowed.get(row["op"], f"no kernel for {row['op']}") in row["reason"], row
    assert report["forward_only"] <= forward_only  # gradients of biases, and of very narrow and very wide heads
    assert report["checked"] >= checked  # norms and linear layers, in the half dtypes attention and decoding


@pytest.mark.slow
@pytest.mark.parametrize(("op", "kernels"), [("all", ""), ("attention", "sm90")])
def test_verify_runs_long_in_the_emulation(emulated_cuda: Path, op: str, kernels: str) -> None:
    command = [sys.executable, "-m", "fastattn", "verify", "--backend", "cuda", "--op", op, "--cases", "400"]
    own = environment(emulated_cuda, seed=3, kernels=kernels)
    run = subprocess.run([*command, "--seed", "3"], env=own, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


# Odd seeds draw a device with 227 KiB of shared memory for a block, even ones with 99.
@pytest.mark.parametrize(("driver", "seed"), [(NORMS, 1), (NORMS, 2), (ATTENTION, 1), (DECODE, 1)])
def test_each_kernel_equals_the_reference(emulated_cuda: Path, driver: Path, seed: int) -> None:
    run_driver(driver, environment(emulated_cuda, seed), "-m", "not slow")


@pytest.mark.slow
def test_each_attention_kernel_equals_the_reference_for_long(emulated_cuda: Path) -> None:
    run_driver(ATTENTION, environment(emulated_cuda, seed=1), "-m", "slow")


def test_the_kernels_for_hopper_equal_the_reference(emulated_cuda: Path) -> None:
    """Wider heads run on the other kernels."""
    run_driver(ATTENTION, environment(emulated_cuda, seed=2, kernels="sm90"), "-k", "not 192 and not 256")


def run_driver(driver: Path, own: dict[str, str], *options: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(driver), *options]
    run = subprocess.run(command, env=own, capture_output=True, text=True)
    folder = f"FASTATTN_CUDA_EMULATION={own['FASTATTN_CUDA_EMULATION']}"
    assert run.returncode == 0, f"{folder} pytest {driver}\n{run.stdout[-6000:]}"


def test_unknown_kernels_are_named(fresh_process) -> None:
    script = "from fastattn.backends import cuda; print(cuda.unavailable_reason())"
    run = fresh_process(script, FASTATTN_CUDA_KERNELS="sm70")
    assert "FASTATTN_CUDA_KERNELS='sm70' is unknown: set it to sm80 or sm90, or leave it unset" in run.stdout


def test_dispatch_does_not_choose_the_emulation(fresh_process, emulated_cuda: Path) -> None:
    script = (
        "import torch, fastattn\n"
        "from fastattn import dispatch\n"
        "from fastattn.problems import NormProblem\n"
        "assert dispatch.backends()['cuda'] is None\n"
        "found = dispatch.explain_problem(NormProblem('cpu', torch.float32, 'layer', 4, 8))\n"
        "assert found.reasons['cuda'] == ['it is never chosen for cpu tensors'] and found.chosen != 'cuda', found\n"
    )
    run = fresh_process(script, **environment(emulated_cuda))
    assert run.returncode == 0, run.stderr


def test_a_folder_without_the_module_is_named(fresh_process) -> None:
    script = "from fastattn.backends import cuda; print(cuda.unavailable_reason())"
    run = fresh_process(script, **environment(Path("/nowhere")))
    assert "FASTATTN_CUDA_EMULATION='/nowhere' holds no _cuda module" in run.stdout
