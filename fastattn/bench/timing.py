"""Interleaved timing: every round calls each provider, so that a slow minute of the machine hits all of them.

On a CPU a sample is the mean of enough calls in a row to last about a millisecond, by the wall clock, with caches as
the other providers left them. On a GPU a sample is one replay of a CUDA graph of the call between two events, after a
kernel that overwrites twice the L2 cache. The flush runs long enough for the host to queue what follows it, so that
the time between two launches is not counted; the work inside the graph keeps its own gaps. Nothing is subtracted: what
this clock shows for a graph of one empty kernel is measured too and printed with the limits.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from fastattn.bench.providers.base import Job

OUT_OF_MEMORY = "out of memory"
_SAMPLE_SECONDS = 1e-3
_SLOW_SECONDS, _FAR_BEHIND = 0.1, 3.0
_FLUSH_L2_TIMES = 2
_LEAST_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Effort:
    """How long to time: at least `rounds` rounds, then on until `seconds` are over or `most` rounds are made.

    few: the rounds after which a call stays out that takes over a tenth of a second and three times as long as the
    fastest: its place is clear, and minutes of a run would go into it.
    """

    rounds: int = 5
    seconds: float = 1.0
    most: int = 200
    warm_up: int = 2
    few: int = 3


QUICK = Effort(rounds=2, seconds=0.0, most=2, warm_up=1, few=1)


@dataclass(frozen=True)
class Timing:
    """Samples in ms per call, and what a reader should know about them."""

    samples: list[float]
    note: str = ""

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.percentile(self.samples, [25, 75])
        return float(low), float(high)


@contextlib.contextmanager
def own_stream(device: str) -> Iterator[None]:
    """On a GPU, a stream of its own for everything inside: the default stream cannot be captured, and a backward runs
    on the stream of its forward, which therefore has to be the one that is captured."""
    if device != "cuda":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def time_jobs(
    jobs: Mapping[str, Job], device: str, effort: Effort, failed: dict[str, str] | None = None
) -> dict[str, Timing]:
    """Times each job, interleaved. Jobs have run before, inside the same `own_stream`, and are known to work; what one
    raises that fails all the same when it is warmed up goes into `failed`, and it has no times."""
    if not jobs:
        return {}
    with torch.set_grad_enabled(any(job.grad for job in jobs.values())):
        timer = _CudaTimer(effort) if device == "cuda" else _CpuTimer(effort)
        timings = timer.time({name: job.call for name, job in jobs.items()})
    if failed is not None:
        failed |= timer.failed
    return timings


def said(error: Exception) -> str:
    """What kind of error it is and its first line, for a table."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:240]}"


def _turns(draw: random.Random, jobs: Iterable[str]) -> list[str]:
    """An order for one round. Drawn, for in a fixed one each call would find the caches as the same other left them."""
    names = list(jobs)
    return draw.sample(names, len(names))


@dataclass
class _CpuTimer:
    effort: Effort
    failed: dict[str, str] = field(default_factory=dict)
    _calls: dict[str, int] = field(default_factory=dict)

    def time(self, jobs: dict[str, Callable[[], object]]) -> dict[str, Timing]:
        samples: dict[str, list[float]] = {}
        for name, call in jobs.items():
            try:
                samples[name] = self._warm_up(name, call)
            except Exception as error:  # a compiler or another project's kernel may raise anything
                self.failed[name] = said(error)
        if not samples:
            return {}
        draw = random.Random(0)
        began = time.perf_counter()
        for number in range(self.effort.most):
            behind = self._far_behind(samples) if number else set()
            for name in _turns(draw, samples):
                if name not in behind or len(samples[name]) < self.effort.few:
                    samples[name].append(1e3 * self._seconds(jobs[name], self._calls[name]))
            if number + 1 >= self.effort.rounds and time.perf_counter() - began > self.effort.seconds:
                break
        return {name: Timing(found) for name, found in samples.items()}

    def _warm_up(self, name: str, call: Callable[[], object]) -> list[float]:
        """Samples that count already."""
        once = self._seconds(call, 1)
        counts = once > _SLOW_SECONDS  # it has run once to be verified
        for _ in range(0 if counts else self.effort.warm_up - 1):
            once = min(once, self._seconds(call, 1))
        self._calls[name] = max(1, round(_SAMPLE_SECONDS / max(once, 1e-7)))
        return [1e3 * once] if counts else []

    @staticmethod
    def _far_behind(samples: dict[str, list[float]]) -> set[str]:
        fastest = min(min(found) for found in samples.values())
        return {name for name, found in samples.items() if min(found) > max(1e3 * _SLOW_SECONDS, _FAR_BEHIND * fastest)}

    @staticmethod
    def _seconds(call: Callable[[], object], times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - began) / times


class _CudaTimer:
    """Replays of CUDA graphs between events, each after a flush of the L2 cache."""

    _ROUNDS_QUEUED = 4

    def __init__(self, effort: Effort) -> None:
        self.effort = effort
        self.failed: dict[str, str] = {}
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.scratch = torch.empty(max(_LEAST_FLUSH_BYTES, _FLUSH_L2_TIMES * l2), dtype=torch.uint8, device="cuda")

    def time(self, jobs: dict[str, Callable[[], object]]) -> dict[str, Timing]:
        replays, notes = {}, {}
        for name, call in jobs.items():
            try:
                replays[name], notes[name] = self._graph(call)
            except torch.OutOfMemoryError:  # beside the memory of the graphs before it
                torch.cuda.empty_cache()
                self.failed[name] = OUT_OF_MEMORY
            except Exception as error:
                self.failed[name] = said(error)
        samples: dict[str, list[float]] = {name: [] for name in replays}
        if not replays:
            return {}
        draw = random.Random(0)
        began = time.perf_counter()
        for number in range(0, self.effort.most, self._ROUNDS_QUEUED):
            queued = []
            for _ in range(number, min(number + self._ROUNDS_QUEUED, self.effort.most)):
                queued += [(name, self._queue(replays[name])) for name in _turns(draw, replays)]
            torch.cuda.synchronize()
            for name, (start, end) in queued:
                samples[name].append(start.elapsed_time(end))
            enough = number + self._ROUNDS_QUEUED >= self.effort.rounds
            if enough and time.perf_counter() - began > self.effort.seconds:
                break
        return {name: Timing(found, notes[name]) for name, found in samples.items()}

    def _queue(self, replay: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.scratch.fill_(1)
        start.record()
        replay()
        end.record()
        return start, end

    def _graph(self, call: Callable[[], object]) -> tuple[Callable[[], object], str]:
        """The replay of a graph of the call; the call itself, and why, where it cannot be captured."""
        for _ in range(self.effort.warm_up):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                kept = call()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a kernel does that a capture forbids
            torch.cuda.synchronize()
            return call, f"launched, not replayed from a CUDA graph: {said(error)}"

        def replay(_kept: object = kept) -> None:  # the graph writes into what the captured call returned
            graph.replay()

        return replay, ""


def empty_graph_ms() -> float:
    """What the GPU clock shows for a graph of one kernel that does next to nothing."""
    one = torch.zeros(1, device="cuda")
    timer = _CudaTimer(Effort(rounds=40, seconds=0.0, most=40))
    return timer.time({"empty": lambda: one.add_(1)})["empty"].median
