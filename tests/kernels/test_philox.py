"""Dropout inside a Triton kernel keeps exactly what the reference keeps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

COMPARE = """
import torch
import triton
import triton.language as tl
from fastattn.kernels.philox import dropout_factor
from fastattn.reference.philox import dropout_scale, dropout_threshold, keep_mask


@triton.jit
def factors(out, seed, columns, threshold, scale, BLOCK: tl.constexpr):
    row, start = tl.program_id(0), tl.program_id(1) * BLOCK
    factor = dropout_factor(tl.load(seed), row, 3, start, threshold, scale, BLOCK)
    at = start + tl.arange(0, BLOCK)
    tl.store(out + row * columns + at, factor, mask=at < columns)


for value, p, columns, block in ((0, 0.5, 32, 32), (-7, 0.1, 200, 64), (2**62 + 12345, 0.9, 77, 128)):
    seed, rows = torch.tensor([value]), 5
    out = torch.full((rows, columns), float("nan"))
    factors[(rows, triton.cdiv(columns, block))](
        out, seed, columns, dropout_threshold(p), dropout_scale(p), BLOCK=block
    )
    keep = keep_mask(seed, p, 4, rows, columns)[3]
    assert torch.equal(out, keep * torch.tensor(dropout_scale(p))), (value, p, columns, block)
print("equal")
"""


def test_kept_elements_equal_the_reference(tmp_path: Path) -> None:
    script = tmp_path / "compare.py"  # triton.jit reads the source of a kernel from its file
    script.write_text(COMPARE)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.stdout == "equal\n", run.stderr[-4000:]
