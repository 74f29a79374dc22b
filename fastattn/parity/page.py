"""docs/parity.md, made from the reports of `fastattn verify` that are committed under bench/results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_OPENING = """# Parity

Written by `fastattn bench docs` from the reports of `fastattn verify` in `bench/results`; do not edit.

Every output and gradient of a call, per batch entry and head, has to satisfy

    max|x - ref64| <= 2 max|eager - ref64| + 2 u max|ref64| + 2^-20 max T

where `ref64` is the reference in float64, `eager` plain torch in the call's dtype, `u` the dtype's unit roundoff and
`T` the float64 quantity with every factor replaced by its absolute value. A number below is the largest error that was
met, as a share of this bound, over all drawn cases: first of outputs, then of gradients. Up to 1 passes; plain torch
itself never has more than 0.5. Masks were checked by exact integer counts besides.
"""

_DTYPES = ("float32", "bfloat16", "float16")
_OUTPUTS = ("out", "lse", "y", "z")

Report = dict[str, Any]


def parity_page(results: Path) -> str:
    """The page, a section per result folder, the newest first. ValueError where no folder holds a report."""
    folders = sorted({file.parent for file in results.glob("*/verify-*.json")}, reverse=True)
    if not folders:
        raise ValueError(f"{results}: no verify-*.json in its folders; make one with fastattn verify --output")
    return "\n".join([_OPENING, *(_section(folder) for folder in folders)])


def _section(folder: Path) -> str:
    files = sorted(folder.glob("verify-*.json"))
    lines = [f"## {_where(folder, files)}", ""]
    for file in files:
        found = json.loads(file.read_text())
        reports: list[Report] = found if isinstance(found, list) else [found]
        lines += [f"### {file.stem.removeprefix('verify-')}", "", *_summary(reports), "", *_table(reports), ""]
    return "\n".join(lines)


def _where(folder: Path, files: list[Path]) -> str:
    """The device and the day: of the benchmarks beside the reports, or else the reports' own device."""
    results = folder / "results.json"
    if results.exists():
        run = json.loads(results.read_text())
        return f"{run['environment']['device']}, {run['date']}"
    found = json.loads(files[0].read_text())
    report = found[0] if isinstance(found, list) else found
    return str(report.get("environment", {}).get("device", folder.name))


def _summary(reports: list[Report]) -> list[str]:
    notes = dict.fromkeys(f"{report['note']}. " for report in reports if report.get("note"))
    counts = {key: sum(report[key] for report in reports) for key in ("checked", "forward_only", "refused", "left_out")}
    failures = [failure for report in reports for failure in report["failures"]]
    seeds = ", ".join(map(str, sorted({report["seed"] for report in reports})))
    text = f"{''.join(notes)}Seed {seeds}: {counts['checked']:,} cases checked"
    if counts["forward_only"]:
        text += f", of {counts['forward_only']:,} the forward alone"
    text += f"; {counts['refused']:,} refused; {len(failures):,} failed"
    if counts["left_out"]:
        text += f"; for {counts['left_out']:,} there was no time"
    return [text + ".", *_failures(failures)]


def _failures(failures: Iterable[dict[str, Any]]) -> list[str]:
    lines = []
    for failure in failures:
        rows = ", ".join(f"{row['quantity']} {_share(row['ratio'])}" for row in failure["rows"])
        why = rows or failure["exception"].strip().splitlines()[-1]
        lines.append(f"- `{failure['repro']}`: {why}")
    return ["", *lines] if lines else []


def _table(reports: list[Report]) -> list[str]:
    lines = [f"| | cases | {' | '.join(_DTYPES)} |", f"|---{'|---' * (1 + len(_DTYPES))}|"]
    for op in dict.fromkeys(op for report in reports for op in report["checked_of"]):
        checked = sum(report["checked_of"].get(op, 0) for report in reports)
        worst = [row for report in reports for row in report["worst"] if row["op"] == op]
        cells = [_cell([row for row in worst if row["dtype"] == dtype]) for dtype in _DTYPES]
        lines.append(f"| `{op}` | {checked:,} | {' | '.join(cells)} |")
    return lines


def _cell(rows: list[dict[str, Any]]) -> str:
    """Worst share of outputs, and of gradients where there are any: their names begin with d. Other rows are checks of
    the harness, such as of the guard bands."""
    outputs = [float(row["ratio"]) for row in rows if row["quantity"] in _OUTPUTS]
    gradients = [float(row["ratio"]) for row in rows if row["quantity"].startswith("d")]
    return ", ".join(_share(max(shares)) for shares in (outputs, gradients) if shares)


def _share(ratio: float | str) -> str:
    """Ratios that are not finite are strings in a report."""
    value = float(ratio)
    return f"{value:.2f}" if value <= 1 else f"**{value:.3g}**"
