"""The example that generates text, with a model of two layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(os.environ.get("FASTATTN_CHECKOUT", Path(__file__).resolve().parents[2]))
EXAMPLE = CHECKOUT / "examples" / "generate_swapped.py"

pytestmark = [
    pytest.mark.skipif(not EXAMPLE.exists(), reason="FASTATTN_CHECKOUT does not name a checkout"),
    pytest.mark.slow,
]


@pytest.mark.parametrize(("model", "dtype", "options"), [("llama", "float32", ["--prepack"]), ("gpt2", "bfloat16", [])])
def test_both_models_say_the_same(model, dtype, options):
    for needed in ("rich", "transformers", "typer"):
        pytest.importorskip(needed)
    small = ["--layers", "2", "--width", "512", "--prompt", "9", "--new", "4", "--repeats", "1"]
    command = [sys.executable, str(EXAMPLE), "--model", model, "--dtype", dtype, *small, *options, "--batch", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    rows = [line.split("│") for line in done.stdout.splitlines() if line.count("│") > 4]
    assert [row[2].strip() for row in rows] == ["read", "generate 4"]
    assert all(float(row[5]) > 0 for row in rows)
    assert ("MiB were kept packed" in done.stdout) == ("--prepack" in options)
