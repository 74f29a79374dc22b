"""The Triton backend: its kernels in Triton's interpreter, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastattn.backends import triton as backend
from fastattn.backends.parts import cut, keys_seen
from fastattn.backends.triton.attention import _aligned
from fastattn.masks.lowered import LoweredMask
from fastattn.problems import AttentionProblem, DecodeProblem, LinearProblem, NormProblem, Problem

PROBLEM = NormProblem("cuda", torch.bfloat16, "layer", rows=6, width=100)


ATTENTION = AttentionProblem("cuda", torch.bfloat16, 2, 4, 2, 100, 100, 64, 64)
LINEAR = LinearProblem("ffn", "cuda", torch.bfloat16, torch.bfloat16, "gelu", 4, 8, 16, 8)


# Of a process of its own: whether Triton interprets is decided when it is first imported. On one thread, as the
# interpreter does: torch's would wait for tests beside it.
INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def test_rows_that_begin_anywhere_are_copied_to_multiples_of_16_bytes() -> None:
    buffer = torch.arange(4000, dtype=torch.float32).to(torch.bfloat16)
    plain = buffer[:3840].view(2, 6, 5, 64).transpose(1, 2)
    assert _aligned(plain) is plain
    assert _aligned(plain[:, :, :, 8:40]).data_ptr() == plain[:, :, :, 8:40].data_ptr()
    expanded = plain[:1].expand(3, -1, -1, -1)
    assert _aligned(expanded) is expanded
    for given in (buffer[1:3841].view(2, 5, 6, 64), buffer[:300].view(2, 5, 6, 5), plain[..., 1:]):
        copy = _aligned(given)
        assert torch.equal(copy, given) and copy.stride(3) == 1 and copy.data_ptr() % 16 == 0
        assert all(stride % 8 == 0 for stride in copy.stride()[:3])


@pytest.mark.parametrize(
    "name", ["triton_interpreted.py", pytest.param("triton_attention_interpreted.py", marks=pytest.mark.slow)]
)
def test_kernels_in_the_interpreter(name: str) -> None:
    """Attention's take longer; in `make test` the drawn cases below stand for them."""
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name(name))]
    run = subprocess.run(command, env={**os.environ, **INTERPRETED}, capture_output=True, text=True)
    assert run.returncode == 0, f"TRITON_INTERPRET=1 {' '.join(command)}\n{run.stdout[-6000:]}{run.stderr[-2000:]}"


# Prints the cases drawn, those refused, and the failures.
VERIFY = """
import sys, warnings
from fastattn.parity.run import verify
warnings.simplefilter("ignore")
ops, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
report = verify(ops, "triton", seed=2, only=range(first, last))
refused = sum(n for (_, reason), n in report.refusals.items() if "dropout" not in reason)
print(report.checked + report.refused, refused, *report.failures, sep="\\n")
"""


RANDOM = ("attention", "attention_decode,norm", "linear_act,ffn,gated_ffn")  # the operations of each process


@pytest.mark.parametrize(
    ("ops", "first", "last"),
    [
        ("attention", 0, 75),
        ("attention", 75, 150),
        *((ops, 0, 150) for ops in RANDOM[1:]),
        *(pytest.param(ops, n, n + 75, marks=pytest.mark.slow) for ops in RANDOM for n in range(150, 600, 75)),
    ],
)
def test_random_cases(fresh_process, ops: str, first: int, last: int) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run = fresh_process(VERIFY, ops, str(first), str(last), **INTERPRETED)
    cases = (last - first) * len(ops.split(","))
    assert run.stdout == f"{cases}\n0\n", run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.parametrize("entries", [1, 7, 64, 1000])
@pytest.mark.parametrize("keys", [1, 64, 65, 1000, 4096, 131072])
def test_the_parts_of_a_cache(entries: int, keys: int) -> None:
    """They hold every key, none is empty, and there are no more than fill the GPU."""
    parts, part_keys = cut(entries, keys, 64, 264)
    assert part_keys % 64 == 0
    assert (parts - 1) * part_keys < keys <= parts * part_keys
    assert parts == 1 or (parts - 1) * entries <= 2 * 132


def test_a_window_is_cut_into_parts_and_not_the_cache() -> None:
    assert keys_seen(8192, 4, LoweredMask(band_left=100, band_right=0)) == 104
    assert keys_seen(8192, 4, LoweredMask(band_left=100)) == 104
    assert keys_seen(50, 4, LoweredMask(band_left=100, band_right=0)) == 50
    assert keys_seen(8192, 4, LoweredMask(band_right=0)) == 8192


DECODING = DecodeProblem("cuda", torch.bfloat16, 2, 8, 2, 1, 64, 64, 64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "q is float64"),
        ({"bias": torch.float64}, "bias is float64"),
        ({"dim_v": 300}, "Dv is 300"),
        ({"len_k": 2**30}, "fewer than 2**30 positions, and Skv is 1073741824"),
        ({"batch": 2**15}, "fewer than 2**16 of B x Hkv, not 65536"),
    ],
)
def test_refusals_of_decoding_say_why(changes: dict[str, object], words: str) -> None:
    reasons = backend.not_supported_reasons(dataclasses.replace(DECODING, **changes))
    assert len(reasons) == 1
    assert words in reasons[0]
    assert not backend.not_supported_reasons(DECODING)


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


@pytest.mark.parametrize(
    ("problem", "changes", "words"),
    [
        (ATTENTION, {"dtype": torch.float64}, "q is float64"),
        (ATTENTION, {"bias": torch.float64}, "bias is float64"),
        (ATTENTION, {"dim_qk": 257}, "D is 257"),
        (ATTENTION, {"dim_v": 0}, "Dv is 0"),
        (ATTENTION, {"len_k": 2**30, "batch": 1, "heads_q": 1}, "Skv is 1073741824"),
        (ATTENTION, {"batch": 2**29}, "too many tiles"),
        (ATTENTION, {"dense_mask": True, "len_k": 2**21, "batch": 1}, "dense masks of up to 2097120 keys, not 2097152"),
        (DECODING, {"heads_q": 64, "heads_kv": 1, "len_q": 2**14}, "queries of one key head, not 1048576"),
        (LINEAR, {"dtype": torch.float64, "weight_dtype": torch.float64}, "x is float64"),
        (LINEAR, {"weight_dtype": torch.float32}, "weight torch.float32"),
        (LINEAR, {"hidden_features": 2**23 - 127}, "up to 8388480 features, not 8388481"),
    ],
)
def test_other_operations_say_why_too(problem: Problem, changes: dict[str, object], words: str) -> None:
    assert backend.not_supported_reasons(problem) == []
    reasons = backend.not_supported_reasons(dataclasses.replace(problem, **changes))
    assert len(reasons) == 1
    assert words in reasons[0]


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


class _NoCompiler:
    """A driver on a machine that cannot compile its module."""

    @property
    def active(self) -> object:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore of it")


@pytest.mark.parametrize(
    ("version", "driver", "words"),
    [
        ("3.3.1", None, "triton 3.3.1 is too old: the kernels need 3.4"),
        ("3.6.0+git1", _NoCompiler(), "triton does not start: Failed to find C compiler."),
        ("3.10.0", SimpleNamespace(active=None), None),
    ],
)
def test_a_triton_that_no_kernel_would_run_on_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, version: str, driver: object, words: str | None
) -> None:
    """It is asked where there is a GPU alone."""
    stand_in = SimpleNamespace(__version__=version, runtime=SimpleNamespace(driver=driver))
    monkeypatch.setitem(sys.modules, "triton", stand_in)
    reason = backend._triton_reason.__wrapped__()
    assert reason is None if words is None else words in reason and "More of it" not in reason


PRECISION = """
import torch
from fastattn.backends.triton.launch import dot_precision

found = [dot_precision()]
if given == "as before":
    torch.set_float32_matmul_precision("high")
elif given == "of products":
    torch.backends.cuda.matmul.fp32_precision = "tf32"
else:
    torch.backends.fp32_precision = "tf32"
print(*found, dot_precision())
"""


@pytest.mark.parametrize("given", ["as before", "of products", "of all"])
def test_float32_is_rounded_where_the_user_lets_torch(fresh_process, given: str) -> None:
    """In a process of its own: once set in the newer way, torch refuses to be asked in the older one."""
    if given != "as before" and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch before 2.9")
    assert fresh_process(f"given = {given!r}\n{PRECISION}").stdout.split() == ["ieee", "tf32"]


def test_without_triton_the_reason_names_the_remedy(fresh_process) -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from fastattn.backends import triton\n"
        "print(triton.unavailable_reason())"
    )
    run = fresh_process(script)
    assert "pip install 'fastattn[triton]'" in run.stdout
