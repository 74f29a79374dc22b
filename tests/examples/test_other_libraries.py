"""The example that times models of other libraries, with one that stands for a library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(os.environ.get("FASTATTN_CHECKOUT", Path(__file__).resolve().parents[2]))
EXAMPLE = CHECKOUT / "examples" / "other_libraries.py"

pytestmark = [
    pytest.mark.skipif(not EXAMPLE.exists(), reason="FASTATTN_CHECKOUT does not name a checkout"),
    pytest.mark.slow,
]

LIBRARY = """
from torch import nn

class ViT(nn.Module):
    def __init__(self, dim, mlp_dim, num_classes, **options):
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 16, 16)
        self.block = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))
        self.own = nn.LayerNorm(dim, bias=False)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.own(x + self.block(x)).mean(1))
"""


def test_a_library_and_what_is_not_installed(tmp_path: Path) -> None:
    for needed in ("rich", "typer"):
        pytest.importorskip(needed)
    (tmp_path / "vit_pytorch.py").write_text(LIBRARY)
    (tmp_path / "timm.py").write_text("raise ImportError('no timm here')\n")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": paths}
    printed = ""
    for only in ("vit-pytorch ViT", "timm ViT"):
        command = [sys.executable, str(EXAMPLE), "--only", only, "--repeats", "1", "--left"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    rows = [line.split("│") for line in printed.splitlines() if line.count("│") > 4]
    assert [row[1].strip() for row in rows] == ["vit-pytorch ViT, 6 x 384"] and float(rows[0][4]) > 0
    assert "timm ViT-S/16: no timm here" in printed
