"""What a run leaves: a row per provider, case and direction, the limits and the environment; and its JSON file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

from fastattn.bench.limits import Limits, limits_from_json

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One provider on one case in one direction.

    verified: the results obey the parity rule; None where it did not run. worst: error / bound where that is largest.
    median_ms, iqr_ms: per call; iqr_ms holds the first and third quartile. flops, bytes: operations of visible work and
    bytes moved once; files of before 2026-11-28 lack them. work, work_unit: the one of them that rates are given in.
    rate: work per second (FLOP/s or B/s). ratio: the fastest other provider's median over this one's (above 1: this one
    is faster); for a backend of fastattn, the others are those that are not. share_of_limit: the least time that the
    limits allow for both, over the median. peak_memory: bytes above the inputs. reason: why there are no times.
    """

    suite: str
    case: str
    group: str
    axis: str | None
    x: float
    direction: str
    dtype: str
    device: str
    provider: str
    ours: bool
    parameters: dict[str, Any]
    verified: bool | None = None
    worst: float | None = None
    median_ms: float | None = None
    iqr_ms: tuple[float, float] | None = None
    samples: int = 0
    flops: float | None = None
    bytes: float | None = None
    work: float = 0.0
    work_unit: str = "FLOP"
    rate: float | None = None
    ratio: float | None = None
    ratio_to: str | None = None
    share_of_limit: float | None = None
    peak_memory: int | None = None
    note: str = ""
    reason: str | None = None

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """What names a row across runs."""
        return self.suite, self.case, self.direction, self.dtype, self.provider

    @property
    def question(self) -> tuple[str, str, str, str]:
        """What the row is one provider's answer to."""
        return self.key[:-1]

    def against(self, limits: Limits) -> Row:
        """The row with its share of these limits."""
        if self.median_ms is None or self.flops is None or self.bytes is None:
            return self
        return replace(self, share_of_limit=limits.seconds(self.flops, self.bytes, self.dtype) / (self.median_ms / 1e3))


TELLING = ("device", "threads", "instruction_set", "driver", "cuda", "torch", "triton", "python")
"""What of the environment figures depend on."""


@dataclass
class Result:
    """All rows of a run. failures: sentences; a run with any fails. left_out: cases that the time budget did not reach.
    quick: sizes and times are those of a trial."""

    rows: list[Row]
    limits: Limits
    environment: dict[str, Any]
    date: str
    seconds: float
    quick: bool = False
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {
            "format": FORMAT,
            "date": self.date,
            "quick": self.quick,
            "seconds": round(self.seconds, 1),
            "environment": self.environment,
            "limits": self.limits.to_json(),
            "failures": self.failures,
            "left_out": self.left_out,
            "rows": [asdict(row) for row in self.rows],
        }

    def write(self, target: Path) -> None:
        """Writes the JSON file; one that is there stays whole until the new one is."""
        unfinished = target.with_name(target.name + ".unfinished")
        unfinished.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        unfinished.replace(target)


def read_result(source: Path) -> Result:
    """A result from its JSON file, or from a folder that holds results.json. ValueError for anything else."""
    file = source / "results.json" if source.is_dir() else source
    try:
        found = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{source}: no results there ({error}); pass a JSON file that fastattn bench wrote") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{source}: not a JSON file that this version of fastattn bench wrote (format {FORMAT})")
    rows = [Row(**{**row, "iqr_ms": row["iqr_ms"] and tuple(row["iqr_ms"])}) for row in found["rows"]]
    return Result(
        rows=rows,
        limits=limits_from_json(found["limits"]),
        environment=found["environment"],
        date=found["date"],
        seconds=found["seconds"],
        quick=found["quick"],
        failures=found["failures"],
        left_out=found["left_out"],
    )


def merge(parts: Iterable[Result]) -> Result:
    """Results of one machine measured in pieces, as one. Rows of one question belong together, for their calls took
    turns: those of a later run that timed any of them replace the earlier ones. What the machine can do at most is what
    it did at best in any of them."""
    results = list(parts)
    last = results[-1]
    rows: dict[tuple[str, ...], Row] = {}
    failures: list[str] = []
    for result in results:
        timed = {row.question for row in result.rows if row.median_ms is not None}
        rows = {key: row for key, row in rows.items() if row.question not in timed}
        rows |= {row.key: row for row in result.rows if row.key not in rows or row.question in timed}
        again = tuple(f"{suite}: {case}, {direction}, {dtype}, " for suite, case, direction, dtype in timed)
        failures = [*(failure for failure in failures if not failure.startswith(again)), *result.failures]
    questions = dict.fromkeys(row.question for result in results for row in result.rows)
    place = {question: number for number, question in enumerate(questions)}
    rows = dict(sorted(rows.items(), key=lambda item: place[item[1].question]))
    peers = {name: version for result in results for name, version in result.environment.get("peers", {}).items()}
    reached = {f"{row.suite}: {row.case}, {row.direction}" for row in rows.values()}
    limits = reduce(Limits.best, (result.limits for result in results))
    return Result(
        rows=[row.against(limits) for row in rows.values()],
        limits=limits,
        environment={**last.environment, "peers": peers},
        date=last.date,
        seconds=sum(result.seconds for result in results),
        quick=any(result.quick for result in results),
        failures=failures,
        left_out=list(dict.fromkeys(n for result in results for n in result.left_out if n not in reached)),
    )


def why_apart(before: Result, environment: dict[str, Any], quick: bool) -> str | None:
    """Why rows of a run in this environment do not belong beside those of an earlier one; None where they do."""
    if before.quick != quick:
        return "one is a quick trial"
    for name in TELLING:
        if before.environment.get(name) != environment.get(name):
            return f"its {name} is {before.environment.get(name)}, now it is {environment.get(name)}"
    return None


def with_ratios(rows: list[Row]) -> list[Row]:
    """The rows of one question, each with its ratio to the fastest other provider."""
    return [_with_ratio(row, rows) for row in rows]


def _with_ratio(row: Row, rows: list[Row]) -> Row:
    others = [
        (other.median_ms, other.provider)
        for other in rows
        if other.median_ms is not None and other is not row and not (row.ours and other.ours)
    ]
    if row.median_ms is None or not others:
        return row
    fastest, name = min(others)
    return replace(row, ratio=fastest / row.median_ms, ratio_to=name)
