"""info, explain and verify, called as a user calls them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import fastattn
from fastattn import dispatch, functional
from fastattn.cli import explain, info, verify
from fastattn.cli.app import app
from fastattn.parity.report import VerifyReport

RUNNER = CliRunner()


def _run(*arguments: str, code: int = 0) -> str:
    result = RUNNER.invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == code, f"fastattn {' '.join(arguments)}\n{result.output}\n{result.exception!r}"
    return result.output


def test_info_names_versions_and_every_backend():
    text = _run("info")
    assert f"fastattn {fastattn.__version__}" in text and torch.__version__ in text
    for name, reason in dispatch.backends().items():
        assert name in text
        assert reason is None or reason.split()[0] in text


def test_info_as_json():
    found = json.loads(_run("info", "--json"))
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert set(found["backends"]) == set(dispatch.NAMES) and found["backends"]["reference"] == "usable"
    assert found["refused_operations"]["reference"] == found["refused_operations"]["cpu"] == {}
    assert found["refused_operations"]["cuda"]["encoder_layer"].endswith("has no kernel for encoder_layer")
    halves = {"attention", "attention_decode"}
    assert not halves & set(found["refused_operations"]["cuda"]), "of halves it takes each operation"
    if found["backends"]["cpu"] == "usable":
        assert found["instruction_set"] in found["instruction_sets_available"]
    else:
        assert found["instruction_set"] is None


def test_info_says_which_calls_triton_runs_first():
    assert "decoding, and attention with gradients, on any GPU: triton, then cuda, then reference" in _run("info")
    assert list(dispatch.FIRST_TRITON) in json.loads(_run("info", "--json"))["faster"].values()


def test_explain_says_who_runs_a_call_and_why_others_do_not():
    found = json.loads(_run("explain", "--shape", "1,4,2,7,9,24", "--dtype", "float64", "--mask", "causal", "--json"))
    assert found["chosen"] == "reference" and "heads_kv=2" in found["problem"] and "band=True" in found["problem"]
    assert "float64" in str(found["reasons"]["cpu"]) or dispatch.backends()["cpu"] is not None
    text = _run("explain", "--shape", "1,4,2,7,9,24,16", "--device", "cuda", "--grad")
    assert "cuda" in text and "dim_v=16" in text and "runs this call" in text


def test_explain_of_a_forced_backend_that_refuses_exits_with_1():
    text = _run("explain", "--dtype", "float64", "--backend", "cpu", code=1)
    assert "no backend runs this call" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("explain", "--shape", "1,2,3"), "B,Hq,Hkv,Sq,Skv,D"),
        (("explain", "--shape", "1,4,3,7,9,24"), "no multiple"),
        (("explain", "--mask", "round"), "round"),
        (("explain", "--dtype", "int8"), "int8"),
        (("explain", "--backend", "gpu"), "gpu"),
        (("explain", "--bias-grad"), "--bias"),
        (("explain", "--bias", "float16"), "beside q of float32 a bias is of float32"),
        (("verify", "--op", "softmax"), "softmax"),
        (("verify", "--backend", "gpu"), "gpu"),
        (("verify", "--op", "norm", "--repro", "seventeen"), "seventeen"),
        (("verify", "--repro", "0.1"), "--op"),
        (("verify", "--op", "norm,ffn", "--repro", "0.1"), "--op"),
        (("verify", "--op", "norm,softmax"), "softmax"),
        (("verify", "--jobs", "0"), "jobs=0"),
        (("verify", "--cases", "4", "--first", "4"), "--first 4"),
        (("verify", "--seconds", "-1"), "seconds=-1"),
        (("demo", "--model", "no/such/folder", "--quick"), "no/such/folder"),
    ],
)
def test_wrong_options_are_answered_by_a_sentence(arguments, said):
    text = _run(*arguments, code=2)
    assert said in text and "Traceback" not in text


def test_the_backend_of_the_environment_is_the_one_that_is_explained_and_verified(monkeypatch):
    monkeypatch.setattr("fastattn.dispatch.forced", "reference")
    assert "reference runs this call" in _run("explain")
    assert "backend reference, seed 0" in _run("verify", "--op", "norm", "--cases", "1")


def test_verify_says_where_no_native_backend_can_be_used(monkeypatch):
    usable = {"cuda": "no driver", "cpu": "no library", "triton": "none", "reference": None}
    monkeypatch.setattr("fastattn.cli.verify.backends", lambda: usable)
    text = _run("verify", "--op", "norm", "--cases", "1")
    assert "the reference is checked: cuda: no driver; cpu: no library" in text and "backend reference" in text


@pytest.mark.parametrize("arguments", [["info"], ["verify", "--cases", "1"]])
def test_a_wrong_backend_in_the_environment_is_a_sentence(arguments, fresh_process):
    script = f"import sys; sys.argv[1:] = {arguments}; from fastattn.cli import main; main()"
    found = fresh_process(script, FASTATTN_BACKEND="fast")
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert "FASTATTN_BACKEND='fast' is unknown" in found.stderr and "leave it unset" in found.stderr


@pytest.mark.parametrize("op", ["attention", "norm", "linear_act", "ffn", "gated_ffn", "encoder_layer"])
def test_verify_prints_worst_ratios(op):
    text = _run("verify", "--op", op, "--backend", "reference", "--cases", "6", "--seed", "2")
    assert f"{op}: worst error / bound" in text and "6 cases checked, 0 refused, all within the bound" in text


def test_verify_counts_in_parts():
    def worst(*arguments):
        text = _run("verify", "--op", "norm", "--backend", "reference", "--json", *arguments)
        found = json.loads(text[text.index("{") :])
        return found["cases"]["norm"], {(row["dtype"], row["quantity"]): row["ratio"] for row in found["worst"]}

    (whole, all_of_them), (begin, early), (rest, late) = (
        worst("--cases", "9"),
        worst("--cases", "5"),
        worst("--cases", "9", "--first", "5"),
    )
    assert (whole, begin, rest) == (9, 5, 4)
    assert all_of_them == {key: max(early.get(key, 0.0), late.get(key, 0.0)) for key in early | late}


def test_verify_writes_json(tmp_path):
    target = tmp_path / "verify.json"
    text = _run("verify", "--op", "norm", "--backend", "reference", "--cases", "4", "--json", "--output", str(target))
    found = json.loads(target.read_text())
    assert found == json.loads(text[text.index("{") :]) and found["passed"] and found["cases"] == {"norm": 4}
    assert all(row["ratio"] <= 1 for row in found["worst"])


def test_verify_of_two_operations_says_what_the_time_left_out(tmp_path):
    target = tmp_path / "verify.json"
    asked = ("verify", "--op", "norm,ffn", "--backend", "reference", "--cases", "3")
    text = _run(*asked, "--output", str(target))
    assert "6 cases checked" in text and "norm: worst" in text and "ffn: worst" in text and "left out" not in text
    assert json.loads(target.read_text())["checked_of"] == {"norm": 3, "ffn": 3}
    text = _run(*asked, "--jobs", "2", "--seconds", "0", "--output", str(target), code=1)
    assert "the time was up: 6 cases were left out; run: norm 0 of 3, ffn 0 of 3" in text
    found = json.loads(target.read_text())
    assert found["left_out"] == 6 and found["asked"] == {"norm": 3, "ffn": 3} and found["cases"] == {}


def test_verify_fails_with_a_command_that_replays_the_failure(monkeypatch):
    real = functional.linear_act
    monkeypatch.setattr(functional, "linear_act", lambda *a, **o: 1.02 * real(*a, **o))
    text = _run("verify", "--op", "linear_act", "--backend", "reference", "--cases", "5", code=1)
    line = next(line for line in text.splitlines() if line.startswith("fastattn verify"))
    again = _run(*line.split()[1:], code=1)
    assert line in again and again.count("FAILED") >= 2
    monkeypatch.undo()
    assert "1 cases checked, 0 refused, all within the bound" in _run(*line.split()[1:])


def test_verify_under_another_instruction_set():
    if dispatch.backends()["cpu"] is not None:
        pytest.skip(str(dispatch.backends()["cpu"]))
    from fastattn.backends import cpu

    before = cpu.isa()
    for isa in cpu.available_isas():
        _run("verify", "--op", "norm", "--backend", "cpu", "--cases", "3", "--isa", isa)
    assert "mmx" in _run("verify", "--op", "norm", "--backend", "cpu", "--isa", "mmx", code=2)
    assert cpu.isa() == before


BRACKETS = "it is missing: pip install 'fastattn[triton]'; see [red]colours[/red]"


def test_square_brackets_in_a_reason_are_printed_as_they_are(monkeypatch):
    monkeypatch.setattr(info, "backends", lambda: {**dispatch.backends(), "triton": BRACKETS})
    assert BRACKETS in _run("info")

    def explain_problem(problem, backend):
        found = dispatch.explain_problem(problem, backend)
        return replace(found, chosen=None, reasons={"cpu": [BRACKETS]})

    monkeypatch.setattr(explain, "explain_problem", explain_problem)
    assert BRACKETS in _run("explain", code=1)

    def run_verify(op, backend, cases, seed, **_):
        report = VerifyReport(backend, seed)
        report.refusals[op, BRACKETS] += 1
        return report

    monkeypatch.setattr(verify, "run_verify", run_verify)
    assert BRACKETS in _run("verify", "--op", "norm", "--backend", "reference", code=1)


def test_without_typer_or_rich_the_command_says_what_to_install(fresh_process):
    script = (
        "import sys\nsys.modules['typer'] = sys.modules['rich'] = None\n"
        "import importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n in ('typer', 'rich') else real(n, *a)\n"
        "from fastattn.cli import main\nmain()\n"
    )
    done = fresh_process(script)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip() == "The fastattn command needs typer and rich: pip install 'fastattn[cli]'"


def test_a_file_to_write_gets_its_folder_or_is_refused_before_the_work(tmp_path):
    asked = ("verify", "--op", "norm", "--backend", "reference", "--cases", "1", "--output")
    _run(*asked, str(tmp_path / "new" / "folder" / "verify.json"))
    assert json.loads((tmp_path / "new" / "folder" / "verify.json").read_text())["checked_of"] == {"norm": 1}
    assert "is a folder: name a file" in _run(*asked, str(tmp_path), code=2)
    (tmp_path / "file").touch()
    assert "its folder cannot be made" in _run(*asked, str(tmp_path / "file" / "verify.json"), code=2)


def test_version():
    assert _run("--version").strip() == f"fastattn {fastattn.__version__}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the backends run")
def test_explain_of_a_device_that_is_missing():
    text = _run("explain", "--device", "cuda", "--shape", "1,4,4,8,8,256", "--dtype", "bfloat16", "--grad")
    assert "reference runs this call here, triton where it is available" in text
    assert "the CUDA attention has gradients of head dims from 17 to 192, not of 256 and 256" in text
    assert "head dims of 1 to 256, not 300" in _run("explain", "--shape", "1,4,4,8,8,300", code=2)
