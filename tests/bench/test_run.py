"""Runs: the rows, what a mismatch does, what is absent, ratios, and the JSON file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import dispatch
from fastattn.bench import run as run_module
from fastattn.bench.cases.grid import SHARES, SUITES
from fastattn.bench.limits import Limits, measure_limits
from fastattn.bench.providers import PROVIDERS
from fastattn.bench.providers.base import Job, Provider
from fastattn.bench.providers.compiled import no_compiler
from fastattn.bench.providers.torch_eager import Sdpa
from fastattn.bench.rows import Row, merge, read_result, why_apart, with_ratios
from fastattn.bench.timing import Effort, time_jobs

from .conftest import LEFT_OUT, quick_cases, quick_run


def test_rows_hold_what_was_promised(result) -> None:
    assert result.passed and result.quick and result.limits.copy > 0
    timed = [row for row in result.rows if row.median_ms is not None]
    assert {row.suite for row in timed} == {"attention", "packed", "decode", "norm", "ffn"}
    for row in timed:
        assert row.verified is True and 0 <= row.worst <= 1 and row.reason is None
        assert row.iqr_ms[0] <= row.median_ms <= row.iqr_ms[1] and row.samples >= 2
        assert row.work > 0 and row.rate == pytest.approx(1e3 * row.work / row.median_ms)
        assert row.share_of_limit > 0 and row.work_unit in ("FLOP", "B")
        assert row.peak_memory is None or row.peak_memory >= 0
    assert all(row.reason for row in result.rows if row.median_ms is None)
    assert result.environment["torch"] == torch.__version__ and result.environment["threads"] == 1


def test_absent_providers_are_listed_with_their_reason(result) -> None:
    asked = [row for row in result.rows if row.suite == "attention" and row.direction == "forward"]
    reasons = {row.provider: row.reason for row in asked}
    assert reasons["FlashAttention-3"] == "it runs on GPUs only"
    assert reasons["torch sdpa cuDNN"] == "torch has it for GPUs only"
    for name, reason in dispatch.backends().items():
        if reason is not None:
            assert reasons[f"fastattn {name}"] == reason
    for name in LEFT_OUT[:2]:
        assert "--compile" in reasons[name]


def test_ratios_compare_our_backends_with_others_only(result) -> None:
    for rows in _questions(result.rows):
        for row in rows:
            others = [r for r in rows if r.median_ms is not None and r is not row and not (r.ours and row.ours)]
            if row.median_ms is None or not others:
                assert row.ratio is None
                continue
            fastest = min(others, key=lambda r: r.median_ms)
            assert row.ratio == pytest.approx(fastest.median_ms / row.median_ms) and row.ratio_to == fastest.provider


def _questions(rows):
    found = {}
    for row in rows:
        found.setdefault(row.question, []).append(row)
    return found.values()


class _Wrong(Provider):
    """Attention that is off by a percent, or raises."""

    suites = frozenset({"norm"})

    def __init__(self, name: str, ours: bool, error: Exception | None = None) -> None:
        self.name, self.ours, self.error = name, ours, error

    def prepare(self, case, tensors):
        if self.error is not None:
            raise self.error
        return lambda: (1.01 * torch.nn.functional.layer_norm(tensors["x"], (case.width,)),) * len(case.outputs)


@pytest.mark.parametrize("ours", [False, True])
def test_a_mismatch_is_not_timed_and_fails_the_run(monkeypatch, ours) -> None:
    monkeypatch.setattr(run_module, "PROVIDERS", (*PROVIDERS, _Wrong("wrong", ours)))
    found = quick_run("norm", shapes=("bert-base",), directions=("forward",))
    rows = [row for row in found.rows if row.provider == "wrong"]
    assert rows and all(row.verified is False and row.median_ms is None for row in rows)
    assert all("breaks the parity rule" in row.reason and "y: FAILED" in row.reason for row in rows)
    assert not found.passed and len(found.failures) == len(rows)
    assert all("wrong" in failure and "norm" in failure for failure in found.failures)
    assert any(row.median_ms for row in found.rows if row.provider == "torch eager"), "the others are still timed"


def test_a_peer_that_raises_is_absent_and_a_backend_that_raises_fails_the_run(monkeypatch) -> None:
    both = (_Wrong("peer", False, RuntimeError("no kernel\nat all")), _Wrong("backend", True, RuntimeError("crash")))
    monkeypatch.setattr(run_module, "PROVIDERS", both)
    found = quick_run("norm", shapes=("bert-base",), directions=("forward",))
    reasons = {row.provider: row.reason for row in found.rows}
    assert reasons == {"peer": "RuntimeError: no kernel", "backend": "RuntimeError: crash"}
    assert found.failures and all("backend" in failure for failure in found.failures)
    refusal = fastattn.NotSupported("norm", "this problem", {"cpu": ["too wide"]})
    monkeypatch.setattr(run_module, "PROVIDERS", (_Wrong("backend", True, refusal),))
    found = quick_run("norm", shapes=("bert-base",), directions=("forward",))
    assert found.passed and {row.reason for row in found.rows} == {"too wide"}


def test_backward_alone_is_verified_too() -> None:
    found = quick_run("norm", "ffn", shapes=("bert-base",), directions=("backward",), only=frozenset({"torch eager"}))
    assert found.passed and {row.direction for row in found.rows} == {"backward"}
    assert all(row.verified and row.median_ms for row in found.rows)


def test_halves_are_verified_in_their_own_dtype() -> None:
    wanted = [replace(case, dtype=torch.bfloat16) for case in quick_cases("attention", "norm", shapes=("gpt2",))]
    options = run_module.Options(quick=True, compiled=False, memory=False)
    found = run_module.run_bench(wanted, options)
    assert found.passed and {row.dtype for row in found.rows} == {"bfloat16"} and "bfloat16" in found.limits.product


def test_a_spent_budget_leaves_cases_out_and_says_so() -> None:
    found = quick_run("norm", shapes=("bert-base",), budget=0.0)
    assert not found.rows and found.left_out and "norm" in found.left_out[0] and found.passed


def test_each_suite_has_its_share_of_a_budget() -> None:
    found = run_module._deadlines(quick_cases("norm", "ffn", shapes=("bert-base",)), 110.0)
    assert found == pytest.approx({"norm": 50.0, "ffn": 110.0})
    assert run_module._deadlines(quick_cases("norm"), None) == {"norm": float("inf")}
    assert sum(SHARES.values()) == pytest.approx(1.0) and set(SHARES) == set(SUITES)


def test_compiled_providers_join_when_asked() -> None:
    found = quick_run("ffn", shapes=("bert-base",), directions=("forward",), compiled=True)
    (row,) = [row for row in found.rows if row.provider == "torch.compile"]
    assert row.verified or row.reason, row


def test_compilers_join_the_cases_that_say_so_unless_told_otherwise() -> None:
    (case,) = quick_cases("ffn", shapes=("bert-base",))

    def reason(compiled: bool | None, directions: tuple[str, ...]) -> str | None:
        options = run_module.Options(quick=True, compiled=compiled)
        question = run_module._Question(replace(case, compiled=directions), "forward", options)
        question._admit(next(p for p in PROVIDERS if p.name == "torch.compile"))
        return question.rows["torch.compile"].reason

    for compiled, directions in ((None, ("both",)), (False, ("forward",))):
        assert "--compile lets it join" in (reason(compiled, directions) or "")
    assert reason(None, ("forward",)) == reason(True, ()) == no_compiler("cpu")


def test_the_better_of_two_measurements_is_the_limit() -> None:
    calm, busy = Limits({"float32": 9.0}, copy=5.0, fma=None, empty_ms=1.0), Limits({"float32": 2.0}, 6.0, 3.0, 2.0)
    assert calm.best(busy) == busy.best(calm) == Limits({"float32": 9.0}, 6.0, 3.0, 1.0)


def test_a_half_dtype_on_a_cpu_is_held_to_what_float32_can_do() -> None:
    """torch multiplies bfloat16 element by element on CPUs without instructions for it: that is no limit."""
    limits = Limits({"bfloat16": 1.0, "float32": 80.0}, copy=10.0, fma=100.0)
    assert limits.seconds(200.0, 1.0, "bfloat16") == 2.0
    assert limits.seconds(200.0, 40.0, "bfloat16") == 4.0


def test_a_product_that_takes_long_is_timed_at_an_eighth_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def rate(per_second: float) -> float:
        def seconds(device: str, call: Callable[[], Tensor]) -> float:
            sizes.append(call().shape[0])
            return 2.0 * sizes[-1] ** 3 / per_second

        monkeypatch.setattr("fastattn.bench.limits._seconds", seconds)
        return measure_limits("cpu", [torch.float32]).product["float32"]

    assert rate(1e9) == pytest.approx(1e9) and sizes[0] == 256 and 2048 not in sizes
    assert rate(1e12) == pytest.approx(1e12) and 2048 in sizes


def test_a_call_far_behind_the_fastest_is_made_a_few_times_only() -> None:
    def sleep(seconds: float) -> Job:
        return Job(lambda: (time.sleep(seconds),), ("",))

    effort = Effort(rounds=5, seconds=0.0, most=5, warm_up=1, few=2)
    found = time_jobs({"fast": sleep(0.02), "near": sleep(0.05), "far": sleep(0.15)}, "cpu", effort)
    assert {name: len(timing.samples) for name, timing in found.items()} == {"fast": 5, "near": 5, "far": 2}


@pytest.mark.parametrize("lost", ["torch eager", "fastattn reference"])
def test_one_that_fails_once_it_is_timed_costs_only_its_row(monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    def broken() -> tuple[torch.Tensor, ...]:
        raise RuntimeError("no driver any more\nand a long trace")

    def timed(jobs: dict[str, Job], *rest: Any) -> dict[str, Any]:
        return time_jobs({n: replace(job, call=broken) if n == lost else job for n, job in jobs.items()}, *rest)

    monkeypatch.setattr("fastattn.bench.run.time_jobs", timed)
    found = quick_run("norm", memory=True)
    rows = {row.provider: row for row in found.rows if row.verified}
    assert rows[lost].reason == "RuntimeError: no driver any more" and rows[lost].median_ms is None
    assert all(row.median_ms for name, row in rows.items() if name != lost)
    assert found.passed == (lost == "torch eager"), found.failures


def test_one_whose_memory_cannot_be_measured_keeps_its_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> int:
        raise OSError("no such file")

    monkeypatch.setattr("fastattn.bench.run.peak_memory", broken)
    found = quick_run("norm", memory=True)
    timed = [row for row in found.rows if row.median_ms]
    assert timed and all("peak memory unknown: OSError: no such file" in row.note for row in timed)
    assert len(found.failures) == sum(row.ours for row in timed) and not found.passed


def test_json_round_trip(result, tmp_path) -> None:
    file = tmp_path / "results.json"
    result.write(file)
    again = read_result(file)
    assert again.rows == result.rows and again.limits == result.limits and again.to_json() == result.to_json()
    held = json.loads(file.read_text())["rows"][0]
    assert set(held) == {field.name for field in fields(Row)}
    assert read_result(tmp_path).rows == result.rows, "a folder stands for its results.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match="format"):
        read_result(file)
    with pytest.raises(ValueError, match="no results there"):
        read_result(tmp_path / "missing")


def test_merging_replaces_the_rows_of_a_question_that_was_timed_again(result) -> None:
    timed = next(row for row in result.rows if row.median_ms is not None)
    later = replace(result, rows=[replace(timed, note="later")], failures=["x"])
    failed = [f"{timed.suite}: {timed.case}, {timed.direction}, {timed.dtype}, torch eager: it broke"]
    whole = merge([replace(result, failures=failed), later])
    assert merge([replace(result, failures=failed), replace(result, rows=[])]).failures == failed
    reached = f"{timed.suite}: {timed.case}, {timed.direction}"
    earlier = replace(result, left_out=[reached, "ffn: another, both"])
    assert merge([earlier, later]).left_out == ["ffn: another, both"], "what a later run reaches is not left out"
    assert [row for row in whole.rows if row.question == timed.question] == later.rows and whole.failures == ["x"]
    others = [row for row in result.rows if row.question != timed.question]
    assert [row for row in whole.rows if row.question != timed.question] == others
    order = list(dict.fromkeys(row.question for row in result.rows))
    assert list(dict.fromkeys(row.question for row in whole.rows)) == order
    missing = replace(result, rows=[replace(timed, median_ms=None, reason="it is not installed")])
    assert merge([result, missing]).rows == result.rows, "what was not timed replaces nothing"


def test_runs_of_different_machines_are_kept_apart(result) -> None:
    environment = dict(result.environment)
    assert why_apart(result, environment, result.quick) is None
    assert why_apart(result, {**environment, "threads": 64}, result.quick) == (
        f"its threads is {environment.get('threads')}, now it is 64"
    )
    assert why_apart(result, environment, not result.quick) == "one is a quick trial"


def test_merged_runs_have_the_best_limits_of_all_and_shares_of_those(result) -> None:
    first, *_ = (row for row in result.rows if row.median_ms is not None)
    slow = replace(result, rows=[first], limits=Limits({first.dtype: 1.0}, copy=1.0, fma=2.0))
    other = replace(first, dtype="another")
    fast = replace(result, rows=[other], limits=Limits({"another": 8e9}, copy=2e9, fma=1.0, notes=("a note",)))
    whole = merge([slow, fast])
    assert whole.limits == Limits({first.dtype: 1.0, "another": 8e9}, copy=2e9, fma=2.0, notes=("a note",))
    seconds = first.median_ms / 1e3
    assert whole.rows[0].share_of_limit == max(first.flops / 2.0, first.bytes / 2e9) / seconds
    assert whole.rows[1].share_of_limit == max(first.flops / 8e9, first.bytes / 2e9) / seconds
    of_before = replace(first, flops=None, bytes=None)
    assert merge([replace(slow, rows=[of_before]), fast]).rows[0] == of_before, "what it was, where work is not known"


def test_models_are_verified_and_say_what_was_swapped() -> None:
    Sdpa("flash", "torch sdpa flash").only()  # as a question before leaves it; a training step's dropout needs another
    found = quick_run("model", only=frozenset({"torch as it is", "fastattn swap"}), memory=True)
    assert found.passed
    rows = {(row.case, row.provider): row for row in found.rows}
    for (case, provider), row in rows.items():
        if row.reason == "transformers is not installed":
            continue
        assert row.verified and row.median_ms, (case, row.reason)
        kept = provider == "fastattn swap" and row.direction == "forward"
        assert provider != "fastattn swap" or "swapped: " in row.note
        assert ("keeps its working memory" in row.note) == kept and (not kept or row.peak_memory is None)
    assert any(row.direction == "both" for row in found.rows), "a training step is among them"


def test_ratio_of_a_lone_provider_is_none(result) -> None:
    lone = replace(result.rows[0], median_ms=1.0, ratio=None)
    assert with_ratios([lone])[0].ratio is None
