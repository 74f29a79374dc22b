"""Eager calls go straight to an operator's implementation only where nobody could tell."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.ops import attention, library


class Recorder(TorchDispatchMode):
    """Names of the operators that pass the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _calls(x: torch.Tensor) -> dict[str, object]:
    heads = x.view(1, 2, 3, 4)
    weight = torch.eye(12)
    return {
        "attention_forward": lambda: fastattn.attention(heads, heads, heads),
        "norm_forward": lambda: fastattn.layer_norm(x),
        "linear_act_forward": lambda: fastattn.linear_act(x, weight, None, "relu"),
        "ffn_forward": lambda: fastattn.ffn(x, weight, None, weight, None),
        "gated_ffn_forward": lambda: fastattn.gated_ffn(x, weight, weight, weight),
    }


@pytest.fixture
def straight(monkeypatch):
    """Names of the implementations that were called without the dispatcher."""
    names: list[str] = []
    for operator, implementation in list(library._IMPLEMENTATIONS.items()):
        name = operator._schema.name.removeprefix("fastattn::")

        def spy(*args, name=name, implementation=implementation):
            names.append(name)
            return implementation(*args)

        monkeypatch.setitem(library._IMPLEMENTATIONS, operator, spy)

    def spy_on_attention(*args):
        if sys._getframe(1).f_code is attention.attend.__code__:  # not the operator's implementation
            names.append("attention_forward")
        return run_forward(*args)

    run_forward = attention.run_forward
    monkeypatch.setattr(attention, "run_forward", spy_on_attention)
    return names


def test_plain_calls_skip_the_dispatcher(straight, long_way):
    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    for name, run in _calls(x).items():
        run()
        assert straight.pop() == name and not straight


def test_gradients_skip_it_too_and_agree(straight):
    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for name, run in _calls(x).items():
        (grad,) = torch.autograd.grad(run().square().sum(), x)
        assert straight == [name, name.replace("forward", "backward")]
        straight.clear()
        with Recorder():  # which sends both through the dispatcher
            (watched,) = torch.autograd.grad(run().square().sum(), x)
        assert torch.equal(grad, watched) and not straight


def test_a_dispatch_mode_sees_the_operator(straight):
    x = torch.randn(2, 12)
    for name, run in _calls(x).items():
        with Recorder() as recorder:
            run()
        assert f"fastattn.{name}.default" in recorder.names and not straight


def test_a_profiler_sees_the_operator():
    x = torch.randn(2, 12)
    for name, run in _calls(x).items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        assert f"fastattn::{name}" in {event.key for event in profile.key_averages()}


def test_a_tracer_records_the_operator():
    x = torch.randn(2, 12)
    traced = torch.jit.trace(lambda x: fastattn.layer_norm(x), (x,))
    assert "fastattn::norm(" in str(traced.graph)


def test_other_tensors_pass_the_dispatcher(straight):
    class Other(torch.Tensor):
        pass

    x = torch.randn(2, 12)
    assert type(fastattn.layer_norm(x.as_subclass(Other))) is Other
    assert fastattn.layer_norm(x.to("meta")).is_meta
    assert not straight


def test_negative_views_are_resolved(straight, long_way):
    x = torch.randn(2, 12, dtype=torch.complex64).conj().imag  # its sign is a bit that data_ptr knows nothing of
    assert x.is_neg()
    assert torch.equal(fastattn.layer_norm(x), fastattn.layer_norm(x.resolve_neg()))
    assert straight == ["norm_forward"]


def test_integers_stand_for_floats():
    """The dispatcher would have made floats of them."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 3, 4, generator=g) for _ in range(3))
    assert torch.equal(
        fastattn.attention(q, k, v, scale=1, softcap=2), fastattn.attention(q, k, v, scale=1.0, softcap=2.0)
    )
    assert torch.equal(fastattn.rms_norm(q, v[0, 0, 0], 1, offset=1), fastattn.rms_norm(q, v[0, 0, 0], 1.0, offset=1.0))
