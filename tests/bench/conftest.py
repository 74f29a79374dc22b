"""Small cases and a run of them, shared by the tests of the bench package."""

from __future__ import annotations

import pytest
import torch

from fastattn.bench.cases.base import Case
from fastattn.bench.cases.grid import Choice, cases
from fastattn.bench.rows import Result
from fastattn.bench.run import Options, run_bench
from fastattn.parity.guards import torch_threads

LEFT_OUT = ("torch.compile", "FlexAttention (compiled)", "torch.compile (freezing)")


@pytest.fixture(autouse=True)
def _one_thread():
    """Nothing here is timed in earnest, and small work on many threads is slow where tests share a machine."""
    with torch_threads(1):
        yield


def quick_cases(*suites: str, shapes: tuple[str, ...] | None = None) -> list[Case]:
    return cases(suites, Choice("cpu", torch.float32, shapes, quick=True))


def quick_run(*suites: str, shapes: tuple[str, ...] | None = None, **options) -> Result:
    chosen = {"quick": True, "compiled": False, "memory": False, **options}
    return run_bench(quick_cases(*suites, shapes=shapes), Options(**chosen))


@pytest.fixture(scope="session")
def result() -> Result:
    """Every suite but model on the shapes of BERT and T5, quick, with memory."""
    with torch_threads(1):
        return quick_run(
            "attention", "packed", "decode", "norm", "ffn", shapes=("bert-base", "t5-base", "gpt2"), memory=True
        )
