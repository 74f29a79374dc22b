"""The CUDA backend where there is no GPU: it imports, says why it cannot run, and refuses what it has no kernel for."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch

from fastattn.backends import cuda
from fastattn.parity.rule import Conditions, check_linear_act, failures
from fastattn.problems import LinearProblem, NormProblem

LINEAR = LinearProblem("linear_act", "cuda", torch.bfloat16, torch.bfloat16, "gelu", 64, 32, 0, 48)

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def library() -> Any:
    return pytest.importorskip("fastattn._cuda", reason="installed without the CUDA library")


@no_gpu
def test_it_says_why_it_is_unavailable() -> None:
    reason = cuda.unavailable_reason()
    assert reason is not None
    words = ("no CUDA library", "driver", "device")
    assert any(word in reason for word in words), reason


def test_without_the_library_the_reason_names_the_remedy() -> None:
    script = (
        "import sys; sys.modules['fastattn._cuda'] = None\n"
        "from fastattn.backends import cuda\n"
        "print(cuda.unavailable_reason(), cuda.architectures())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "FASTATTN_CUDA=1" in run.stdout
    assert run.stdout.strip().endswith("[]")


@no_gpu
def test_the_library_imports_without_a_driver_and_its_calls_name_the_error() -> None:
    _cuda = library()
    assert "sm_90" in _cuda.architectures()
    with pytest.raises(RuntimeError, match=r"counting the CUDA devices: .*(driver|device)"):
        _cuda.devices()
    call = dict(x=16, bias=0, y=16, pre=0, dtype=2, activation=2, rows=3, cols=5, device=0, stream=0)
    with pytest.raises(RuntimeError, match=r"linear_act on cuda:0 with 3 x 5 elements .*: .*(driver|device)"):
        _cuda.linear_act(**call)


def test_an_empty_call_needs_no_device() -> None:
    call = dict(x=0, bias=0, y=0, pre=0, dtype=0, activation=1, rows=0, cols=5, device=0, stream=0)
    library().linear_act(**call)


def test_architectures_are_those_of_the_library() -> None:
    assert cuda.architectures() == library().architectures()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"requires_grad": True}, "no backward"),
        ({"device_type": "cpu"}, "cpu tensors"),
        ({"dtype": torch.float64, "weight_dtype": torch.float64}, "float64"),
        ({"weight_dtype": torch.float32}, "one dtype"),
        ({"op": "ffn", "hidden_features": 96}, "no kernel for ffn"),
    ],
)
def test_refusals_say_why(changes: dict[str, object], words: str) -> None:
    reasons = cuda.not_supported_reasons(dataclasses.replace(LINEAR, **changes))
    assert len(reasons) == 1
    assert words in reasons[0]


def test_what_it_runs_and_what_it_leaves_to_others() -> None:
    assert cuda.not_supported_reasons(LINEAR) == []
    norm = NormProblem("cuda", torch.float32, "layer", 4, 8)
    assert cuda.not_supported_reasons(norm) == ["the CUDA backend has no kernel for norm"]


@pytest.mark.skipif(cuda.unavailable_reason() is not None, reason="the CUDA backend is unavailable")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", [64, 37])
def test_linear_act_parity(dtype: torch.dtype, features: int) -> None:
    torch.manual_seed(7)
    shapes = (5, 3, 40), (features, 40), (features,)
    x, weight, bias = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    for activation in ("none", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "relu2"):
        rows = check_linear_act(x, weight, bias, activation, backend="cuda", conditions=Conditions(grad=False))
        assert not failures(rows), f"{activation}: {failures(rows)}"
