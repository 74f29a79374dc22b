"""Processes that answer one task at a time each, so that a crash costs that task alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

PATIENCE = 30.0
"""Seconds after the end of the time until which a task that is being answered may still be."""


@dataclass(frozen=True)
class Crash:
    """A task without an answer: what became of its process."""

    how: str


class _Worker:
    """A process of its own, and the position of the task that it was given last and has not answered."""

    def __init__(self, ask: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads and the CUDA context
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, ask), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is the end of the pipe
        self.ready = False
        self.position: int | None = None

    def give(self, position: int, task: Any) -> None:
        self.position = position
        with contextlib.suppress(OSError):  # where it is gone the next receive says so, and the task is its loss
            self.pipe.send(task)

    def how_it_ended(self) -> str:
        self.process.join(PATIENCE)
        code = self.process.exitcode
        if code is None:
            return "closed its pipe and lives on"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()  # it is idle, or nobody waits for its answer
        self.process.join(PATIENCE)  # a driver may hold it for longer


def answers(
    ask: Callable[[Any], Any], tasks: Sequence[Any], jobs: int, until: float | None = None
) -> Iterator[tuple[int, Any]]:
    """Yields (position of the task, ask(task)) from `jobs` processes as they are done; a Crash in place of no answer.

    ask and the answers are pickled. until: the time.monotonic() after which no task is begun; one that is not answered
    `PATIENCE` seconds later is given up as a Crash. A process that crashes, or whose CUDA context is broken after a
    task, is replaced. Torch uses one thread in each. RuntimeError where a process ends before it takes a task.
    """
    waiting = deque(enumerate(tasks))
    workers = [_Worker(ask) for _ in range(min(jobs, len(tasks)))]

    def open_tasks() -> bool:
        return bool(waiting) and (until is None or time.monotonic() < until)

    try:
        while True:
            for worker in workers:
                if worker.ready and worker.position is None and open_tasks():
                    worker.give(*waiting.popleft())
            asked = [worker for worker in workers if worker.position is not None]
            starting = [worker for worker in workers if not worker.ready] if open_tasks() else []
            if not asked and not starting:
                return
            end = None if until is None else until + (PATIENCE if asked else 0.0)
            limit = None if end is None else max(0.0, end - time.monotonic())
            pipes = wait([worker.pipe for worker in asked + starting], limit)
            for worker in asked + starting:
                late = end is not None and time.monotonic() >= end
                if worker.pipe not in pipes and not (late and worker.position is not None):
                    continue
                position, answer, sound = worker.position, *_heard(worker, jobs, worker.pipe in pipes)
                worker.position = None
                if not sound:
                    worker.end()
                    workers.remove(worker)
                    if open_tasks():
                        workers.append(_Worker(ask))
                if position is not None:
                    yield position, answer
    finally:
        for worker in workers:
            worker.end()


def _heard(worker: _Worker, jobs: int, spoke: bool) -> tuple[Any, bool]:
    """What a worker said, or the Crash that it is, and whether it takes another task."""
    if not spoke:
        return Crash(f"it was still running {PATIENCE:.0f} s after the time was up"), False
    try:
        said, sound = worker.pipe.recv()
    except (EOFError, OSError):
        if not worker.ready:
            how = worker.how_it_ended()
            raise RuntimeError(f"jobs={jobs}: a process {how} before its first case; its output says why") from None
        return Crash(f"its process {worker.how_it_ended()}"), False
    worker.ready = True
    return said, sound


def _serve(pipe: Connection, ask: Callable[[Any], Any]) -> None:
    """Answers tasks until the other end of the pipe is closed, which the end of that process does too."""
    torch.set_num_threads(1)
    pipe.send((None, True))  # ready
    sound = True
    while sound:
        try:
            task = pipe.recv()
        except EOFError:
            return
        answer, sound = ask(task), _context_is_sound()
        pipe.send((answer, sound))


def _context_is_sound() -> bool:
    """False after an error that stays with the CUDA context, as an illegal memory access does: every later call of the
    process would report it again."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
