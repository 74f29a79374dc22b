"""Tunes tile tables: times every choice a backend offers for a kernel, and says which is fastest. Changes no table.

New figures are proposals: a person puts them into the backend's table, with the device and the date.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.bench.cases.base import OpCase
from fastattn.bench.providers.base import Job
from fastattn.bench.providers.ours import Ours
from fastattn.bench.run import check_provider, inputs_and_truth
from fastattn.bench.timing import QUICK, Effort, own_stream, time_jobs
from fastattn.bench.tunables import Tunable, tunables


@dataclass(frozen=True)
class Tuned:
    """The times of one entry's choices in ms; why a choice has none stands in `reasons`."""

    backend: str
    name: str
    direction: str
    now: Any
    times: dict[str, float]
    reasons: dict[str, str]

    @property
    def best(self) -> str | None:
        return min(self.times, key=lambda choice: self.times[choice]) if self.times else None

    def __str__(self) -> str:
        if self.best is None:
            return f"{self.backend} {self.name}, {self.direction}: no choice runs"
        mine = self.times.get(str(self.now))
        gain = "" if mine is None else f", {mine / self.times[self.best]:.2f} times as fast as now ({self.now})"
        return f"{self.backend} {self.name}, {self.direction}: {self.best}{gain}"


def tune(
    device: str,
    dtype: torch.dtype,
    *,
    quick: bool = False,
    step: Callable[[str], object] = lambda _: None,
    keep: Callable[[list[Tuned]], object] = lambda _: None,
) -> list[Tuned]:
    """Times every choice of every table entry; each choice is verified first.

    quick: the first two entries of each backend, two choices each, two rounds. keep: gets what was found so far after
    each entry, should the run be cut off.
    """
    results = []
    with own_stream(device):
        for backend, entries in tunables(device).items():
            for entry in entries[:2] if quick else entries:
                for direction in entry.directions:
                    step(f"{backend} {entry.name}, {direction}")
                    results.append(_tune_one(backend, entry, direction, device, dtype, quick))
                    keep(results)
    return results


def case_of(entry: Tunable, device: str, dtype: torch.dtype) -> OpCase:
    """The case that a table entry is timed on."""
    home = importlib.import_module(f"fastattn.bench.cases.{entry.suite}")
    made: OpCase = getattr(home, f"{entry.suite.capitalize()}Case")(
        name=entry.name, group="tune", device=device, dtype=dtype, **entry.sizes
    )
    return made


def _tune_one(backend: str, entry: Tunable, direction: str, device: str, dtype: torch.dtype, quick: bool) -> Tuned:
    case, provider = case_of(entry, device, dtype), Ours(backend)
    inputs, expected = inputs_and_truth(case, direction)
    jobs: dict[str, Job] = {}
    reasons: dict[str, str] = {}
    for choice in list(entry.choices)[:2] if quick else entry.choices:
        with entry.use(choice):
            checked = check_provider(provider, case, direction, inputs, expected)
        if checked.job is None:
            reasons[str(choice)] = checked.reason or ""
        else:
            jobs[str(choice)] = _under(entry, choice, checked.job)
    times = time_jobs(jobs, device, QUICK if quick else Effort(rounds=20, seconds=0.5))
    return Tuned(backend, entry.name, direction, entry.now, {c: t.median for c, t in times.items()}, reasons)


def _under(entry: Tunable, choice: Any, job: Job) -> Job:
    """The job with its table entry set during each call; a CUDA graph has the choice in it."""

    def call() -> tuple[torch.Tensor, ...]:
        with entry.use(choice):
            return job.call()

    return Job(call, job.names, job.grad)
