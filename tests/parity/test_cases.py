"""Drawn cases replay exactly, cover what they should, and run through the runner."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fastattn import functional
from fastattn.errors import NotSupported
from fastattn.parity import attention_cases
from fastattn.parity.cases import OPERATIONS, draw_case, parse_token, token
from fastattn.parity.histogram import check_mask_histogram
from fastattn.parity.run import verify


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_case_drawn_again_is_the_same_bit_for_bit(op):
    for index in range(20):
        first, second = draw_case(op, 7, index), draw_case(op, 7, index)
        assert first.describe() == second.describe()
        for name, tensor in first.tensors.items():
            other = second.tensors[name]
            assert tensor.stride() == other.stride() and torch.equal(tensor.nan_to_num(9.0), other.nan_to_num(9.0))
    assert draw_case(op, 7, 0).describe() != draw_case(op, 8, 0).describe()


def test_tokens():
    assert parse_token(token(12, 345)) == (12, 345)
    for wrong in ("12", "a.b", "1.2.3", "-1.2", ""):
        with pytest.raises(ValueError, match="repro"):
            parse_token(wrong)


def test_attention_cases_cover_what_kernels_get_wrong():
    cases = [draw_case("attention", 3, index) for index in range(600)]
    seen = Counter()
    for case in cases:
        seen["one query"] += case.len_q == 1
        seen["nothing to see"] += case.len_k == 0
        seen["lengths differ"] += case.len_q != case.len_k
        seen["grouped heads"] += case.heads_q != case.heads_kv
        seen["head dim 24"] += case.dim == 24
        seen["Dv differs"] += case.dim_v != case.dim
        seen["poisoned keys"] += bool(case.tensors["k"].isnan().any())
        seen["not contiguous"] += not case.tensors["q"].is_contiguous()
        seen["half"] += case.dtype is not torch.float32
        seen["misaligned"] += case.conditions.shift != 0
        seen["float mask"] += isinstance(case.mask, torch.Tensor) and case.mask.is_floating_point()
        for name in ("bias", "softcap", "sinks", "dropout_p"):
            seen[name] += name in case.options
    assert len(seen) == 15 and all(seen.values()), seen


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_reference_backend_holds_the_rule(op):
    report = verify(op, "reference", cases=40, seed=11)
    assert report.passed, "\n".join(map(str, report.failures))
    assert report.checked == 40 and not report.refused


@pytest.mark.parametrize("op", OPERATIONS)
def test_failures_name_the_case_that_replays_them(monkeypatch, op):
    """The first failure's index, run alone, fails again in the same quantities by the same ratios."""
    name = {"norm": "layer_norm"}.get(op, op)
    real = getattr(functional, name)

    def wrong(*args, **options):
        found = real(*args, **options)
        return (1.03 * found[0], *found[1:]) if isinstance(found, tuple) else 1.03 * found

    monkeypatch.setattr(functional, name, wrong)
    report = verify(op, "reference", cases=12, seed=5)
    assert report.failures
    failure = report.failures[-1]
    assert failure.repro == f"fastattn verify --op {op} --backend reference --repro {failure.case}"
    seed, index = parse_token(failure.case)
    again = verify(op, "reference", seed=seed, only=[index])
    assert [str(row) for row in again.failures[0].rows] == [str(row) for row in failure.rows]
    assert again.failures[0].describe == failure.describe


def test_refusals_are_counted_by_reason_and_exceptions_are_failures(monkeypatch):
    def refuse(*args, **options):
        raise NotSupported("attention", "a call", {"reference": ["it is Monday"]})

    for name in ("attention", "attention_varlen"):
        monkeypatch.setattr(functional, name, refuse)
    report = verify("attention", "reference", cases=5)
    assert not report.failures and report.refused == 5 and report.refusals == {("attention", "it is Monday"): 5}
    assert not report.passed, "nothing was compared"

    def crash(*args, **options):
        raise RuntimeError("it is Tuesday")

    monkeypatch.setattr(functional, "attention", crash)
    report = verify("attention", "reference", cases=3)
    assert len(report.failures) == 3 and "it is Tuesday" in report.failures[0].exception
    assert 'File "fastattn/parity/' in report.failures[0].exception, "not where this machine has the package"


def test_half_products_on_gpus_add_up_in_float32_while_a_case_runs_only(monkeypatch):
    products = torch.backends.cuda.matmul
    seen: list[tuple[bool, bool]] = []

    def allowed() -> tuple[bool, bool]:
        return products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction

    monkeypatch.setattr(OPERATIONS["gated_ffn"], "run", lambda case, backend: seen.append(allowed()) or [])
    before = allowed()
    assert verify("gated_ffn", "reference", cases=1).passed
    assert seen == [(False, False)] and allowed() == before


def test_a_case_whose_gradients_are_refused_is_run_forward(monkeypatch):
    monkeypatch.setattr("fastattn.parity.cases._LEARNED", ())  # of frozen inputs alone the mask's check is refused

    def forward_only(real):
        def call(*args, **options):
            given = [getattr(value, "tensor", value) for value in (*args, *options.values())]
            if any(isinstance(value, torch.Tensor) and value.requires_grad for value in given):
                raise NotSupported("attention", "a call", {"reference": ["it has no backward"]})
            return real(*args, **options)

        return call

    for name in ("attention", "attention_varlen"):
        monkeypatch.setattr(functional, name, forward_only(getattr(functional, name)))
    report = verify("attention", "reference", cases=20)
    assert report.passed and report.checked == 20 and not report.refused
    assert 10 <= report.forward_only == report.refusals["attention", "it has no backward"] < 20
    assert not any(name.startswith("d") for _, _, name in report.worst)


@pytest.mark.parametrize("forward_too", [False, True])
def test_a_refused_check_of_the_mask_costs_no_other_row(monkeypatch, forward_too):
    whole = verify("attention", "reference", cases=20)

    def check(*args, grad, **options):
        if grad or forward_too:
            raise NotSupported("attention", "a call", {"reference": ["it counts nothing"]})
        return check_mask_histogram(*args, grad=grad, **options)

    monkeypatch.setattr(attention_cases, "check_mask_histogram", check)
    report = verify("attention", "reference", cases=20)
    refused = {key for key in whole.worst if "queries" in key[2] or (forward_too and "keys" in key[2])}
    assert refused and report.worst == {key: rows for key, rows in whole.worst.items() if key not in refused}
    assert report.passed and report.checked == 20 and not report.refused and not report.forward_only
    assert 5 <= report.refusals["attention", "it counts nothing"] <= 20


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="op='atention' is unknown"):
        verify("atention", "reference")
    with pytest.raises(ValueError, match="backend='gpu' is unknown"):
        verify("norm", "gpu")
