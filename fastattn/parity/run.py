"""Runs drawn cases of an operation through a backend and reports the worst error ratios."""

from __future__ import annotations

import contextlib
import math
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fastattn.dispatch import backends
from fastattn.errors import NotSupported
from fastattn.parity.bound import ParityRow
from fastattn.parity.cases import OPERATIONS, Case, draw_case, token
from fastattn.parity.guards import torch_threads


@dataclass
class Worst:
    """The worst row of one quantity in one dtype, and how many rows there were."""

    rows: int = 0
    ratio: float = 0.0
    case: str = ""

    def add(self, row: ParityRow, case: str) -> None:
        self.rows += 1
        if row.worst_ratio >= self.ratio:
            self.ratio, self.case = row.worst_ratio, case


@dataclass(frozen=True)
class Failure:
    """One case that failed: how to replay it, what it calls, and the rows (or the exception) that failed."""

    op: str
    case: str
    repro: str
    describe: str
    rows: list[ParityRow]
    exception: str = ""

    def __str__(self) -> str:
        lines = [self.repro, f"  {self.describe}", *(f"  {row}" for row in self.rows)]
        return "\n".join([*lines, *(f"  {line}" for line in self.exception.splitlines())])


@dataclass
class VerifyReport:
    """What `verify` found. worst: keyed (op, dtype, quantity). refusals: keyed (op, reason).

    cases: drawn, per op. checked: how many of them ran and were compared; the others were refused. forward_only: how
    many of those checked have gradients that the backend refuses, so that only their forward was compared.
    """

    backend: str
    seed: int
    isa: str | None = None
    cases: Counter[str] = field(default_factory=Counter)
    worst: dict[tuple[str, str, str], Worst] = field(default_factory=dict)
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    checked: int = 0
    forward_only: int = 0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """True where no case failed. A refusal is no failure."""
        return not self.failures

    @property
    def refused(self) -> int:
        """How many cases the backend refused."""
        return sum(self.cases.values()) - self.checked

    def to_json(self) -> dict[str, Any]:
        """A dict of plain numbers and strings."""
        return {
            "backend": self.backend,
            "seed": self.seed,
            "passed": self.passed,
            "cases": dict(self.cases),
            "checked": self.checked,
            "forward_only": self.forward_only,
            "refused": self.refused,
            "seconds": self.seconds,
            "worst": [
                {"op": op, "dtype": dtype, "quantity": name, "rows": w.rows, "ratio": _finite(w.ratio), "case": w.case}
                for (op, dtype, name), w in sorted(self.worst.items())
            ],
            "refusals": [{"op": op, "reason": why, "count": n} for (op, why), n in self.refusals.most_common()],
            "failures": [
                {
                    "op": f.op,
                    "case": f.case,
                    "repro": f.repro,
                    "call": f.describe,
                    "rows": [{"quantity": r.name, "ratio": _finite(r.worst_ratio), "where": r.where} for r in f.rows],
                    "exception": f.exception,
                }
                for f in self.failures
            ],
        }

    def record(self, op: str, index: int, case: Case, rows: list[ParityRow]) -> None:
        """Adds the rows of one case that ran; those that failed become a failure."""
        self.checked += 1
        dtype, name = str(case.dtype).removeprefix("torch."), token(self.seed, index)
        for row in rows:
            self.worst.setdefault((op, dtype, row.name), Worst()).add(row, name)
        failed = [row for row in rows if not row.passed]
        if failed:
            self.failures.append(Failure(op, name, self.repro(op, index), case.describe(), failed))

    def record_exception(self, op: str, index: int, case: Case, error: Exception) -> None:
        """Adds a case that ended in an exception other than a refusal."""
        self.checked += 1
        trace = "".join(traceback.format_exception(error)[-3:]).rstrip()
        name = token(self.seed, index)
        self.failures.append(Failure(op, name, self.repro(op, index), case.describe(), [], trace))

    def repro(self, op: str, index: int) -> str:
        """The command that replays one case."""
        isa = f" --isa {self.isa}" if self.isa else ""
        return f"fastattn verify --op {op} --backend {self.backend}{isa} --repro {token(self.seed, index)}"


def _finite(ratio: float) -> float | str:
    return ratio if math.isfinite(ratio) else str(ratio)


def verify(
    op: str,
    backend: str,
    cases: int = 200,
    seed: int = 0,
    *,
    only: Iterable[int] | None = None,
    isa: str | None = None,
    device: str = "cpu",
    progress: Callable[[], object] = lambda: None,
) -> VerifyReport:
    """Draws `cases` calls of `op` ("all": that many of each) and checks each on `backend` under the parity rule.

    only: indices to run instead of range(cases), which is how a case is replayed. isa: run the cpu backend's kernels of
    that instruction set. progress is called after each case.
    Raises ValueError for an unknown op, backend or instruction set, and RuntimeError for a backend that this machine
    cannot use. A refusal (fastattn.NotSupported) is counted by reason, and a case refused with its gradients is tried
    again without them; any other exception of a call is a failure of that case.
    """
    if op != "all" and op not in OPERATIONS:
        raise ValueError(f"op={op!r} is unknown: pass one of {', '.join(OPERATIONS)}, or all")
    usable = backends()
    if backend not in usable:
        raise ValueError(f"backend={backend!r} is unknown: pass one of {', '.join(usable)}")
    if usable[backend] is not None:
        raise RuntimeError(f"backend={backend!r} cannot be used here: {usable[backend]}")
    report = VerifyReport(backend, seed, isa)
    indices = range(cases) if only is None else tuple(only)
    start = time.perf_counter()
    with _instruction_set(isa):
        for name in OPERATIONS if op == "all" else (op,):
            for index in indices:
                _run_case(report, name, index, device)
                progress()
    report.seconds = time.perf_counter() - start
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
    case = draw_case(op, report.seed, index, device)
    reasons = _refused(report, op, index, case)
    if reasons and case.conditions.grad:
        case = draw_case(op, report.seed, index, device)
        case.conditions = replace(case.conditions, grad=False, without_gradient=frozenset())
        forward = _refused(report, op, index, case)
        report.forward_only += not forward
        reasons += [why for why in forward if why not in reasons]
    report.refusals.update((op, why) for why in reasons)


def _refused(report: VerifyReport, op: str, index: int, case: Case) -> list[str]:
    """Runs the case and records what came of it, unless the backend refuses it: its reasons, else none."""
    try:
        # the truths of a small case are fastest on one thread; the case itself sets the count of the call under test
        with warnings.catch_warnings(), torch_threads(1):
            # poisoned_outputs turns deterministic mode on; what torch's own eager says about that is not our subject
            warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)
            rows = case.run(report.backend)
    except NotSupported as refusal:
        return refusal.reasons.get(report.backend) or [str(refusal)]
    except Exception as error:  # any crash of the backend is that case's failure; the other cases still run
        report.record_exception(op, index, case, error)
    else:
        report.record(op, index, case, rows)
    return []
