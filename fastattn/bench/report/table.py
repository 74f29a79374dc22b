"""The terminal's tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from fastattn.bench.report import text
from fastattn.bench.rows import Result, Row


def print_result(result: Result, console: Console) -> None:
    """A table per question, each absent provider with its reason, then the limits, the machine and the failures.

    console: one that takes no markup, for reasons hold square brackets.
    """
    for rows in text.by_question(result.rows).values():
        console.print(_question_table(rows), highlight=False)
    absent = _absent_table(result.rows)
    if absent.row_count:
        console.print(absent, highlight=False)
    console.print(f"limits: {text.limits_line(result.limits)}", highlight=False)
    console.print(text.where_line(result), highlight=False)
    if result.left_out:
        console.print(f"left out, time was up: {'; '.join(result.left_out)}", highlight=False)
    for failure in result.failures:
        console.print(f"FAILED {failure}", style="bold red", highlight=False, soft_wrap=True)


def _question_table(rows: list[Row]) -> Table:
    first = rows[0]
    work = text.scaled(first.work, first.work_unit)
    title = f"{first.suite}: {first.case}, {text.direction_name(first)}, {first.dtype}, {work}"
    table = Table(title=title, title_justify="left")
    table.add_column("provider")
    for name in ("ms, median (quartiles)", "rate", "x best other", "of limit", "peak MB"):
        table.add_column(name, justify="right")
    fastest = min((row.median_ms for row in rows if row.median_ms is not None), default=None)
    for row in sorted(rows, key=lambda row: row.median_ms if row.median_ms is not None else float("inf")):
        if row.median_ms is None:
            continue
        style = "bold" if row.median_ms == fastest else "cyan" if row.ours else ""
        cells = [text.time_text(row), text.rate_text(row), text.ratio_text(row)]
        cells += [text.share_text(row), text.memory_text(row)]
        table.add_row(row.provider, *cells, style=style)
    notes = [f"{row.provider}: {row.note}" for row in rows if row.note]
    if notes:
        table.caption, table.caption_justify = "\n".join(notes), "left"
    return table


def _absent_table(rows: Iterable[Row]) -> Table:
    """Each (provider, reason) with the number of cases it kept the provider from."""
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.reason is not None:
            reasons.setdefault((row.provider, row.reason), []).append(row)
    table = Table("provider", "cases", "why it has no times", title="Absent", title_justify="left")
    for (provider, reason), kept in reasons.items():
        table.add_row(provider, str(len(kept)), reason, style="red" if kept[0].verified is False else "")
    return table
