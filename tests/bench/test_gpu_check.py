"""gpu-check without a GPU: every stage goes as far as a CPU allows and says where it stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastattn.parity.cases import draw_case

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
    monkeypatch.setattr(module, "OPERATIONS", ("norm", "encoder_layer"))
    monkeypatch.setattr(module, "SUITES", ("norm",))
    monkeypatch.delenv("SUITES", raising=False)
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


@pytest.mark.slow  # Triton's own tests run its interpreter
def test_verify_runs_triton_in_the_interpreter(script, check) -> None:
    pytest.importorskip("triton")
    outcome = script.run_stage("verify", check)
    said = "\n".join(outcome.said)
    assert outcome.status == "no device" and "torch sees no GPU" in said, said
    assert "triton norm: 2 checked, 0 refused" in said and "cuda: " in said
    assert "triton encoder_layer: refused wholly, not run: the Triton backend has no kernel for encoder_layer" in said
    (report,) = json.loads((check.results / "verify-triton.json").read_text())
    assert report["passed"] and report["checked"] == 2


@pytest.mark.slow
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


class _Gpu:
    """What the check's commands are answered with, as if there was a GPU; and what they were."""

    def __init__(self, script, check, monkeypatch, answer) -> None:
        check.gpu, check.quick, check.deadline = True, False, script.time.monotonic() + 100
        self.asked, self.kernels = [], []
        found = script.Backends({"cuda": "usable", "triton": "usable"}, {"cuda": {"ffn": "it is wide"}, "triton": {}})
        monkeypatch.setattr(script, "OPERATIONS", ("norm", "ffn", "attention"))
        monkeypatch.setattr(script, "ask_backends", lambda check, environment=(): found)
        monkeypatch.setattr(script, "cores", lambda: 8)

        def run(check, command, seconds=None, **environment):
            self.asked.append((list(command), seconds))
            self.kernels.append(environment.get("FASTATTN_CUDA_KERNELS"))
            return answer(list(command))

        monkeypatch.setattr(script.Check, "run", run)


def _report(command) -> dict:
    """A report of verify in which attention was cut off, and ffn failed."""
    ops = command[command.index("--op") + 1].split(",")
    cases = {op: 7 if op == "attention" else 2000 for op in ops}
    failures = [{"op": "ffn", "repro": "fastattn verify --op ffn --repro 0.3"}] if "ffn" in ops else []
    backend = command[command.index("--backend") + 1]
    found = {"backend": backend, "asked": dict.fromkeys(ops, 2000), "cases": cases, "checked_of": cases}
    return {**found, "seconds": 9.0, "failures": failures}


def test_verify_shares_the_stage_among_runs_and_says_what_was_cut_off(script, check, monkeypatch) -> None:
    def answer(command):
        Path(command[command.index("--output") + 1]).write_text(json.dumps(_report(command)))
        return 0, ""

    gpu, outcome = _Gpu(script, check, monkeypatch, answer), script.Outcome()
    script.verify(check, outcome)
    options = [dict(zip(command[4::2], command[5::2], strict=True)) for command, _ in gpu.asked]
    assert [(o["--backend"], o["--op"]) for o in options] == [
        ("cuda", "norm,attention"),
        ("cuda", "attention"),
        ("triton", "norm,ffn"),
        ("triton", "attention"),
    ]
    assert all(o["--jobs"] == "8" and o["--cases"] == "2000" for o in options)
    assert gpu.kernels == [None, "sm90", None, None]
    assert [int(o["--seconds"]) for o in options] == [34, 21, 38, 85]
    assert len({command[command.index("--output") + 1] for command, _ in gpu.asked}) == 4
    assert all(limit > float(o["--seconds"]) for o, (_, limit) in zip(options, gpu.asked, strict=True))
    assert outcome.status == "failed" and "cuda ffn: refused wholly, not run: it is wide" in outcome.said
    assert "triton norm: 2000 checked, 0 refused" in outcome.said
    cut = "triton attention: 7 checked, 0 refused of 2000 cases: the time was up after 9 s"
    assert f"TIME WAS UP {cut}" in outcome.said
    assert any(said.startswith("FAILED triton ffn") and said.endswith("--repro 0.3") for said in outcome.said)
    assert len(json.loads((check.results / "verify-triton.json").read_text())) == 2


def test_what_is_cut_off_is_no_plain_pass(script) -> None:
    outcome = script.Outcome()
    outcome.cut_short("half of it")
    assert outcome.status == "cut short"
    outcome.fail("the rest")
    assert outcome.status == "failed"


def test_sanitize_runs_beside_each_other_and_speaks_in_order(script, check, monkeypatch) -> None:
    def answer(command):
        script.time.sleep(0.05 if "cuda" in command else 0.0)
        tool, op = command[2], command[command.index("--op") + 1]
        if (tool, op) == ("racecheck", "ffn"):
            return 124, ""
        return (9, "= ERROR SUMMARY: 3 errors") if op == "attention" else (0, "= ERROR SUMMARY: 0 errors")

    _Gpu(script, check, monkeypatch, answer)
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/opt/{name}")
    outcome = script.Outcome()
    script.sanitize(check, outcome)
    assert outcome.said[0] == "memcheck cuda norm: ERROR SUMMARY: 0 errors" and len(outcome.said) == 12
    named = [said.replace("FAILED ", "").replace("TIME WAS UP ", "").split(":")[0] for said in outcome.said]
    ops = {"cuda": ("norm", "attention"), "triton": ("norm", "ffn", "attention"), "cuda sm90": ("attention",)}
    assert named == [f"{tool} {b} {op}" for b in ops for op in ops[b] for tool in script.SANITIZER_TOOLS]
    assert outcome.status == "failed" and "TIME WAS UP racecheck triton ffn: it said nothing" in outcome.said


def test_what_another_thread_waits_for_can_be_ended(script, check) -> None:
    check.deadline = script.time.monotonic() + 100
    waiting = threading.Thread(target=check.run, args=(["sleep", "60"],))
    waiting.start()
    while not check.running:
        script.time.sleep(0.01)
    check.kill()
    waiting.join(30)
    assert not waiting.is_alive() and not check.running
    assert check.run(["sleep", "60"])[0] == 124, "nothing is begun any more"


def test_bench_gives_every_suite_its_share_and_reports_what_it_missed(script, check, monkeypatch) -> None:
    suites = ("norm", "ffn", "attention")
    check.suites = suites

    def answer(command):
        left_out = {"left_out": ["attention: bert, both", "attention: t5, both"]}
        (check.results / "results.json").write_text(json.dumps(left_out))
        return (124, "") if "attention" in command else (0, "")

    gpu, outcome = _Gpu(script, check, monkeypatch, answer), script.Outcome()
    script.bench(check, outcome)
    *benches, (report, _) = gpu.asked
    assert [command[4] for command, _ in benches] == list(suites) and "write_report" in report[2]
    assert all("--budget" in command and "--append" in command for command, _ in benches)
    assert outcome.status == "cut short" and "bench norm: done" in outcome.said
    left_out = "bench attention: 2 cases were left out, the first: attention: bert, both"
    assert f"TIME WAS UP {left_out}" in outcome.said
    monkeypatch.setattr(script.Check, "run", lambda *_, **__: (-11, ""))
    outcome = script.Outcome()
    script.bench(check, outcome)
    assert outcome.status == "failed" and not any(left_out in said for said in outcome.said), "no time was up"


@pytest.mark.parametrize("left", [30.0, 150.0, 520.0])
def test_budgets_of_suites_fit_the_stage(script, left) -> None:
    suites, spent = tuple(script.BENCH_SHARES), 0.0
    for number in range(len(suites)):
        budget, limit = script.suite_seconds(suites[number:], left - spent)
        assert 1 <= budget < limit <= left - spent
        spent += min(limit, budget + 0.5 * script.SUITE_START)
    assert spent <= left


def test_wrong_options_are_answered_by_a_sentence(script, capsys) -> None:
    wrong = ((("--suites", "norm softmax"), "softmax is unknown"), (("--seconds", "0"), "--seconds 0"))
    for arguments, said in wrong:
        with pytest.raises(SystemExit):
            script.main(["bench", *arguments])
        assert said in capsys.readouterr().err


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
    script_of_two = "import subprocess, sys; print(1, flush=True); subprocess.run(['sleep', '60'])"
    began = script.time.monotonic()
    code, output = check.run([sys.executable, "-c", script_of_two], seconds=3.0)
    assert code == 124 and output == "1\n" and script.time.monotonic() - began < 20, "its children end with it"


def test_the_sanitized_cases_launch_every_kind_of_backward(script) -> None:
    """Of half inputs: gradients of heads up to 64, 128 and 192, with a bias and of one, with dropout, and packed."""
    first, end = script.SANITIZED["attention"]
    found = set()
    for case in (draw_case("attention", 0, index) for index in range(first, end)):
        bias, mask = case.options.get("bias"), case.mask
        float_mask = isinstance(mask, torch.Tensor) and mask.is_floating_point()
        learned = [t for t in (getattr(bias, "tensor", bias), mask) if isinstance(t, torch.Tensor) and t.requires_grad]
        if case.dtype is torch.float32 or not case.conditions.grad:
            continue
        if learned:
            found.add("gradient of a bias")
            continue
        wide = max(case.dim, case.dim_v)
        found.add("64" if wide <= 64 else "128" if wide <= 128 else "192" if wide <= 192 else "256")
        found |= {"packed"} if case.packing is not None else set()
        found |= {"bias"} if bias is not None or float_mask else set()
        found |= {"dropout"} if case.options.get("dropout_p") else set()
    assert found >= {"64", "128", "192", "bias", "gradient of a bias", "dropout", "packed"}
