"""Cases in several processes: the same report as in one, a crash that costs one case, and a run that is cut off."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest

from fastattn.parity import pool, run
from fastattn.parity.pool import Crash, answers
from fastattn.parity.run import verify


def _answer(task: str) -> str:
    """Runs in a process of the pool."""
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == "hang":
        time.sleep(60)
    return f"{task} by {os.getpid()}"


def test_two_processes_report_what_one_does():
    one = verify("norm,linear_act", "reference", cases=6, seed=3)
    seen = []
    two = verify("norm,linear_act", "reference", cases=6, seed=3, jobs=2, progress=lambda: seen.append(1))
    assert replace(two, seconds=one.seconds) == one and len(seen) == 12
    assert two.to_json() | {"seconds": one.seconds} == one.to_json() and list(two.worst) == list(one.worst)
    assert one.cases == one.asked == {"norm": 6, "linear_act": 6} and not one.left_out


def test_a_crash_or_a_hang_costs_its_task_and_a_crashed_process_is_replaced(monkeypatch):
    started = []  # the clock stands still until then: how long a process takes to start is not the subject
    real = time.monotonic
    monkeypatch.setattr(pool.time, "monotonic", lambda: real() - started[0] if started else 0.0)
    monkeypatch.setattr(pool, "PATIENCE", 0.2)
    found = {}
    for position, answer in answers(_answer, ["a", "crash", "b", "c", "hang", "d"], jobs=1, until=0.3):
        found[position] = answer
        if position == 3:
            started.append(real())
    assert found[1] == Crash("its process was ended by SIGSEGV")
    assert [found[n].split(" by ")[0] for n in (0, 2, 3)] == ["a", "b", "c"]
    assert found[0].split()[-1] != found[2].split()[-1] == found[3].split()[-1]
    assert list(found) == [0, 1, 2, 3, 4] and "still running 0 s after the time was up" in found[4].how


def test_crashes_are_failures_of_their_cases(monkeypatch):
    def crash(ask, tasks, jobs, until):
        for position, task in enumerate(tasks):
            yield position, Crash("its process was ended by SIGBUS") if position == 1 else ask(task)

    monkeypatch.setattr(run, "answers", crash)
    report = verify("norm", "reference", cases=3, seed=1, jobs=2)
    (failure,) = report.failures
    assert not report.passed and report.checked == 3 and report.cases == {"norm": 3}
    assert failure.case == "1.1" and "SIGBUS" in str(failure) and "--repro 1.1" in failure.repro


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_is_cut_off_says_so(jobs):
    report = verify("norm,ffn", "reference", cases=4, jobs=jobs, seconds=0)
    assert report.left_out == 8 and not report.cases and report.asked == {"norm": 4, "ffn": 4}
    assert report.to_json()["left_out"] == 8


def test_operations_take_turns_until_the_time_is_up(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(run.time, "monotonic", lambda: float(next(clock)))
    report = verify("norm,ffn", "reference", cases=10, seconds=7)
    assert report.cases == {"norm": 3, "ffn": 3} and report.left_out == 14


@pytest.mark.parametrize("wrong", [{"jobs": 0}, {"jobs": -1}, {"seconds": -1.0}, {"seconds": float("nan")}])
def test_arguments_are_checked(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        verify("norm", "reference", **wrong)
    with pytest.raises(ValueError, match="op='fnf' is unknown"):
        verify("norm,fnf", "reference")
