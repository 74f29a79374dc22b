"""The choice of a backend: order, reasons, fallbacks that are counted and warned about once, forcing."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import sys
import threading
import types
import warnings

import pytest
import torch

import fastattn
from fastattn import dispatch
from fastattn.backends import reference
from fastattn.problems import AttentionProblem, DecodeProblem, NormProblem

pytestmark = pytest.mark.usefixtures("long_way")

X = torch.zeros(2, 8)


class Stub(types.ModuleType):
    """A backend that records the problems it is asked about and computes by the reference."""

    def __init__(self, name, unavailable=None, refuses=()):
        super().__init__(name)
        self.NAME, self.unavailable, self.refuses = name, unavailable, list(refuses)
        self.asked, self.calls = [], 0

    def unavailable_reason(self):
        return self.unavailable

    def not_supported_reasons(self, problem):
        self.asked.append(problem)
        return self.refuses

    def norm_forward(self, *args):
        self.calls += 1
        return reference.norm_forward(*args)

    def attention_forward(self, *args):
        self.calls += 1
        return reference.attention_forward(*args)


@pytest.fixture
def install(monkeypatch):
    """Puts a stub in the place of a backend, with nothing remembered from before."""
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_modules", dict(dispatch._modules))
    monkeypatch.setattr(dispatch, "forced", "")
    monkeypatch.setattr(dispatch, "ORDER", {"cpu": ("cpu", "triton", "reference"), "cuda": ("cuda", "reference")})
    dispatch.fallbacks.clear()

    def put(name, **kwargs):
        dispatch._modules[name] = Stub(name, **kwargs)
        return dispatch._modules[name]

    yield put
    dispatch.fallbacks.clear()


def test_the_first_that_supports_the_call_runs_it(install):
    cpu, triton = install("cpu"), install("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastattn.layer_norm(X)
    assert (cpu.calls, triton.calls) == (1, 0)
    assert triton.asked == [] and not dispatch.fallbacks


def test_a_refusal_is_counted_each_time_and_warned_about_once(install):
    install("cpu", refuses=["it is Monday", "the moon is full"])
    install("triton", unavailable="no GPU")
    with pytest.warns(dispatch.BackendWarning) as caught:
        for _ in range(3):
            fastattn.layer_norm(X)
            fastattn.layer_norm(X[:1])
    assert [str(w.message) for w in caught] == [
        "fastattn: norm falls back from backend 'cpu' to 'reference': it is Monday",
        "fastattn: norm falls back from backend 'cpu' to 'reference': the moon is full",
    ]
    assert dispatch.fallbacks == {("norm", "cpu", "it is Monday"): 6, ("norm", "cpu", "the moon is full"): 6}


def test_a_missing_native_backend_is_a_fallback_and_a_missing_optional_one_is_not(install):
    install("cpu", unavailable="the library is not built")
    install("triton", unavailable="no GPU")
    with pytest.warns(dispatch.BackendWarning, match="the library is not built"):
        fastattn.layer_norm(X)
    assert dispatch.fallbacks == {("norm", "cpu", "the library is not built"): 1}


def test_a_module_that_cannot_be_imported_is_unavailable(install, monkeypatch):
    dispatch._modules.pop("triton", None)
    monkeypatch.setitem(sys.modules, "fastattn.backends.triton", None)
    reason = dispatch.backends()["triton"]
    assert reason.startswith("fastattn.backends.triton cannot be imported: ")


def test_logging_names_the_problem(install, monkeypatch, caplog):
    install("cpu", refuses=["no"])
    install("triton", refuses=["neither"])
    monkeypatch.setenv("FASTATTN_LOG", "1")
    with caplog.at_level(logging.WARNING, logger="fastattn"), pytest.warns(dispatch.BackendWarning):
        fastattn.layer_norm(X)
    assert "norm: reference runs instead of cpu: no; NormProblem(device_type='cpu'" in caplog.text
    assert "norm: reference runs instead of triton: neither" in caplog.text


def test_a_choice_is_remembered_per_problem(install):
    cpu = install("cpu")
    for x in (X, X, X[:1], X.double(), X):
        fastattn.layer_norm(x)
    assert len(cpu.asked) == 3
    assert cpu.asked[0] == NormProblem("cpu", torch.float32, "layer", 2, 8)


def test_remembered_choices_stay_bounded(install, monkeypatch):
    install("cpu")
    monkeypatch.setattr(dispatch, "_FORGET_AT", 4)
    for rows in range(1, 30):
        fastattn.layer_norm(torch.zeros(rows, 4))
    assert len(dispatch._choices) <= 4


def test_use_backend_forces_nests_and_is_undone(install):
    cpu, triton = install("cpu"), install("triton")
    with fastattn.use_backend("triton"):
        fastattn.layer_norm(X)
        with fastattn.use_backend("cpu"):
            fastattn.layer_norm(X)
        with fastattn.use_backend(None):
            fastattn.layer_norm(X)
        fastattn.layer_norm(X, backend="cpu")
    with pytest.raises(RuntimeError), fastattn.use_backend("triton"):
        raise RuntimeError
    fastattn.layer_norm(X)
    assert (cpu.calls, triton.calls) == (4, 1)


def test_a_forced_backend_that_refuses_raises_with_every_reason(install):
    install("cpu", refuses=["first reason", "second reason"])
    with pytest.raises(fastattn.NotSupported) as caught, fastattn.use_backend("cpu"):
        fastattn.layer_norm(X)
    error = caught.value
    assert error.op == "norm" and error.reasons == {"cpu": ["first reason", "second reason"]}
    assert error.problem == NormProblem("cpu", torch.float32, "layer", 2, 8)
    for text in ("norm is not supported by cpu", "first reason; second reason", "rows=2", "Pass backend=None"):
        assert text in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_forced_backend_that_is_missing_says_why(install):
    install("triton", unavailable="torch sees no GPU")
    with pytest.raises(fastattn.NotSupported, match="triton: torch sees no GPU"):
        fastattn.layer_norm(X, backend="triton")


def test_unknown_names(install):
    with (
        pytest.raises(ValueError, match="backend='tpu' is unknown: pass one of 'cuda', 'cpu'"),
        fastattn.use_backend("tpu"),
    ):
        pass
    with pytest.raises(ValueError, match="backend='tpu' is unknown"):
        fastattn.layer_norm(X, backend="tpu")


def test_a_problem_says_what_the_call_asks_for(install):
    cpu = install("cpu")
    q, k, v = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 6)
    mask = fastattn.masks.Causal() & fastattn.masks.KeyLengths([3, 4])
    with torch.no_grad():
        fastattn.attention(q.requires_grad_(), k, v, mask=mask, bias=torch.zeros(5), sinks=torch.zeros(4), softcap=2.0)
    assert cpu.asked == [
        AttentionProblem(
            device_type="cpu",
            dtype=torch.float32,
            batch=2,
            heads_q=4,
            heads_kv=2,
            len_q=3,
            len_k=5,
            dim_qk=8,
            dim_v=6,
            key_range=True,
            band=True,
            bias=torch.float32,
            softcap=True,
            sinks=True,
        )
    ]
    bias = torch.zeros(4, 1, 5, requires_grad=True)
    ranges = torch.zeros(1, 1, 3, 2, dtype=torch.int32)
    fastattn.attention(q, k, v, mask=ranges, bias=bias, dropout_p=0.5, deterministic=True)
    asked = cpu.asked[1]
    assert asked.requires_grad and asked.bias_requires_grad and asked.dropout and asked.deterministic
    assert asked.intervals == 1 and not asked.band and not asked.dense_mask
    fastattn.attention(q, k, v, mask=torch.ones(5, dtype=torch.bool))
    assert cpu.asked[2].dense_mask and not cpu.asked[2].deterministic


def test_explain_asks_everyone_and_computes_nothing(install):
    cpu, triton = install("cpu", refuses=["dtype"]), install("triton")
    q = torch.zeros(1, 2, 3, 8)
    explanation = fastattn.explain(q, q, q)
    assert explanation.chosen == "triton"
    assert list(explanation.reasons) == ["cpu", "triton", "reference", "cuda"]
    assert [explanation.reasons[name] for name in ("cpu", "triton", "reference")] == [["dtype"], [], []]
    assert "the CUDA backend does not run on cpu tensors" in explanation.reasons["cuda"]
    lines = str(explanation).splitlines()[:4]
    assert lines[0].startswith("attention: triton runs AttentionProblem(") and lines[1:] == [
        "  cpu: dtype",
        "  triton: runs it",
        "  reference: could run it, but triton comes first",
    ]
    assert cpu.calls == triton.calls == 0 and not dispatch.fallbacks
    forced = fastattn.explain(q, q, q, backend="cpu")
    assert forced.chosen is None and forced.reasons["triton"] == ["the backend 'cpu' is forced"]


def test_explain_asks_a_backend_that_is_missing_too(install):
    install("cpu", unavailable="not built", refuses=["dtype"])
    q = torch.zeros(1, 2, 3, 8)
    assert fastattn.explain(q, q, q).reasons["cpu"] == ["not built", "dtype"]


def test_explain_agrees_with_the_call_on_the_real_backends():
    q = torch.zeros(1, 2, 3, 8, requires_grad=True)
    explanation = fastattn.explain(q, q, q, mask=fastattn.masks.Causal())
    assert explanation.problem.requires_grad and explanation.problem.band
    fastattn.attention(q, q, q, mask=fastattn.masks.Causal(), backend=explanation.chosen).sum().backward()


def test_backends_lists_every_name():
    found = fastattn.backends()
    assert list(found) == ["cuda", "cpu", "triton", "reference"] and found["reference"] is None
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in found.values())


def test_the_environment_variable_forces_a_backend(fresh_process):
    code = (
        "import fastattn, torch; from fastattn import dispatch; "
        "print(dispatch.forced, fastattn.layer_norm(torch.ones(1, 2)).tolist())"
    )
    run = fresh_process(code, FASTATTN_BACKEND="reference")
    assert (run.returncode, run.stdout) == (0, "reference [[0.0, 0.0]]\n")
    run = fresh_process(code, FASTATTN_BACKEND="abacus")
    assert run.returncode != 0 and "FASTATTN_BACKEND='abacus' is unknown: pass one of 'cuda', 'cpu'" in run.stderr


@pytest.mark.parametrize(("major", "expected"), [(8, "cuda"), (9, "triton"), (10, "triton"), (12, "cuda"), (0, "cuda")])
def test_an_order_that_was_measured_faster_goes_by_operation_and_device(monkeypatch, major, expected):
    monkeypatch.setattr(dispatch, "_capability", lambda: major)
    attention = AttentionProblem("cuda", torch.bfloat16, 1, 1, 1, 9, 9, 64, 64)
    assert dispatch.order(attention)[0] == expected
    assert dispatch.order(dataclasses.replace(attention, len_q=8, packed=True))[0] == expected
    for decoding in ({"len_q": 8}, {"requires_grad": True}):
        assert dispatch.order(dataclasses.replace(attention, **decoding))[0] == "triton"
    assert dispatch.order(NormProblem("cuda", torch.bfloat16, "layer", 4, 8))[0] == "cuda"
    assert dispatch.order(DecodeProblem("cuda", torch.bfloat16, 1, 1, 1, 1, 64, 64, 64))[0] == "triton"  # not by device
    assert dispatch.order(dataclasses.replace(attention, device_type="cpu")) == dispatch.ORDER["cpu"]


def test_of_unlike_gpus_the_oldest_says_the_order(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (8, 0))[index])
    assert dispatch._capability.__wrapped__() == 8


def test_triton_takes_cpu_tensors_only_when_interpreted(fresh_process):
    code = "from fastattn import dispatch; print(dispatch.ORDER['cpu'])"
    assert fresh_process(code, TRITON_INTERPRET="1").stdout == "('cpu', 'triton', 'reference')\n"
    assert fresh_process(code, TRITON_INTERPRET="0").stdout == "('cpu', 'reference')\n"


def test_blocks_of_threads_that_end_out_of_order_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(dispatch, "forced", "")
    first, second = fastattn.use_backend("reference"), fastattn.use_backend("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.forced == "cpu"
    second.__exit__(None, None, None)
    assert dispatch.forced == ""


def test_blocks_of_two_threads_may_end_at_once(install, monkeypatch):
    found, gone = threading.Event(), threading.Event()

    class Blocks(list):
        def __delitem__(self, index):
            if index == 2:  # the first block would end now, and this one would no longer be here
                found.set()
                gone.wait(0.2)
            super().__delitem__(index)

    monkeypatch.setattr(dispatch, "_blocks", Blocks([[""]]))
    first, second = fastattn.use_backend("reference"), fastattn.use_backend("cpu")
    first.__enter__()
    second.__enter__()
    thread = threading.Thread(target=second.__exit__, args=(None, None, None))
    thread.start()
    assert found.wait(60)
    first.__exit__(None, None, None)
    gone.set()
    thread.join()
    assert dispatch._blocks == [[""]] and dispatch.forced == ""
