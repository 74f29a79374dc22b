"""The CUDA backend: it imports without a GPU, says why it cannot run, and refuses what it has no kernel for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fastattn.backends import cuda
from fastattn.parity.rule import check_linear_act, failures
from fastattn.problems import DecodeProblem, LinearProblem, NormProblem

NORM = NormProblem("cuda", torch.float32, "layer", 4, 8)
LINEAR = LinearProblem("linear_act", "cuda", torch.bfloat16, torch.bfloat16, "gelu", 64, 32, 0, 48)
DECODING = DecodeProblem("cuda", torch.bfloat16, 2, 8, 2, 1, 64, 64, 64)

POINTERS = "gate", "gate_bias", "up", "up_bias", "h", "gate_out", "up_out"
ACTIVATION_CALL = dict.fromkeys(POINTERS, 0) | dict(dtype=2, activation=2, dropout=(0, 0, 1.0), device=0, stream=0)

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def library() -> Any:
    return pytest.importorskip("fastattn._cuda", reason="installed without the CUDA library")


@no_gpu
def test_it_says_why_it_is_unavailable() -> None:
    reason = cuda.unavailable_reason()
    assert reason is not None
    words = ("no CUDA library", "driver", "device")
    assert any(word in reason for word in words), reason


def test_without_the_library_the_reason_names_the_remedy(fresh_process) -> None:
    script = (
        "import sys; sys.modules['fastattn._cuda'] = None\n"
        "from fastattn.backends import cuda\n"
        "print(cuda.unavailable_reason(), cuda.architectures())"
    )
    run = fresh_process(script)
    assert "FASTATTN_CUDA=1" in run.stdout
    assert run.stdout.strip().endswith("[]")


@no_gpu
def test_the_library_imports_without_a_driver_and_its_calls_name_the_error() -> None:
    _cuda = library()
    assert "sm_90" in _cuda.architectures()
    with pytest.raises(RuntimeError, match=r"counting the CUDA devices: .*(driver|device)"):
        _cuda.devices()
    with pytest.raises(RuntimeError, match=r"activation_forward on cuda:0 with 3 x 5 elements .*: .*(driver|device)"):
        _cuda.activation_forward(**ACTIVATION_CALL, rows=3, cols=5)
    dropout, dtypes = (0, 0, 1.0), (0,) * 5
    names = "x", "residual", "weight", "bias", "z", "y", "mean", "rstd", "device", "stream"
    with pytest.raises(RuntimeError, match=r"norm_forward on cuda:0 with 7 x 9 elements .*: .*(driver|device)"):
        _cuda.norm_forward(
            **dict.fromkeys(names, 0), dtypes=dtypes, is_rms=True, rows=7, width=9, eps=0.1, offset=0, dropout=dropout
        )


def test_an_empty_call_needs_no_device() -> None:
    library().activation_forward(**ACTIVATION_CALL, rows=0, cols=5)


def test_architectures_are_those_of_the_library() -> None:
    assert cuda.architectures() == library().architectures()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device_type": "cpu"}, "cpu tensors"),
        ({"dtype": torch.float64, "weight_dtype": torch.float64}, "float64"),
        ({"weight_dtype": torch.float32}, "one dtype"),
        ({"op": "ffn", "hidden_features": 96, "device_type": "mps"}, "mps tensors"),
    ],
)
def test_refusals_say_why(changes: dict[str, object], words: str) -> None:
    reasons = cuda.not_supported_reasons(dataclasses.replace(LINEAR, **changes))
    assert len(reasons) == 1
    assert words in reasons[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"residual_dtype": torch.float64}, "residual is torch.float64"),
        ({"width": 65537}, "not 65537"),
        ({"rows": 2**31}, "fewer than 2**31 rows"),
        ({"device_type": "cpu"}, "cpu tensors"),
    ],
)
def test_norm_refusals_say_why(changes: dict[str, object], words: str) -> None:
    reasons = cuda.not_supported_reasons(dataclasses.replace(NORM, **changes))
    assert len(reasons) == 1
    assert words in reasons[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32}, "takes bfloat16 and float16, and q is torch.float32"),
        ({"bias": torch.float64}, "bias is torch.float64"),
        ({"dim_qk": 257}, "D is 257"),
        ({"dim_v": 0}, "Dv is 0"),
        ({"len_k": 2**30}, "fewer than 2**30 positions, and Skv is 1073741824"),
        ({"device_type": "cpu"}, "cpu tensors"),
    ],
)
def test_decoding_refusals_say_why(changes: dict[str, object], words: str) -> None:
    reasons = cuda.not_supported_reasons(dataclasses.replace(DECODING, **changes))
    assert len(reasons) == 1
    assert words in reasons[0]


def test_what_it_runs() -> None:
    for op in ("linear_act", "ffn", "gated_ffn"):
        problem = dataclasses.replace(LINEAR, op=op, dropout=op != "linear_act", requires_grad=True)
        assert cuda.not_supported_reasons(problem) == []
    assert cuda.not_supported_reasons(dataclasses.replace(NORM, dropout=True, requires_grad=True)) == []
    everything = dict(paged=True, band=True, intervals=4, table=True, slopes=True, softcap=True, sinks=True)
    for dtype in (torch.bfloat16, torch.float16):
        problem = dataclasses.replace(DECODING, dtype=dtype, bias=torch.float32, **everything)
        assert cuda.not_supported_reasons(problem) == []


@pytest.mark.skipif(cuda.unavailable_reason() is not None, reason="the CUDA backend is unavailable")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("features", [64, 37])
def test_linear_act_parity(dtype: torch.dtype, features: int) -> None:
    torch.manual_seed(7)
    shapes = (5, 3, 40), (features, 40), (features,)
    x, weight, bias = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    for activation in ("none", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "relu2"):
        rows = check_linear_act(
            x,
            weight,
            bias,
            activation,
            backend="cuda",
        )
        assert not failures(rows), f"{activation}: {failures(rows)}"
