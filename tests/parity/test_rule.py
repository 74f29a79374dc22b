"""The parity rule itself: it passes what is right and catches planted faults."""

from __future__ import annotations

import math

import pytest
import torch

from fastattn import functional
from fastattn.masks import Causal, KeyLengths, SlidingWindow
from fastattn.parity import (
    Conditions,
    check_attention,
    check_ffn,
    check_gated_ffn,
    check_linear_act,
    check_mask_histogram,
    check_norm,
    failures,
    parity,
)
from fastattn.parity.bound import unit_roundoff
from fastattn.parity.eager import eager_linear_act

REAL_ATTENTION = functional.attention
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _qkv(dtype=torch.float32, batch=2, heads=2, length=37, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, length, dim, generator=generator).to(dtype) for _ in range(3))


def _plant(monkeypatch, wrong):
    """Replaces the attention under test; `wrong(real, q, k, v, **options)` calls the real one."""
    monkeypatch.setattr(functional, "attention", lambda q, k, v, **o: wrong(REAL_ATTENTION, q, k, v, **o))


def _failed(rows):
    return {row.name for row in rows if not row.passed}


def test_bound_is_the_rule_to_the_letter():
    ref = torch.tensor([[1.0, -4.0], [0.5, 0.25]], dtype=torch.float64)
    eager = ref + torch.tensor([[3e-4, 0.0], [0.0, 1e-4]], dtype=torch.float64)
    magnitude = torch.tensor([[8.0, 2.0], [1.0, 3.0]])
    result = (ref + 1e-3).float()
    u = 2.0**-24
    whole = parity("x", result, ref, eager, magnitude)
    assert whole.bound == pytest.approx(2 * 3e-4 + 2 * u * 4.0 + 2**-20 * 8.0, rel=1e-9)
    assert whole.worst_ratio == pytest.approx(whole.error / whole.bound) and not whole.passed
    grouped = parity("x", result, ref, eager, magnitude, group_dims=1)
    assert grouped.bound == pytest.approx(2 * 1e-4 + 2 * u * 0.5 + 2**-20 * 3.0, rel=1e-9)
    assert "[1, " in grouped.where  # the second group has the tighter bound


def test_unit_roundoffs():
    assert [unit_roundoff(d) for d in DTYPES] == [2.0**-24, 2.0**-8, 2.0**-11]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_never_passes_unless_the_truth_is(bad):
    ref = torch.ones(3, dtype=torch.float64)
    result = torch.tensor([1.0, bad, 1.0])
    assert not parity("x", result, ref, ref, ref).passed
    # nor does an eager result that is NaN or infinite buy a bound
    assert not parity("x", result, ref, torch.tensor([1.0, bad, 1.0]).double(), ref).passed
    wanted = torch.tensor([1.0, bad, 1.0], dtype=torch.float64)
    assert parity("x", result, wanted, wanted, ref).passed == (not math.isnan(bad))


def test_a_wrong_shape_and_a_zero_bound_fail():
    assert "shape" in parity("x", torch.ones(2), torch.ones(3), torch.ones(3), torch.ones(3)).where
    zero = torch.zeros(2, dtype=torch.float64)
    assert parity("x", torch.zeros(2), zero, zero, zero).passed
    assert not parity("x", torch.full((2,), 1e-30), zero, zero, zero).passed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [None, Causal(), KeyLengths([20, 0])])
def test_the_reference_backend_passes(dtype, mask):
    rows = check_attention(*_qkv(dtype), backend="reference", mask=mask, softcap=20.0)
    assert not failures(rows), failures(rows)
    assert {"out", "lse", "dq", "dk", "dv", "dq * 2^-12", "guards", "layout"} <= {row.name for row in rows}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_that_is_wrong_by_a_percent_is_caught(monkeypatch, dtype):
    def wrong(real, q, k, v, scale=None, **options):
        return real(q, k, v, scale=1.01 * q.size(-1) ** -0.5, **options)

    _plant(monkeypatch, wrong)
    assert {"lse", "dq"} <= _failed(check_attention(*_qkv(dtype, dim=64), backend="reference"))


def test_natural_and_binary_logarithm_are_told_apart(monkeypatch):
    def wrong(real, q, k, v, **options):
        out, lse = real(q, k, v, **options)
        return out, lse * math.log2(math.e)

    _plant(monkeypatch, wrong)
    assert "lse" in _failed(check_attention(*_qkv(), backend="reference"))


def test_one_nan_in_one_gradient_is_caught(monkeypatch):
    class Nan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[0, 0, -1, -1] = math.nan
            return grad

    _plant(monkeypatch, lambda real, q, k, v, **o: real(q, Nan.apply(k), v, **o))
    assert {"dk", "dk * 2^-12"} == _failed(check_attention(*_qkv(), backend="reference")) - {"layout"}


def test_a_backward_that_flushes_small_gradients_is_caught_by_the_second_factor_alone(monkeypatch):
    class Flush(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.where(grad.abs() < 1e-4, 0.0, grad)

    def wrong(real, q, k, v, **options):
        return real(Flush.apply(q), k, v, **options)

    _plant(monkeypatch, wrong)
    failed = _failed(check_attention(*_qkv(length=9), backend="reference"))
    assert "dq * 2^-12" in failed and "dk * 2^-12" not in failed


@pytest.mark.parametrize("where", [-1, 1])
def test_reading_past_either_end_of_a_tensor_is_caught(monkeypatch, where):
    def wrong(real, q, k, v, **options):
        shifted = v.detach().as_strided(v.shape, v.stride(), v.storage_offset() + where)
        return real(q, k, shifted, **options)

    _plant(monkeypatch, wrong)
    rows = check_attention(*_qkv(), backend="reference", conditions=Conditions(grad=False))
    assert any("nan" in row.where for row in rows if row.name == "out"), rows


def test_writing_into_an_input_or_its_guard_band_is_caught(monkeypatch):
    def wrong(real, q, k, v, **options):
        found = real(q, k, v, **options)
        k.detach().as_strided((1,), (1,), k.storage_offset() - 3).fill_(7.0)
        return found

    _plant(monkeypatch, wrong)
    rows = check_attention(*_qkv(), backend="reference", conditions=Conditions(grad=False))
    assert _failed(rows) == {"guards"} and "k" in next(r.where for r in rows if r.name == "guards")


def test_a_wrong_reference_does_not_go_unseen(monkeypatch):
    from fastattn import reference

    real = reference.attention
    monkeypatch.setattr(reference, "attention", lambda *a, **o: real(*a, **{**o, "scale": 0.3}))
    _plant(monkeypatch, lambda attention, *a, **o: attention(*a, **{**o, "scale": 0.3}))
    assert "float64 truths agree" in _failed(check_attention(*_qkv(), backend="reference"))


def test_keys_that_no_query_sees_may_hold_nan():
    q, k, v = _qkv()
    k[0, :, 30:], v[0, :, 30:] = math.nan, math.inf
    k[1, :, 10:], v[1, :, 10:] = math.inf, math.nan
    rows = check_attention(q, k, v, backend="reference", mask=KeyLengths([30, 10]))
    assert not failures(rows), failures(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 50), (50, 50, 1), (33, 70, 2)])
def test_the_histogram_passes_what_is_right(dtype, shape):
    len_q, len_k, group = shape
    for mask in (Causal(), Causal("top-left"), SlidingWindow(3, 5) & KeyLengths([len_k - 2, 0])):
        rows = check_mask_histogram(mask, 2, 2 * group, 2, len_q, len_k, dtype, "reference")
        assert not failures(rows), failures(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("meant", "done"),
    [
        (Causal(), SlidingWindow(None, 1)),
        (Causal(), Causal("top-left")),
        (SlidingWindow(8, 3), SlidingWindow(7, 3)),
        (KeyLengths([40, 17]), KeyLengths([40, 18])),
    ],
)
def test_the_histogram_catches_an_off_by_one(monkeypatch, dtype, meant, done):
    def wrong(real, q, k, v, mask=None, **options):
        return real(q, k, v, mask=done, **options)

    _plant(monkeypatch, wrong)
    failed = _failed(check_mask_histogram(meant, 2, 2, 2, 37, 64, dtype, "reference"))
    assert "visible keys (low digit)" in failed and "seeing queries (low digit)" in failed, failed


def test_the_histogram_catches_a_key_swapped_for_one_a_period_away(monkeypatch):
    meant, done = torch.zeros(1, 1, 4, 128, dtype=torch.bool), torch.zeros(1, 1, 4, 128, dtype=torch.bool)
    meant[..., 5], done[..., 5 + 32] = True, True
    _plant(monkeypatch, lambda real, q, k, v, mask=None, **o: real(q, k, v, mask=done, **o))
    rows = check_mask_histogram(meant, 1, 1, 1, 4, 128, torch.float32, "reference", grad=False)
    assert _failed(rows) == {"visible keys (high digit)"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_without_eps_is_caught(monkeypatch, dtype, kind):
    generator = torch.Generator().manual_seed(1)
    x, weight = (1e-2 * torch.randn(9, 48, generator=generator)).to(dtype), torch.ones(48, dtype=dtype)
    assert not failures(check_norm(x, weight, backend="reference", kind=kind, eps=1e-5))
    name = "layer_norm" if kind == "layer" else "rms_norm"
    real = getattr(functional, name)

    def wrong(*args, **options):
        return real(*(1e-12 if isinstance(a, float) else a for a in args), **options)

    monkeypatch.setattr(functional, name, wrong)
    assert "y" in _failed(check_norm(x, weight, backend="reference", kind=kind, eps=1e-5))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "relu2"])
def test_linears_pass_and_a_neighbouring_activation_is_caught(monkeypatch, activation):
    generator = torch.Generator().manual_seed(2)
    x, w, v = (torch.randn(n, 24, generator=generator) for n in (7, 40, 40))
    down, b = torch.randn(24, 40, generator=generator) / 6, torch.randn(40, generator=generator)
    for rows in (
        check_linear_act(x, w, b, activation, backend="reference"),
        check_ffn(x, w, b, down, None, activation, backend="reference"),
        check_gated_ffn(x, w, v, down, activation, b_up=b, backend="reference"),
    ):
        assert not failures(rows), failures(rows)
    other = "gelu_tanh" if activation == "gelu" else "gelu"
    real = functional.linear_act
    monkeypatch.setattr(functional, "linear_act", lambda x, w, b, _: real(x, w, b, other))
    assert {"y", "dx", "dweight"} <= _failed(check_linear_act(x, w, b, activation, backend="reference"))


def test_the_yardstick_is_taken_of_tensors_without_gaps(monkeypatch):
    """torch's bfloat16 products by AMX read what lies behind a row of an odd number of elements, which may be NaN."""
    seen = []

    def watched(x, weight, bias, activation):
        seen.append((x.dtype, x.is_contiguous() and weight.is_contiguous()))
        return eager_linear_act(x, weight, bias, activation)

    monkeypatch.setattr("fastattn.parity.rule.eager_linear_act", watched)
    generator = torch.Generator().manual_seed(0)
    wide = (torch.full((rows, 40), math.nan, dtype=torch.bfloat16) for rows in (7, 5))
    x, weight = (t[:, :33].copy_(torch.randn(len(t), 33, generator=generator)) for t in wide)
    assert not failures(check_linear_act(x, weight, None, None, backend="reference"))
    assert (torch.bfloat16, True) in seen and (torch.bfloat16, False) not in seen
