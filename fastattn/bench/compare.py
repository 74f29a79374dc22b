"""What became faster or slower between two runs, beyond the noise of both.

A row changed where the quartile ranges of its two runs do not overlap and the medians differ by at least 3%. How far
the other providers moved, whose code did not change, says how alike the machine was on both days; where versions or
machine differ, the comparison says so first.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fastattn.bench.report.text import direction_name, milliseconds
from fastattn.bench.rows import TELLING, Result, Row

LEAST_CHANGE = 1.03


class Change(enum.Enum):
    FASTER = "faster"
    SLOWER = "slower"
    SAME = "same"


@dataclass(frozen=True)
class Compared:
    """A row of the new run beside that of the old one. ratio: old median over new; above 1 it became faster."""

    row: Row
    before: Row
    ratio: float
    verdict: Change

    def __str__(self) -> str:
        row = self.row
        times = f"{milliseconds(self.before.median_ms or 0)} -> {milliseconds(row.median_ms or 0)} ms"
        factor = self.ratio if self.verdict != Change.SLOWER else 1 / self.ratio
        where = f"{row.suite}: {row.case}, {direction_name(row)}, {row.dtype}"
        return f"{factor:.2f} times {self.verdict.value}: {row.provider}, {where}: {times}"


@dataclass(frozen=True)
class Comparison:
    """changes: the rows timed in both runs. gone, new: keys timed in one only. differences: of the environments.
    drift: median ratio of the providers that are not fastattn's, None where there are none."""

    changes: list[Compared]
    gone: list[str]
    new: list[str]
    differences: list[str]
    drift: float | None

    def text(self) -> str:
        """Everything that changed, largest first, and one line for what did not."""
        lines = [f"differs: {difference}" for difference in self.differences]
        for verdict in (Change.SLOWER, Change.FASTER):
            found = [change for change in self.changes if change.verdict == verdict]
            found.sort(key=lambda change: abs(np.log(change.ratio)), reverse=True)
            lines += [str(change) for change in found]
        same = sum(change.verdict == Change.SAME for change in self.changes)
        lines.append(f"{same} of {len(self.changes)} rows are the same within the noise of both runs")
        if self.drift is not None:
            lines.append(f"the other providers run at {self.drift:.3f} times their earlier speed (median)")
        lines += [f"no longer timed: {name}" for name in self.gone]
        lines += [f"timed for the first time: {name}" for name in self.new]
        return "\n".join(lines)


def compare_results(old: Result, new: Result) -> Comparison:
    """Compares the rows that both runs timed. ValueError where they share none."""
    before = {row.key: row for row in old.rows if row.median_ms is not None}
    after = {row.key: row for row in new.rows if row.median_ms is not None}
    shared = [key for key in after if key in before]
    if not shared:
        raise ValueError("the two runs have no timed row in common: compare runs of the same suites, dtype and shapes")
    changes = [_compared(before[key], after[key]) for key in shared]
    others = [change.ratio for change in changes if not change.row.ours]
    return Comparison(
        changes=changes,
        gone=_names(key for key in before if key not in after),
        new=_names(key for key in after if key not in before),
        differences=_differences(old, new),
        drift=float(np.median(others)) if others else None,
    )


def _compared(before: Row, after: Row) -> Compared:
    assert before.median_ms and after.median_ms and before.iqr_ms and after.iqr_ms
    ratio = before.median_ms / after.median_ms
    verdict = Change.SAME
    if ratio >= LEAST_CHANGE and after.iqr_ms[1] < before.iqr_ms[0]:
        verdict = Change.FASTER
    elif ratio <= 1 / LEAST_CHANGE and after.iqr_ms[0] > before.iqr_ms[1]:
        verdict = Change.SLOWER
    return Compared(after, before, ratio, verdict)


def _names(keys: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"{provider}, {suite}: {case}, {direction}, {dtype}" for suite, case, direction, dtype, provider in keys]


def _differences(old: Result, new: Result) -> list[str]:
    return [
        f"{name} {old.environment.get(name)} -> {new.environment.get(name)}"
        for name in TELLING
        if old.environment.get(name) != new.environment.get(name)
    ]
