"""`fastattn bench` called as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastattn.bench import run as run_module
from fastattn.bench.providers import PROVIDERS
from fastattn.bench.providers.base import Provider
from fastattn.cli.app import app

CHECKOUT = Path(os.environ.get("FASTATTN_CHECKOUT", Path(__file__).resolve().parents[2]))
QUICK = ("--quick", "--no-compile", "--no-memory", "--threads", "1", "--device", "cpu")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == code, f"fastattn bench {' '.join(arguments)}\n{result.output}\n{result.exception!r}"
    return result.output


def test_attention_of_a_shape_as_json_and_compared_with_itself(tmp_path) -> None:
    file = tmp_path / "f.json"
    said = _run("attention", "--shapes", "bert-base", "--json", str(file), *QUICK)
    assert "bert-base" in said and "x best other" in said and "why it has no times" in said
    found = json.loads(file.read_text())
    assert {row["direction"] for row in found["rows"]} == {"forward", "both"}
    assert "rows are the same within the noise" in _run("compare", str(file), str(file), "--strict")


def test_a_row_holds_every_figure_or_the_reason_why_it_has_none(tmp_path) -> None:
    file = tmp_path / "f.json"
    _run("attention", "--shapes", "bert-base", "--json", str(file), *(o for o in QUICK if o != "--no-memory"))
    rows = json.loads(file.read_text())["rows"]
    assert {"torch eager", "torch sdpa flash", "torch sdpa cuDNN"} <= {row["provider"] for row in rows}
    figures = ("median_ms", "iqr_ms", "rate", "ratio", "share_of_limit", "peak_memory")
    for row in rows:
        assert row["case"].startswith("bert-base") and row["work"] > 0 and row["work_unit"] == "FLOP"
        if row["reason"] is not None:
            assert len(row["reason"]) > 10 and row["verified"] is None
            assert all(row[name] is None for name in figures)
            continue
        assert row["verified"] is True and row["iqr_ms"][0] <= row["median_ms"] <= row["iqr_ms"][1]
        memory = isinstance(row["peak_memory"], int) or sys.platform != "linux"
        assert memory and all(row[name] > 0 for name in ("rate", "ratio", "share_of_limit"))
    assert any(row["reason"] is None for row in rows)


def test_runs_are_added_to_a_report(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    for suite in ("norm", "ffn"):
        _run("run", suite, "--shapes", "gpt2", "--direction", "forward", "--report", str(tmp_path), "--append", *QUICK)
    found = json.loads((tmp_path / "results.json").read_text())
    assert {row["suite"] for row in found["rows"]} == {"norm", "ffn"}
    assert (tmp_path / "report.md").read_text().count("### ") >= 3


class _Killed(BaseException):
    """What no provider's failure is."""


def test_a_run_that_is_killed_leaves_what_it_found(monkeypatch, tmp_path) -> None:
    real, asked = run_module._Question.answer, []

    def answer(question):
        asked.append(question)
        if len(asked) == 2:
            raise _Killed
        return real(question)

    monkeypatch.setattr(run_module._Question, "answer", answer)
    before = ("norm", "--shapes", "gpt2", "--report", str(tmp_path), "--append", "--only", "torch eager", *QUICK)
    with pytest.raises(_Killed):
        CliRunner().invoke(app, ["bench", *before], catch_exceptions=False)
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["rows"]) == 1 and found["rows"][0]["median_ms"] and found["left_out"]
    asked[:] = [None] * 2
    _run(*before)
    found = json.loads((tmp_path / "results.json").read_text())
    assert not found["left_out"] and len(found["rows"]) == len(asked) - 2 > 1
    assert not list(tmp_path.glob("*.unfinished"))


class _Wrong(Provider):
    name = "wrong"
    suites = frozenset({"norm"})

    def prepare(self, case, tensors):
        return lambda: tuple(torch.zeros_like(tensors["x"]) for _ in case.outputs)


def test_a_mismatch_ends_with_1_and_names_it(monkeypatch) -> None:
    monkeypatch.setattr(run_module, "PROVIDERS", (*PROVIDERS, _Wrong()))
    said = _run("norm", "--shapes", "gpt2", "--direction", "forward", *QUICK, code=1)
    assert "FAILED norm: layer norm" in said and "wrong: breaks the parity rule" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("softmax",), "softmax"),
        (("attention", "--shapes", "bert-huge"), "bert-huge"),
        (("attention", "--dtype", "int8"), "int8"),
        (("attention", "--direction", "sideways"), "sideways"),
        (("attention", "--device", "tpu"), "tpu"),
        (("attention", "--only", "nobody"), "nobody"),
        (("attention", "--append"), "--json"),
        (("attention", "--match", "no such case"), "no case is left"),
        (("compare", "no/such.json", "no/such.json"), "no/such.json"),
        (("docs", "no/such/folder"), "no result folders"),
    ],
)
def test_wrong_options_are_answered_by_a_sentence(arguments, said) -> None:
    text = _run(*arguments, code=2)
    assert said in text and "Traceback" not in text


def test_the_pages_are_written(tmp_path) -> None:
    results = CHECKOUT / "bench" / "results"
    if not list(results.glob("*/results.json")):
        pytest.skip("FASTATTN_CHECKOUT names no checkout with results")
    _run("docs", str(results), "--folder", str(tmp_path / "docs"))
    assert (tmp_path / "docs" / "performance.md").read_text().startswith("# Performance")
    assert (tmp_path / "docs" / "parity.md").read_text().startswith("# Parity")


def test_tune_times_choices_or_says_that_there_are_none() -> None:
    text = _run("tune", "--quick", "--device", "cpu")
    assert "nothing to tune" in text or "has anything to tune" in text or "norm, width" in text


@pytest.mark.slow
def test_pytest_benchmark_runs_the_same_cases() -> None:
    pytest.importorskip("pytest_benchmark")
    if not (CHECKOUT / "bench" / "conftest.py").exists():
        pytest.skip("FASTATTN_CHECKOUT names no checkout")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--quick", "-k", "eager and forward"]
    quick = ["--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    run = subprocess.run(
        [*command, *quick, "bench/test_norm.py"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:]
