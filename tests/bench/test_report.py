"""Tables, Markdown, plots, the comparison of two runs, and the performance page."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fastattn.bench.compare import Change, compare_results
from fastattn.bench.docs import performance_page
from fastattn.bench.report import text, write_report
from fastattn.bench.report.markdown import report_text
from fastattn.bench.report.table import print_result
from fastattn.bench.rows import read_result

from .conftest import quick_run

CHECKOUT = Path(os.environ.get("FASTATTN_CHECKOUT", Path(__file__).resolve().parents[2]))


def test_a_report_folder_holds_the_rows_the_text_and_plots(result, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("old.png", "mine.png"):
        (tmp_path / name).write_text("a picture")
    (tmp_path / "report.md").write_text("of an earlier run: ![a plot](old.png)")
    files = write_report(result, tmp_path)
    assert sorted([*(f.name for f in files), "mine.png"]) == sorted(f.name for f in tmp_path.iterdir())
    assert read_result(tmp_path).rows == result.rows
    words = (tmp_path / "report.md").read_text()
    pictures = [f for f in files if f.suffix == ".png"]
    assert pictures and all(p.read_bytes().startswith(b"\x89PNG") and f"({p.name})" in words for p in pictures)
    assert "tiny sizes" in words and "it runs on GPUs only" in words and "fastattn reference" in words
    for group in {row.group for row in result.rows}:
        slug = group.lower().replace(",", "").replace(" ", "-")
        assert any(p.name.startswith(slug) for p in pictures), group


def test_sweeps_are_drawn_with_the_ideal_line(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    found = quick_run("attention", directions=("forward",), only=frozenset({"fastattn reference", "torch sdpa flash"}))
    names = [p.name for p in write_report(found, tmp_path) if p.suffix == ".png"]
    for axis in ("length", "head-dim", "a-causal-window", "density"):
        assert any(name.startswith(f"attention-against-{axis}") for name in names), (axis, names)


def test_the_terminal_shows_times_absences_and_failures(result) -> None:
    console = Console(width=160, file=io.StringIO(), record=True, markup=False)
    rows = [replace(row, reason=row.reason and f"{row.reason} [bold]") for row in result.rows]
    print_result(replace(result, rows=rows, failures=["norm: something"], left_out=["ffn: later"]), console)
    shown = console.export_text()
    for said in (
        "it runs on GPUs only [bold]",
        "x best other",
        "fastattn reference",
        "FAILED norm: something",
        "ffn: later",
    ):
        assert said in shown


def test_losses_are_as_plain_as_wins(result) -> None:
    rows = [row for row in result.rows if row.suite == "norm" and row.median_ms is not None][:1]
    base = replace(rows[0], ours=True, provider="fastattn cpu", median_ms=2.0)
    slower = [base, replace(base, ours=False, provider="torch", median_ms=1.0)]
    assert "**0.50**" in report_text(replace(result, rows=slower), [])
    faster = [base, replace(base, ours=False, provider="torch", median_ms=3.0)]
    assert "| 1.50 |" in report_text(replace(result, rows=faster), [])


@pytest.mark.parametrize(
    ("ms", "shown"),
    [(123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.123"), (99.7, "100")],
)
def test_times_have_three_digits(ms, shown) -> None:
    assert text.milliseconds(ms) == shown


def test_compare_says_what_moved_beyond_the_noise(result) -> None:
    old = replace(result, rows=[r for r in result.rows if r.median_ms is not None])
    rows = [replace(row, median_ms=10.0, iqr_ms=(9.5, 10.5)) for row in old.rows]
    old = replace(old, rows=rows)
    moved = {
        0: (8.0, (7.8, 8.2), Change.FASTER),
        1: (12.0, (11.8, 12.2), Change.SLOWER),
        2: (9.0, (8.0, 9.6), Change.SAME),  # the quartile ranges overlap
        3: (9.9, (9.88, 9.92), Change.SAME),
    }
    later = [replace(r, median_ms=moved[i][0], iqr_ms=moved[i][1]) if i in moved else r for i, r in enumerate(rows)]
    found = compare_results(old, replace(old, rows=later[:-1], environment={**old.environment, "torch": "9.9"}))
    for number, (_, _, verdict) in moved.items():
        assert found.changes[number].verdict == verdict
    assert found.changes[0].ratio == pytest.approx(1.25)
    said = found.text()
    assert "1.25 times faster" in said and "1.20 times slower" in said and "10.0 -> 8.00 ms" in said
    assert len(found.gone) == 1 and "no longer timed" in said and "differs: torch" in said
    with pytest.raises(ValueError, match="no timed row in common"):
        compare_results(old, replace(old, rows=[]))


def test_the_performance_page_shows_each_machine(result, tmp_path) -> None:
    real = replace(result, quick=False, environment={**result.environment, "device": "Some Processor"})
    write_report(real, tmp_path / "results" / "some-processor-2026-01-01")
    page = performance_page(tmp_path / "results", tmp_path / "docs")
    assert "## Some Processor" in page and real.date in page and str(real.environment["torch"]) in page
    assert "../results/some-processor-2026-01-01/report.md" in page and "### Attention" in page
    with pytest.raises(ValueError, match="no result folders"):
        performance_page(tmp_path, tmp_path)
    write_report(result, tmp_path / "results" / "quick")
    with pytest.raises(ValueError, match="quick trial"):
        performance_page(tmp_path / "results", tmp_path)


def test_the_committed_page_is_made_from_the_committed_results() -> None:
    page = CHECKOUT / "docs" / "performance.md"
    if not page.exists():
        pytest.skip("FASTATTN_CHECKOUT does not name a checkout")
    assert page.read_text() == performance_page(CHECKOUT / "bench" / "results", CHECKOUT / "docs"), (
        "run fastattn bench docs"
    )
