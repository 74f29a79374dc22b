"""The gate of the CUDA build, on the installed library and on made-up kernels."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_gate", Path(__file__).with_name("kernel_gate.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_gate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_installed_kernels_pass(gate: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    if not gate.installed_library().exists():
        pytest.skip("installed without the CUDA library")
    if gate.cuobjdump() is None:
        pytest.skip("cuobjdump is neither in a CUDA toolkit nor in the triton package")
    status = gate.main([])
    printed = capsys.readouterr().out
    print(printed)
    assert status == 0, printed
    attention = "attention_forward_sm80", "attention_decode_sm80", "decode_combine"
    backward = "attention_backward_queries_sm80", "attention_backward_keys_sm80"
    for name in (*attention, *backward, "norm_forward_kernel", "norm_backward_kernel", "activation_backward_kernel"):
        assert {line.split()[0] for line in printed.splitlines() if name in line} >= {"sm_80", "sm_90"}, name
    assert {line.split()[0] for line in printed.splitlines() if "attention_forward_sm90" in line} == {"sm_90a"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"local": 2}, "uses local memory"),
        ({"stack": 16}, "16 bytes of stack"),
        ({"threads": 0}, "no launch bound"),
        ({"registers": 129, "threads": 512}, "129 registers, too many"),
        ({"registers": 128, "threads": 512}, ""),
        ({"hmma": 0}, "no HMMA"),
        ({"name": "attention_forward_sm90<float>"}, "no HGMMA"),
        ({"name": "attention_forward_sm90<float>", "hgmma": 24, "waits": 4}, ""),
        ({"name": "attention_forward_sm90<float>", "hgmma": 24, "waits": 24}, "waits 24 times for 24 products"),
        ({"name": "attention_forward_sm90<float>", "hgmma": 24, "waits": 4, "beside": 32}, ""),
        ({"name": "attention_forward_sm90<float>", "hgmma": 24, "waits": 4, "beside": 0}, "computes 0 exponentials"),
        ({"hmma": 0, "name": "_Z19norm_forward_kernel"}, ""),
        ({"narrow": 9}, ""),
        ({"narrow": 2, "name": "norm_forward_kernel<true, 1>"}, ""),
        ({"narrow": 10, "name": "norm_forward_kernel<true, 1>"}, "stores 10 times less than 16 bytes"),
    ],
)
def test_faults_are_sentences(gate: ModuleType, changes: dict[str, object], words: str) -> None:
    good = dict(architecture="sm_80", name="attention_x", registers=255, threads=128, hmma=4)
    faults = gate.Kernel(**{**good, **changes}).faults()
    assert len(faults) == (1 if words else 0)
    assert words in "".join(faults)
