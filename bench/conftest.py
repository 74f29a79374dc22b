"""pytest-benchmark over the cases of `fastattn bench`: `pytest bench`, or `pytest bench --quick` for a trial.

Each test is one provider on one case in one direction: skipped with its reason where the provider is missing or
refuses, failed where its results break the parity rule, timed otherwise. pytest-benchmark times one test after the
other by the host's clock; for figures to compare providers by, `fastattn bench` interleaves them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastattn.bench.cases.base import Case
from fastattn.bench.cases.grid import Choice, cases
from fastattn.bench.providers import PROVIDERS, Provider
from fastattn.bench.providers.torch_eager import Sdpa
from fastattn.bench.run import Options, check_provider, inputs_and_truth, questions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="tiny sizes, and no provider that compiles")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test per case, direction and provider of the suite that the file is named after."""
    quick = metafunc.config.getoption("--quick")
    suite = metafunc.module.__name__.rpartition("test_")[2]
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    asked = questions(cases([suite], Choice(DEVICE, dtype, quick=quick)), Options(device=DEVICE))
    found = [
        pytest.param(case, direction, provider, id=f"{case.name}-{direction}-{provider.name}")
        for case, direction in asked
        for provider in PROVIDERS
        if provider.serves(case)
    ]
    metafunc.parametrize(("case", "direction", "provider"), found)


@functools.lru_cache(maxsize=1)
def _truth(case: Case, direction: str) -> Any:
    torch._dynamo.reset()
    return inputs_and_truth(case, direction)


@pytest.fixture
def timed(
    request: pytest.FixtureRequest, benchmark: Any, case: Case, direction: str, provider: Provider
) -> Callable[[], None]:
    """Verifies the provider on the case, and returns what times it."""
    reason = provider.unavailable_reason(DEVICE) or provider.refuses(case, direction)
    if provider.compiles and (direction not in case.compiled or request.config.getoption("--quick")):
        reason = reason or "it compiles for seconds for every shape"
    if reason is not None:
        pytest.skip(reason)
    Sdpa.any()  # an SDPA provider timed before left it one backend
    checked = check_provider(provider, case, direction, *_truth(case, direction))
    if checked.fails:
        pytest.fail(checked.reason or "")
    if checked.job is None:
        pytest.skip(checked.reason or "")
    job = checked.job

    def call() -> None:
        job.call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def run() -> None:
        with torch.set_grad_enabled(job.grad):
            benchmark(call)
        benchmark.extra_info.update(case.parameters(), worst=checked.worst, work=case.work(direction).amount)

    return run
