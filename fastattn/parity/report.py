"""What a run of drawn cases found: the worst error ratios, the refusals and the failures."""

from __future__ import annotations

import math
import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fastattn
from fastattn.parity.bound import ParityRow
from fastattn.parity.cases import Case, token


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

    def merge(self, later: Worst) -> None:
        """Adds the rows of later cases: the same as adding each of them."""
        self.rows += later.rows
        if later.case and later.ratio >= self.ratio:
            self.ratio, self.case = later.ratio, later.case


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

    asked: how many cases were asked for, per op. cases: how many of them were drawn before the time was up.
    checked_of: how many of those, per op, ran and were compared; the others were refused. forward_only: how many of
    those checked have gradients that the backend refuses, so that only their forward was compared.
    """

    backend: str
    seed: int
    isa: str | None = None
    asked: Counter[str] = field(default_factory=Counter)
    cases: Counter[str] = field(default_factory=Counter)
    checked_of: Counter[str] = field(default_factory=Counter)
    worst: dict[tuple[str, str, str], Worst] = field(default_factory=dict)
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    forward_only: int = 0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """True where cases were compared and none failed. A refusal is no failure, but of refusals alone nothing
        follows."""
        return not self.failures and self.checked > 0

    @property
    def checked(self) -> int:
        """How many cases ran and were compared."""
        return sum(self.checked_of.values())

    @property
    def left_out(self) -> int:
        """How many cases were not begun because the time was up."""
        return sum(self.asked.values()) - sum(self.cases.values())

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
            "asked": dict(self.asked),
            "cases": dict(self.cases),
            "left_out": self.left_out,
            "checked": self.checked,
            "checked_of": dict(self.checked_of),
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
        """Adds the rows of one case that ran; those that failed become a failure, those that were refused are left
        out."""
        self.checked_of[op] += 1
        dtype, name = str(case.dtype).removeprefix("torch."), token(self.seed, index)
        for row in (row for row in rows if not row.refused):
            self.worst.setdefault((op, dtype, row.name), Worst()).add(row, name)
        failed = [row for row in rows if not row.passed]
        if failed:
            self.failures.append(Failure(op, name, self.repro(op, index), case.describe(), failed))

    def record_exception(self, op: str, index: int, case: Case, error: Exception) -> None:
        """Adds a case that ended in an exception other than a refusal."""
        self._fail_whole(op, index, case, _trace(error))

    def record_crash(self, op: str, index: int, case: Case, how: str) -> None:
        """Adds a case that took its process with it, or never came to an end."""
        self.cases[op] += 1
        self._fail_whole(op, index, case, how)

    def _fail_whole(self, op: str, index: int, case: Case, why: str) -> None:
        self.checked_of[op] += 1
        name = token(self.seed, index)
        self.failures.append(Failure(op, name, self.repro(op, index), case.describe(), [], why))

    def merge(self, later: VerifyReport) -> None:
        """Adds what later cases of the same run found: the same as recording each of them."""
        for mine, theirs in ((self.cases, later.cases), (self.checked_of, later.checked_of)):
            mine.update(theirs)
        for key, worst in later.worst.items():
            self.worst.setdefault(key, Worst()).merge(worst)
        self.refusals.update(later.refusals)
        self.failures += later.failures
        self.forward_only += later.forward_only

    def repro(self, op: str, index: int) -> str:
        """The command that replays one case."""
        isa = f" --isa {self.isa}" if self.isa else ""
        return f"fastattn verify --op {op} --backend {self.backend}{isa} --repro {token(self.seed, index)}"


def _trace(error: Exception) -> str:
    """The end of an error's traceback. Files are named as imports find them: reports are kept and passed on, and where
    a machine has its packages is nobody's business."""
    trace = "".join(traceback.format_exception(error)[-3:]).rstrip()
    for folder in sorted({str(Path(fastattn.__file__).parents[1]), *sys.path} - {""}, key=len, reverse=True):
        trace = trace.replace(f'File "{folder.rstrip("/")}/', 'File "')
    return trace


def _finite(ratio: float) -> float | str:
    return ratio if math.isfinite(ratio) else str(ratio)
