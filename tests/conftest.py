"""Shared fixtures: a seed per test, and the backends that the semantic tests run on."""

from __future__ import annotations

import os
import zlib

import pytest
import torch

from fastattn import dispatch
from fastattn.functional import direct


def pytest_configure() -> None:
    """Workers side by side, and what they start, compute on a thread each: with more, every parallel region waits for
    one that another worker keeps from running. What is about threads sets their number itself."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Every test draws the same numbers each time, alone or in a run; the seed is printed with a failure."""
    seed = zlib.crc32(request.node.nodeid.encode())
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backends that take CPU tensors; a missing one skips with its reason."""
    reason = dispatch.backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return str(request.param)


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain calls on the CPU, too, pass checks, operators and dispatch (see fastattn.functional.direct)."""
    monkeypatch.setattr(direct, "calls", lambda backend: None)
