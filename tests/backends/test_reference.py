"""The reference backend: its explicit gradients against autograd over the reference, and the protocol's promises."""

from __future__ import annotations

import inspect

import pytest
import torch

from fastattn.backends import protocol, reference
from fastattn.biases.lowered import NO_BIAS, LoweredBias
from fastattn.masks import Causal, LoweredMask
from fastattn.problems import NormProblem
from fastattn.reference import attention


def protocol_functions():
    return [name for name, value in vars(protocol.Backend).items() if inspect.isfunction(value) and name[0] != "_"]


@pytest.mark.parametrize("name", ["reference", "cpu", "triton", "cuda"])
def test_every_backend_has_the_functions_of_the_protocol_with_their_arguments(name):
    module = pytest.importorskip(f"fastattn.backends.{name}")
    assert name == module.NAME
    for function in protocol_functions():
        if name in ("triton", "cuda") and not hasattr(module, function):
            continue  # they refuse the problems of the operators that they lack
        wanted = list(inspect.signature(getattr(protocol.Backend, function)).parameters)[1:]
        assert list(inspect.signature(getattr(module, function)).parameters) == wanted, function


def test_it_runs_everything_everywhere():
    assert reference.unavailable_reason() is None
    assert reference.not_supported_reasons(NormProblem("cuda", torch.float64, "rms", 1, 1)) == []


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_attention_gradients_equal_autograd(softcap, with_sinks, dropout_p):
    def r(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    q, k, v, bias = r(2, 4, 5, 8), r(2, 2, 7, 8), r(2, 2, 7, 6), r(1, 4, 1, 7)
    sinks = r(4) if with_sinks else None
    seed = torch.tensor([3]) if dropout_p else None
    mask = Causal("top-left").lower(2, 4, 5, 7, q.device)._replace(key_start=torch.tensor([0, 2], dtype=torch.int32))
    seen = Causal("top-left").to_dense(2, 4, 5, 7) & (torch.arange(7) >= torch.tensor([0, 2]).view(2, 1, 1, 1))
    out, lse = attention(
        q,
        k,
        v,
        mask=seen,
        bias=bias,
        scale=0.4,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=seed,
        return_lse=True,
    )
    shared = (mask, LoweredBias(bias), None, sinks, seed, 0.4, softcap, dropout_p)
    forward = reference.attention_forward(q, k, v, *shared)
    torch.testing.assert_close(forward[0], out)
    torch.testing.assert_close(forward[1], lse)
    finite = lse.isfinite()
    assert not finite.all()  # rows that see nothing are part of the test
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    inputs = [t for t in (q, k, v, bias, sinks) if t is not None]
    expected = torch.autograd.grad((out, lse[finite]), inputs, (grad_out, grad_lse[finite]))
    results = reference.attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, *shared, True, False, False, with_sinks, deterministic=True
    )
    results = (*results[:4], results[6])
    for result, truth in zip(results, expected, strict=False):
        torch.testing.assert_close(result, truth)
    assert results[4].shape == ((4,) if with_sinks else (0,))


def test_a_sink_far_above_every_score_leaves_the_lse_gradient_right():
    q = torch.randn(1, 1, 1, 4, dtype=torch.float64)
    sinks = torch.full((1,), 800.0, dtype=torch.float64)
    shared = (LoweredMask(), NO_BIAS, None, sinks, None, 1.0, 0.0, 0.0)
    out, lse = reference.attention_forward(q, q, q, *shared)
    dq = reference.attention_backward(
        torch.zeros_like(out), torch.ones_like(lse), q, q, q, out, lse, *shared, *[False] * 4, deterministic=False
    )[0]
    torch.testing.assert_close(dq, q)  # one key: lse = q . k, whose gradient is k


def test_what_is_not_asked_for_is_empty():
    x, w = torch.randn(2, 8), torch.randn(4, 8)
    assert reference.linear_act_forward(x, w, None, "none", True)[1].shape == (0,)
    assert reference.linear_act_forward(x, w, None, "relu", False)[1].shape == (0,)
    assert [t.shape for t in reference.linear_act_backward(torch.randn(2, 4), x, w, x, "none", False, True, False)] == [
        (0,),
        (4, 8),
        (0,),
    ]
    y, z, mean, rstd = reference.norm_forward(x, None, None, None, None, "rms", 1e-6, 0.0, 0.0, True)
    assert (y.shape, z.shape, mean.shape, rstd.shape) == ((2, 8), (0,), (0,), (2,))
    y, z, mean, rstd = reference.norm_forward(x, None, None, None, None, "layer", 1e-6, 0.0, 0.0, False)
    assert (y.shape, z.shape, mean.shape, rstd.shape) == ((2, 8), (0,), (0,), (0,))
