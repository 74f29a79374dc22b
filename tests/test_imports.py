"""`import fastattn` needs torch and numpy only, and does nothing but import."""

from __future__ import annotations

import os
import subprocess
import sys

OPTIONAL = ("triton", "transformers", "rich", "typer", "matplotlib", "fastattn._cpu", "fastattn._cuda")


def run(script: str, *options: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FASTATTN_", "TRITON_"))}
    done = subprocess.run([sys.executable, *options, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\n{done.stderr[-4000:]}"
    return done.stdout


def blocked(*names: str) -> str:
    return f"import sys\nfor name in {names!r}: sys.modules[name] = None\n"


def test_import_without_any_optional_part() -> None:
    script = blocked(*OPTIONAL) + "import fastattn; print(fastattn.__version__, sorted(fastattn.backends()))"
    assert "['cpu', 'cuda', 'reference', 'triton']" in run(script)


def test_missing_parts_are_sentences() -> None:
    script = blocked(*OPTIONAL) + "import fastattn\nfor item in fastattn.backends().items(): print(*item, sep=': ')"
    lines = dict(line.split(": ", 1) for line in run(script).splitlines())
    assert lines.pop("reference") == "None"
    assert all(" " in reason and "Traceback" not in reason for reason in lines.values()), lines


def test_without_native_libraries_the_reference_answers() -> None:
    script = (
        blocked(*OPTIONAL)
        + "import warnings, torch, fastattn\n"
        + "warnings.simplefilter('ignore')\n"
        + "x = torch.randn(3, 8)\n"
        + "want = torch.nn.functional.layer_norm(x, (8,))\n"
        + "print(torch.allclose(fastattn.layer_norm(x), want, atol=1e-6))"
    )
    assert run(script) == "True\n"


def test_swap_needs_no_transformers() -> None:
    script = (
        blocked(*OPTIONAL)
        + "import torch, fastattn\n"
        + "model = torch.nn.Sequential(torch.nn.LayerNorm(8))\n"
        + "report = fastattn.swap(model)\n"
        + "print(type(model[0]) is torch.nn.LayerNorm); report.undo(); print(type(model[0]) is torch.nn.LayerNorm)"
    )
    assert run(script) == "False\nTrue\n"


def test_the_command_without_its_extra_says_what_to_install() -> None:
    script = blocked("rich", "typer") + "from fastattn import cli\ncli.main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
    assert "fastattn[cli]" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_importing_changes_nothing() -> None:
    script = """
import os, sys, threading, warnings
import torch
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
    assert run(script, "-W", "error::UserWarning:fastattn") == "True []\n"
