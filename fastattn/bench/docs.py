"""docs/performance.md, made from the result folders that are committed under bench/results."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fastattn.bench.report import text
from fastattn.bench.report.markdown import HOW_TO_READ, summary_table
from fastattn.bench.rows import Result, Row, read_result

_OPENING = """# Performance

Written by `fastattn bench docs` from the result folders in `bench/results`, which `make bench` and `make gpu-check`
leave; do not edit. Each section is one machine on one day, with every case that was timed there: fastattn's fastest
backend beside the fastest of everything else that was installed, slower or faster. The reports behind the tables hold
every provider, its quartiles, memory, and why absent ones are absent.
"""

_NO_GPU = """**No result of a GPU is committed yet.** On a machine with an NVIDIA GPU, `make gpu-check` builds, verifies
and times everything there and leaves such a folder; `fastattn bench docs` then adds it to this page.
"""


def performance_page(results: Path, folder: Path) -> str:
    """The page for a file in `folder`. ValueError where there are no results, or only a quick trial's."""
    found = [(source.parent, read_result(source)) for source in sorted(results.glob("*/results.json"), reverse=True)]
    if not found:
        raise ValueError(f"{results}: no result folders there; make one with fastattn bench --report")
    quick = [str(place) for place, result in found if result.quick]
    if quick:
        raise ValueError(f"{', '.join(quick)}: a quick trial; its times are no figures")
    sections = [_section(result, Path(os.path.relpath(place, folder)), place) for place, result in found]
    no_gpu = [] if any(result.environment.get("cuda") for _, result in found) else [_NO_GPU]
    return "\n".join([_OPENING, *no_gpu, HOW_TO_READ, "", *sections])


def _section(result: Result, link: Path, place: Path) -> str:
    lines = [f"## {result.environment['device']}, {result.date}", "", text.where_line(result) + ".", ""]
    lines += [
        f"Limits: {text.limits_line(result.limits)}.",
        "",
        f"All rows: [report]({link.as_posix()}/report.md).",
        "",
    ]
    lines += [*_score(result.rows), ""]
    if result.failures:
        lines += ["Failed, and so not timed:", "", *(f"- {failure}" for failure in result.failures), ""]
    if result.left_out:
        lines += [f"Not timed, time was up: {_counted(result.left_out)}; the report names them.", ""]
    for suite in dict.fromkeys(row.suite for row in result.rows):
        lines += [f"### {suite.capitalize()}", ""]
        lines += [*summary_table([row for row in result.rows if row.suite == suite]), ""]
    pictures = sorted(place.glob("*.png"))
    lines += [f"![{picture.stem}]({link.as_posix()}/{picture.name})\n" for picture in pictures]
    return "\n".join(lines)


def _counted(left_out: Iterable[str]) -> str:
    """3 cases and directions of decode, 60 of attention"""
    suites = Counter(case.partition(":")[0] for case in left_out)
    (first, count), *others = suites.items()
    return ", ".join([f"{count} cases and directions of {first}", *(f"{n} of {suite}" for suite, n in others)])


def _score(rows: Iterable[Row]) -> list[str]:
    """How often fastattn is the fastest and how often not, and a line for each that it loses, the worst first."""
    lost: list[tuple[float, str]] = []
    count = absent = 0
    for group in text.by_question(rows).values():
        ours, other = text.best_ours(group), text.best_other(group)
        if other is None or not other.median_ms:
            continue
        if ours is None or not ours.median_ms:
            absent += 1
            continue
        count += 1
        ratio = other.median_ms / ours.median_ms
        if ratio < 1:
            what = f"{ours.suite}: {ours.case}, {text.direction_name(ours)}, {ours.dtype}"
            lost.append((ratio, f"- {1 / ratio:.2f} times as long as {other.provider}: {what}"))
    without = f" ({absent} more have no time of fastattn's)" if absent else ""
    won = f"Of {count} cases and directions{without} fastattn is the fastest in {count - len(lost)}"
    if not lost:
        return [f"{won}."]
    return [f"{won}, and slower than the fastest other in {len(lost)}:", "", *(line for _, line in sorted(lost))]
