"""csrc/emulation.py, found in the checkout; a test that needs it skips where nothing can be built."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(os.environ.get("FASTATTN_CHECKOUT", Path(__file__).resolve().parents[2]))


@pytest.fixture(scope="session")
def emulation_build() -> ModuleType:
    """csrc/emulation.py as a module."""
    script = CHECKOUT / "csrc" / "emulation.py"
    if not script.exists():
        pytest.skip("FASTATTN_CHECKOUT does not name a checkout")
    spec = importlib.util.spec_from_file_location("emulation_build", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    return module


@pytest.fixture(scope="session")
def emulated_cuda(emulation_build: ModuleType) -> Path:
    """The folder for FASTATTN_CUDA_EMULATION: the CUDA backend on the CPU."""
    pytest.importorskip("pybind11", reason="the emulated module needs pybind11")
    return Path(emulation_build.build_cuda())
