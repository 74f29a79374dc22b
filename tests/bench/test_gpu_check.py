"""gpu-check without a GPU: every stage goes as far as a CPU allows and says where it stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

CHECKOUT = Path(os.environ.get("FASTATTN_CHECKOUT", Path(__file__).resolve().parents[2]))

pytestmark = [
    pytest.mark.skipif(not (CHECKOUT / "bench" / "gpu_check.py").exists(), reason="no checkout is named"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: run make gpu-check"),
]


@pytest.fixture
def script(monkeypatch, tmp_path) -> ModuleType:
    """The script as a module, writing its logs to a folder of the test, with one operation and one suite."""
    spec = importlib.util.spec_from_file_location("gpu_check", CHECKOUT / "bench" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    monkeypatch.setattr(module, "OPERATIONS", ("norm",))
    monkeypatch.setattr(module, "SUITES", ("norm",))
    return module


@pytest.fixture
def check(script, tmp_path):
    (tmp_path / "results").mkdir()
    environment = {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return script.Check(tmp_path / "results", gpu=False, quick=True, environment=environment)


def test_build_says_what_it_built_and_what_needs_a_device(script, check, monkeypatch, tmp_path) -> None:
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "_lib", "*.so", "results")
    monkeypatch.setattr(script, "ROOT", Path(shutil.copytree(CHECKOUT, tmp_path / "source", ignore=skipped)))
    for name in ("CXX", "CC"):
        monkeypatch.setenv(name, "/nonexistent")
    outcome = script.run_stage("build", check)
    said = "\n".join(outcome.said)
    assert outcome.status == "no device", said
    assert "no C++20 compiler with OpenMP was found" in said and "cuda: " in said and "reference: usable" in said


def test_verify_runs_triton_in_the_interpreter(script, check) -> None:
    pytest.importorskip("triton")
    outcome = script.run_stage("verify", check)
    said = "\n".join(outcome.said)
    assert outcome.status == "no device" and "torch sees no GPU" in said, said
    assert "triton norm: 2 checked, 0 refused" in said and "cuda: " in said
    (report,) = json.loads((check.results / "verify-triton.json").read_text())
    assert report["passed"] and report["checked"] == 2


def test_bench_and_tune_run_in_small(script, check) -> None:
    pytest.importorskip("triton")
    outcome = script.run_stage("bench", check)
    assert outcome.status == "no device", outcome.said
    rows = json.loads((check.results / "results.json").read_text())["rows"]
    timed = {row["provider"] for row in rows if row["median_ms"] is not None}
    assert {"fastattn triton", "torch eager"} <= timed and (check.results / "report.md").exists()
    outcome = script.run_stage("tune", check)
    assert outcome.status == "no device", outcome.said
    tiles = json.loads((check.results / "tiles.json").read_text())
    assert tiles["quick"] and any(entry["backend"] == "triton" and entry["times"] for entry in tiles["entries"])


def test_sanitize_says_that_there_is_nothing_to_watch(script, check) -> None:
    outcome = script.run_stage("sanitize", check)
    assert outcome.status == "no device" and "no GPU" in outcome.said[0]


def test_a_failing_stage_says_what_failed_and_the_others_still_run(script, monkeypatch, tmp_path, capsys) -> None:
    def fails(check, outcome):
        raise OSError("the disk is full")

    ran = []
    stages = {"build": fails, "verify": lambda check, outcome: ran.append("verify")}
    monkeypatch.setattr(script, "STAGES", stages)
    monkeypatch.setattr(script, "ALL", ("build", "verify"))
    monkeypatch.setattr(script, "device", lambda: ("some-device", False))
    assert script.main(["all", "--results", str(tmp_path / "out")]) == 1
    assert ran == ["verify"]
    assert "FAILED build: OSError: the disk is full" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert record["build"]["status"] == "failed" and record["verify"]["status"] == "passed"


def test_peer_wheels_are_installed_beside_or_missed(script, check, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PEER_WHEELS", str(tmp_path))
    outcome = script.Outcome()
    check.deadline = 1e18
    assert script.install_peers(check, outcome) == {} and "no wheels there" in outcome.said[0]
    assert outcome.status == "failed"
    monkeypatch.delenv("PEER_WHEELS")
    assert script.install_peers(check, script.Outcome()) == {}


def test_a_command_that_takes_too_long_is_stopped(script, check) -> None:
    check.deadline = 1e18
    code, _ = check.run([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.5)
    assert code == 124
