"""The Triton backend: its norms in Triton's interpreter, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn.backends import triton as backend
from fastattn.problems import LinearProblem, NormProblem

PROBLEM = NormProblem("cuda", torch.bfloat16, "layer", rows=6, width=100)


def test_norms_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    file = Path(__file__).with_name("triton_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, f"TRITON_INTERPRET=1 pytest {file}\n{run.stdout[-6000:]}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "x is float64"),
        ({"weight_dtype": torch.float64}, "weight is float64"),
        ({"width": 65537}, "not 65537"),
        ({"width": 0}, "not 0"),
        ({"rows": 2**31}, "fewer than 2**31 rows"),
        ({"device_type": "mps"}, "mps tensors"),
    ],
)
def test_refusals_say_why(changes: dict[str, object], words: str) -> None:
    reasons = backend.not_supported_reasons(dataclasses.replace(PROBLEM, **changes))
    assert len(reasons) == 1
    assert words in reasons[0]


def test_other_operations_are_refused() -> None:
    problem = LinearProblem("ffn", "cuda", torch.bfloat16, torch.bfloat16, "gelu", 4, 8, 16, 8)
    assert backend.not_supported_reasons(problem) == ["the Triton backend has no kernel for ffn"]


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    problem = dataclasses.replace(PROBLEM, device_type="cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.not_supported_reasons(problem) == []
    assert backend.unavailable_reason() is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert backend.not_supported_reasons(problem) == ["the Triton backend does not run on cpu tensors"]
    if not torch.cuda.is_available():
        assert "TRITON_INTERPRET=1" in (backend.unavailable_reason() or "")


def test_without_triton_the_reason_names_the_remedy() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from fastattn.backends import triton\n"
        "print(triton.unavailable_reason())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'fastattn[triton]'" in run.stdout
