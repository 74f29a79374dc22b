"""A run as Markdown: the summary first, then plots, then every row and every absence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastattn.bench.report import text
from fastattn.bench.rows import Result, Row

HOW_TO_READ = (
    "Every result was held to the parity rule before it was timed. ms: median per call, with the quartiles. rate: work "
    "on what the mask leaves visible (FLOP), or bytes of the tensors moved once, per second. x best other: the fastest "
    "other provider's time over this one's; above 1 this one is faster. of limit: the least time that the limits "
    "measured in the same run allow, over the time; above 100% on a CPU, tensors stay in its caches or products run "
    "faster than torch's. peak MB: memory above the inputs during one call. The providers of a case take "
    "turns; from one case to the next a shared machine may have become slower or faster."
)


def report_text(result: Result, pictures: Sequence[str]) -> str:
    """The whole report."""
    lines = ["# Benchmark report", "", text.where_line(result), "", f"Limits: {text.limits_line(result.limits)}.", ""]
    if result.quick:
        lines += ["**A quick run: tiny sizes, two rounds. Its times mean nothing.**", ""]
    lines += [HOW_TO_READ, ""]
    if result.failures:
        lines += ["## Failures", "", *(f"- {failure}" for failure in result.failures), ""]
    if result.left_out:
        lines += [f"Left out, time was up: {'; '.join(result.left_out)}.", ""]
    lines += ["## Summary", "", *summary_table(result.rows), ""]
    if pictures:
        lines += ["## Plots", "", *(f"![{name.removesuffix('.png')}]({name})\n" for name in pictures)]
    else:
        lines += ["No plots: matplotlib is not installed, or no case was timed.", ""]
    lines += ["## All rows", ""]
    for rows in text.by_question(result.rows).values():
        lines += _question(rows)
    return "\n".join([*lines, *_absent(result.rows)]) + "\n"


def summary_table(rows: Iterable[Row]) -> list[str]:
    """A line per question: fastattn's fastest backend beside the fastest other provider. Losses are bold too."""
    lines = [
        "| case | | fastattn ms | rate | of limit | fastest other | ms | times faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for group in text.by_question(rows).values():
        ours, other, first = text.best_ours(group), text.best_other(group), group[0]
        what = f"| {first.suite}: {first.case} | {text.direction_name(first)}, {first.dtype} |"
        mine = " absent | | |" if ours is None else _ours(ours)
        theirs = " none | | |"
        if other is not None and other.median_ms is not None:
            theirs = f" {other.provider} | {text.milliseconds(other.median_ms)} |"
            faster = None if ours is None or not ours.median_ms else other.median_ms / ours.median_ms
            theirs += " |" if faster is None else f" {faster:.2f} |" if faster >= 1 else f" **{faster:.2f}** |"
        lines.append(what + mine + theirs)
    return [*lines, "", "Bold: fastattn is slower."]


def _ours(row: Row) -> str:
    backend = row.provider.removeprefix("fastattn ")
    shown = text.milliseconds(row.median_ms or 0.0)
    return f" {shown} ({backend}) | {text.rate_text(row)} | {text.share_text(row)} |"


def _question(rows: list[Row]) -> list[str]:
    first = rows[0]
    timed = [row for row in rows if row.median_ms is not None]
    lines = [
        f"### {first.suite}: {first.case}, {text.direction_name(first)}, {first.dtype}",
        "",
        f"{text.scaled(first.work, first.work_unit)} of work.",
        "",
    ]
    if not timed:
        return [*lines, "No provider ran.", ""]
    lines += [
        "| provider | ms | rate | x best other | of limit | peak MB | note |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(timed, key=lambda row: row.median_ms or 0.0):
        cells = [row.provider, text.time_text(row), text.rate_text(row), text.ratio_text(row), text.share_text(row)]
        lines.append(f"| {' | '.join([*cells, text.memory_text(row), row.note])} |")
    return [*lines, ""]


def _absent(rows: Iterable[Row]) -> list[str]:
    reasons: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.reason is not None:
            reasons[row.provider, row.reason] = reasons.get((row.provider, row.reason), 0) + 1
    if not reasons:
        return []
    table = [f"| {provider} | {count} | {reason} |" for (provider, reason), count in reasons.items()]
    return ["## Absent", "", "| provider | cases | why it has no times |", "|---|---|---|", *table]
