"""The drawing of cases and their check keep to one device: on the CPU a tensor made on the wrong one goes unseen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

SCRIPT = Path(__file__).with_name("elsewhere.py")


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot be given a device in Python",
)
@pytest.mark.parametrize("op", ["attention", "attention_decode", "encoder_layer"])
def test_a_case_is_drawn_and_checked_on_its_device_alone(op: str) -> None:
    command = [sys.executable, str(SCRIPT), op, "0", "12"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, f"{' '.join(command)}: {ran.stderr[-3000:]}"
    assert f"{op}: " in ran.stdout
