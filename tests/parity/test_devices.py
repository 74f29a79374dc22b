"""The drawing of cases and their check keep to one device: on the CPU a tensor made on the wrong one goes unseen."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils import backend_registration

SCRIPT = Path(__file__).with_name("elsewhere.py")


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot be given a device in Python",
)
@pytest.mark.parametrize("op", ["attention", "attention_decode", "encoder_layer"])
def test_a_case_is_drawn_and_checked_on_its_device_alone(fresh_process, op: str) -> None:
    ran = fresh_process(SCRIPT.read_text(), op, "0", "12")
    assert ran.returncode == 0, f"{SCRIPT} {op} 0 12: {ran.stderr[-3000:]}"
    assert f"{op}: " in ran.stdout
