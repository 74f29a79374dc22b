"""Runs drawn cases of operations through a backend and reports the worst error ratios."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from fastattn.dispatch import backends
from fastattn.errors import NotSupported
from fastattn.parity.cases import OPERATIONS, Case, draw_case
from fastattn.parity.guards import float32_sums, torch_threads
from fastattn.parity.pool import Crash, answers
from fastattn.parity.report import VerifyReport

_Task = tuple[str, int]  # operation and index of a case


def operations(op: str) -> tuple[str, ...]:
    """The operations that `op` names: one, several between commas, or "all". Raises ValueError for an unknown one."""
    if op == "all":
        return tuple(OPERATIONS)
    for name in (names := op.split(",")):
        if name not in OPERATIONS:
            raise ValueError(f"op={name!r} is unknown: pass one of {', '.join(OPERATIONS)}, or all")
    return tuple(dict.fromkeys(names))


def verify(
    op: str,
    backend: str,
    cases: int = 200,
    seed: int = 0,
    *,
    only: Iterable[int] | None = None,
    isa: str | None = None,
    device: str = "cpu",
    jobs: int = 1,
    seconds: float | None = None,
    progress: Callable[[], object] = lambda: None,
) -> VerifyReport:
    """Draws `cases` calls of each of `operations(op)` and checks each on `backend` under the parity rule.

    only: indices to run instead of range(cases), which is how a case is replayed. isa: run the cpu backend's kernels of
    that instruction set. jobs: run the cases in that many processes, with the same result; a process that crashes is
    the failure of the case that it ran, and another takes its place. seconds: after them no further case is begun, and
    the report says how many were left out; the operations take turns, so that all are cut off alike. progress is
    called after each case.
    Raises ValueError for an unknown op, backend or instruction set, for jobs < 1 and seconds < 0, and RuntimeError for
    a backend that this machine cannot use. A refusal (fastattn.NotSupported) is counted by reason, and a case refused
    with its gradients is tried again without them; where the exact check of its mask alone is refused, the rest of the
    case stands. Any other exception of a call is a failure of that case.
    """
    ops = operations(op)
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: pass how many processes run the cases, 1 or more")
    if seconds is not None and not seconds >= 0:
        raise ValueError(f"seconds={seconds}: pass the seconds after which no case is begun, 0 or more")
    usable = backends()
    if backend not in usable:
        raise ValueError(f"backend={backend!r} is unknown: pass one of {', '.join(usable)}")
    if usable[backend] is not None:
        raise RuntimeError(f"backend={backend!r} cannot be used here: {usable[backend]}")
    indices = range(cases) if only is None else tuple(only)
    start = time.perf_counter()
    until = None if seconds is None else time.monotonic() + seconds
    tasks = [(name, index) for index in indices for name in ops]
    ask = partial(_report_of, backend, seed, isa, device)
    with _instruction_set(isa):  # here too, so that an unknown one is refused before any process is started
        found = {}
        for position, answer in answers(ask, tasks, jobs, until) if jobs > 1 else _in_turn(ask, tasks, until):
            found[position] = answer
            progress()
    report = VerifyReport(backend, seed, isa, asked=Counter({name: len(indices) for name in ops}))
    for position in sorted(found, key=lambda position: (ops.index(tasks[position][0]), position)):
        answer = found[position]
        report.merge(_crashed(report, *tasks[position], answer) if isinstance(answer, Crash) else answer)
    report.seconds = time.perf_counter() - start
    return report


def _in_turn(
    ask: Callable[[_Task], VerifyReport], tasks: Sequence[_Task], until: float | None
) -> Iterator[tuple[int, VerifyReport]]:
    for position, task in enumerate(tasks):
        if until is not None and time.monotonic() >= until:
            return
        yield position, ask(task)


def _report_of(backend: str, seed: int, isa: str | None, device: str, task: _Task) -> VerifyReport:
    """The report of one case alone."""
    report = VerifyReport(backend, seed, isa)
    with _instruction_set(isa):
        _run_case(report, *task, device)
    return report


def _crashed(run: VerifyReport, op: str, index: int, crash: Crash) -> VerifyReport:
    report = VerifyReport(run.backend, run.seed, run.isa)
    report.record_crash(op, index, draw_case(op, run.seed, index), crash.how)
    return report


@contextlib.contextmanager
def _instruction_set(isa: str | None) -> Iterator[None]:
    if isa is None:
        yield
        return
    from fastattn.backends import cpu

    with cpu.use_isa(isa):
        yield


def _run_case(report: VerifyReport, op: str, index: int, device: str) -> None:
    report.cases[op] += 1
    try:
        case = draw_case(op, report.seed, index, device)
    except RuntimeError as error:  # of a GPU that a case before left unusable
        report.record_exception(op, index, draw_case(op, report.seed, index), error)
        return
    ran, reasons = _ran(report, op, index, case)
    if not ran and case.conditions.grad:
        case = draw_case(op, report.seed, index, device)
        case.conditions = replace(case.conditions, grad=False, without_gradient=frozenset())
        ran, forward = _ran(report, op, index, case)
        report.forward_only += ran
        reasons += forward
    report.refusals.update((op, why) for why in dict.fromkeys(reasons))


def _ran(report: VerifyReport, op: str, index: int, case: Case) -> tuple[bool, list[str]]:
    """Runs the case and records what came of it, unless the backend refuses it. Whether it ran, and the reasons not to
    run it or single checks of it."""
    try:
        # the truths of a small case are fastest on one thread; the case itself sets the count of the call under test
        with warnings.catch_warnings(), torch_threads(1), float32_sums():
            # poisoned_outputs turns deterministic mode on; what torch's own eager says about that is not our subject
            warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)
            rows = case.run(report.backend)
    except NotSupported as refusal:
        return False, refusal.why(report.backend)
    except Exception as error:  # any crash of the backend is that case's failure; the other cases still run
        report.record_exception(op, index, case, error)
        return True, []
    report.record(op, index, case, rows)
    return True, [why for row in rows for why in row.refused]
