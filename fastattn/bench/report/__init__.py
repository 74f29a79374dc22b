"""What a run looks like: on a terminal, as Markdown, and as plots."""

from __future__ import annotations

import re
from pathlib import Path

from fastattn.bench.report.markdown import report_text
from fastattn.bench.report.plots import draw_all
from fastattn.bench.rows import Result

__all__ = ["write_report"]


def write_report(result: Result, folder: Path) -> list[Path]:
    """Writes results.json, the plots and report.md, which shows them. Plots that an earlier report.md there shows are
    removed.

    Without matplotlib the report has no plots and says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / "report.md"
    for name in re.findall(r"!\[[^]]*\]\(([^)/]+\.png)\)", report.read_text()) if report.exists() else ():
        (folder / name).unlink(missing_ok=True)
    result.write(folder / "results.json")
    pictures = draw_all(result, folder)
    report.write_text(report_text(result, [p.name for p in pictures]))
    return [folder / "results.json", report, *pictures]
