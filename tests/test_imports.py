"""`import fastattn` needs torch and numpy only, and does nothing but import."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from fastattn.graphs import constant

OPTIONAL = ("triton", "transformers", "rich", "typer", "matplotlib", "fastattn._cpu", "fastattn._cuda")


@pytest.fixture
def run(fresh_process, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """run(script) -> what it prints, without fastattn's environment variables."""
    for name in os.environ:
        if name.startswith(("FASTATTN_", "TRITON_")):
            monkeypatch.delenv(name)

    def output(script: str) -> str:
        done = fresh_process(script)
        assert done.returncode == 0, f"{script}\n{done.stderr[-4000:]}"
        return str(done.stdout)

    return output


def blocked(*names: str) -> str:
    return f"import sys\nfor name in {names!r}: sys.modules[name] = None\n"


def test_import_without_any_optional_part(run) -> None:
    script = blocked(*OPTIONAL) + "import fastattn; print(fastattn.__version__, sorted(fastattn.backends()))"
    assert "['cpu', 'cuda', 'reference', 'triton']" in run(script)


def test_missing_parts_are_sentences(run) -> None:
    script = blocked(*OPTIONAL) + "import fastattn\nfor item in fastattn.backends().items(): print(*item, sep=': ')"
    lines = dict(line.split(": ", 1) for line in run(script).splitlines())
    assert lines.pop("reference") == "None"
    assert all(" " in reason and "Traceback" not in reason for reason in lines.values()), lines


def test_without_native_libraries_the_reference_answers(run) -> None:
    script = (
        blocked(*OPTIONAL)
        + "import warnings, torch, fastattn\n"
        + "warnings.simplefilter('ignore')\n"
        + "x = torch.randn(3, 8)\n"
        + "want = torch.nn.functional.layer_norm(x, (8,))\n"
        + "print(torch.allclose(fastattn.layer_norm(x), want, atol=1e-6))"
    )
    assert run(script) == "True\n"


def test_swap_needs_no_transformers(run) -> None:
    script = (
        blocked(*OPTIONAL)
        + "import torch, fastattn\n"
        + "model = torch.nn.Sequential(torch.nn.LayerNorm(8))\n"
        + "report = fastattn.swap(model)\n"
        + "print(type(model[0]) is torch.nn.LayerNorm); report.undo(); print(type(model[0]) is torch.nn.LayerNorm)"
    )
    assert run(script) == "False\nTrue\n"


def test_the_command_without_its_extra_says_what_to_install(fresh_process) -> None:
    script = blocked("rich", "typer") + "from fastattn import cli\ncli.main()"
    done = fresh_process(script)
    assert done.returncode != 0
    assert "fastattn[cli]" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_importing_changes_nothing(run) -> None:
    script = """
import os, sys, threading, warnings
import torch
warnings.filterwarnings("error", category=UserWarning, module="fastattn")
def state():
    return (
        dict(os.environ), threading.active_count(), torch.get_num_threads(), torch.get_default_dtype(),
        torch.random.initial_seed(), torch.get_rng_state().tolist(), torch.get_float32_matmul_precision(),
        list(warnings.filters), sys.getrecursionlimit(), list(sys.path), list(sys.meta_path),
    )
before = state()
loaded = set(sys.modules)
import fastattn
new = set(sys.modules) - loaded
print(before == state(), sorted(new & {"transformers", "triton", "rich", "fastattn._cpu", "fastattn.swap"}))
"""
    assert run(script) == "True []\n"


def test_dynamo_is_imported_for_graphs_alone(run) -> None:
    """It takes most of a second."""
    script = """
import sys
import torch, fastattn
from fastattn.masks import BigBird, Causal
q = torch.randn(1, 1, 200, 8)
fastattn.attention(q, q, q, mask=Causal() & BigBird(64, 1, 1, 1, 0))
layer = torch.nn.TransformerEncoderLayer(8, 1, 16, batch_first=True).eval()
fastattn.swap(layer)
layer(q[0])
print("torch._dynamo" in sys.modules)
"""
    assert run(script) == "False\n"


def test_what_graphs_hold_is_marked_as_torch_marks_it() -> None:
    def ours() -> int:
        return 0

    def theirs() -> int:
        return 0

    assert vars(constant(ours)) == vars(torch.compiler.assume_constant_result(theirs))


@pytest.mark.parametrize(
    "first", ["torch.export.export(Norm(), (x,))", "torch.func.grad(lambda x: Norm()(x).sum())(x)"]
)
def test_it_may_first_be_used_within_a_trace(run, first) -> None:
    script = f"""
import torch, fastattn
class Norm(torch.nn.Module):
    def forward(self, x): return fastattn.layer_norm(x)
x = torch.randn(5, 16)
with torch.no_grad():
    {first}
    print(type(fastattn.layer_norm(x, dropout_p=0.1)).__name__, fastattn.rms_norm(torch.randn(16, 5).t()).shape[0])
"""
    assert run(script) == "Tensor 5\n"
