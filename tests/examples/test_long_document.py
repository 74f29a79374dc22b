"""The example of the long document runs on a short one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(os.environ.get("FASTATTN_CHECKOUT", Path(__file__).resolve().parents[2]))
EXAMPLE = CHECKOUT / "examples" / "long_document.py"

pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="FASTATTN_CHECKOUT does not name a checkout")


@pytest.mark.slow
def test_it_prints_a_table_and_saves_a_picture(tmp_path):
    for needed in ("matplotlib", "rich", "typer"):
        pytest.importorskip(needed)
    picture = tmp_path / "masks.png"
    command = [sys.executable, str(EXAMPLE), "--tokens", "300", "--layers", "1", "--repeats", "1"]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([*command, "--output", str(picture)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = {line.split("│")[1].strip(): line.split("│") for line in done.stdout.splitlines() if line.count("│") > 4}
    assert list(rows) == ["full attention", "Longformer", "BigBird", "torch sdpa, Longformer as a bool mask"]
    assert rows["full attention"][2].strip() == "100.0 %" and rows["Longformer"][2] == rows[list(rows)[3]][2]
    difference = float(done.stdout.split("differ by ")[1].split(" ")[0])
    assert difference < 1e-3
    assert picture.read_bytes().startswith(b"\x89PNG")
