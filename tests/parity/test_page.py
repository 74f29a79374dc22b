"""The page of parity, made from reports of verify."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fastattn.parity.bound import ParityRow
from fastattn.parity.page import parity_page
from fastattn.parity.run import verify

CHECKOUT = Path(os.environ.get("FASTATTN_CHECKOUT", Path(__file__).resolve().parents[2]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "results" / "some-processor-2026-01-02"
    place.mkdir(parents=True)
    (place / "results.json").write_text(json.dumps({"environment": {"device": "Some Processor"}, "date": "2026-01-02"}))
    return place


def test_the_page_shows_shares_of_the_bound_by_dtype(folder: Path) -> None:
    report = verify("norm", "reference", cases=12, seed=4)
    (folder / "verify-reference.json").write_text(json.dumps({"note": "Plain torch", **report.to_json()}))
    page = parity_page(folder.parent)
    assert "## Some Processor, 2026-01-02" in page and "### reference" in page
    assert "Plain torch. Seed 4: 12 cases checked; 0 refused; 0 failed." in page
    (row,) = [line for line in page.splitlines() if line.startswith("| `norm` | 12 |")]
    for dtype, cell in zip(("float32", "bfloat16", "float16"), row.split("|")[3:6], strict=True):
        for names, shown in zip((("y", "z"), ("d",)), cell.split(","), strict=True):
            kept = [w.ratio for (_, of, name), w in report.worst.items() if of == dtype and name.startswith(names)]
            assert float(shown) == pytest.approx(max(kept), abs=0.0051)


def test_a_failure_is_shown_with_its_replay(folder: Path) -> None:
    report = verify("norm", "reference", cases=2, seed=4)
    case = type("Drawn", (), {"dtype": torch.float32, "describe": lambda self: "a call"})()
    row = ParityRow("y", 2.0, False, "at (0,)")
    report.record("norm", 1, case, [row])
    report.record_crash("norm", 0, case, "a trace\nRuntimeError: no memory")
    (folder / "verify-two.json").write_text(json.dumps([report.to_json()]))
    page = parity_page(folder.parent)
    assert "`fastattn verify --op norm --backend reference --repro 4.1`: y **2**" in page
    assert "`fastattn verify --op norm --backend reference --repro 4.0`: RuntimeError: no memory" in page


def test_reports_without_benchmarks_name_their_own_device(folder: Path) -> None:
    (folder / "results.json").unlink()
    report = {"environment": {"device": "Another Processor"}, **verify("norm", "reference", cases=1).to_json()}
    (folder / "verify-reference.json").write_text(json.dumps(report))
    assert "## Another Processor\n" in parity_page(folder.parent)


def test_without_reports_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make one with fastattn verify --output"):
        parity_page(tmp_path)


def test_the_committed_page_is_made_from_the_committed_reports() -> None:
    page = CHECKOUT / "docs" / "parity.md"
    if not page.exists():
        pytest.skip("FASTATTN_CHECKOUT does not name a checkout")
    assert page.read_text() == parity_page(CHECKOUT / "bench" / "results"), "run fastattn bench docs"
