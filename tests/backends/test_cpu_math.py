"""The vector functions of csrc/cpu/simd.h, through the kernels that use them, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastattn.backends import cpu
from fastattn.biases.lowered import NO_BIAS
from fastattn.masks.lowered import LoweredMask

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))
ISAS = [] if cpu.unavailable_reason() else cpu.available_isas()


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))


def gelu_tanh_inner(x: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * normal_cdf(x),
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * gelu_tanh_inner(x)),
    "silu": lambda x: x * torch.sigmoid(x),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: x.clamp(min=0).square(),
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.use_isa(request.param):
        yield request.param


def grid() -> Tensor:
    """Every scale from 2^-40 to 80, both signs, zero and a dense middle."""
    scales = torch.logspace(-40, math.log2(80), 4001, base=2, dtype=torch.float64)
    return torch.cat([-scales, scales, torch.linspace(-15, 15, 30001, dtype=torch.float64), torch.zeros(1)]).float()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_have_full_float32_accuracy(isa: str, activation: str) -> None:
    x = grid()
    y, _ = cpu.linear_act_forward(x.view(-1, 1), torch.ones(1, 1), None, activation, False)
    truth = ACTIVATIONS[activation](x.double())
    error = (y.view(-1).double() - truth).abs()
    assert torch.isfinite(y).all()
    # 4 roundings of the result, plus a few of the argument: |x act'(x)| is how far an argument's own rounding carries.
    bound = 2**-24 * (4 * truth.abs() + 4 * x.double().abs().clamp(max=1)) + 1e-37
    worst = (error / bound).argmax()
    assert (error <= bound).all(), f"x={x[worst]:.9g}: {y.view(-1)[worst]:.9g} against {truth[worst]:.17g}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_have_full_float32_accuracy(isa: str, activation: str) -> None:
    x = grid()
    leaf = x.double().requires_grad_()
    (truth,) = torch.autograd.grad(ACTIVATIONS[activation](leaf).sum(), leaf)
    weight, grad = torch.ones(1, 1), torch.ones(len(x), 1)
    dx, _, _ = cpu.linear_act_backward(grad, x.view(-1, 1), weight, x.view(-1, 1), activation, True, False, False)
    error = (dx.view(-1).double() - truth).abs()
    kinks = (x == 0) & torch.tensor(activation == "relu")  # torch's clamp has derivative 1 at 0, relu has 0
    worst = error.masked_fill(kinks, 0).argmax()
    scale = truth.abs().clamp(min=1)
    assert (error <= 2**-24 * 8 * scale)[~kinks].all(), f"x={x[worst]:.9g}: {dx[worst].item()} against {truth[worst]}"


def test_softmax_of_one_score_against_zero_is_the_logistic_function(isa: str) -> None:
    """exp2 as attention uses it: two keys with scores x and 0, values 1 and 0."""
    x = torch.linspace(-100, 100, 20001)
    q = x.view(1, 1, -1, 1)
    k = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    out, lse = cpu.attention_forward(q, k, k, LoweredMask(), NO_BIAS, None, None, None, 1.0, 0.0, 0.0)
    truth = torch.sigmoid(x.double())
    relative = ((out.view(-1).double() - truth) / truth)[x > -87].abs().max().item()
    # An argument of 80 carries its own rounding: 80 * 2^-24.
    assert relative < 100 * 2**-24
    assert (out.view(-1).double() - truth).abs().max() < 4 * 2**-24
    assert ((lse.view(-1).double() - torch.nn.functional.softplus(x.double())).abs() <= 2**-22 * (1 + x.abs())).all()


def test_the_logarithm_of_a_sum_is_as_good_as_a_rounded_one(isa: str) -> None:
    """Keys of score 0, of which query i sees i + 1: an lse of log(i + 1). Of one key it is the score, bit for bit."""
    keys = 5000
    q, k = torch.zeros(1, 1, keys, 1), torch.zeros(1, 1, keys, 1)
    options = (NO_BIAS, None, None, None, 1.0, 0.0, 0.0)
    _, lse = cpu.attention_forward(q, k, k, LoweredMask(band_right=0), *options)
    truth = torch.arange(1, keys + 1, dtype=torch.float64).log()
    error = (lse.view(-1).double() - truth).abs()
    assert (error <= 2**-24 * 3 * truth).all(), (error / truth.clamp(min=1e-30)).max()
    for score in (-math.inf, math.inf, math.nan, 3e38, -1e-30):
        _, one = cpu.attention_forward(
            torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), score), k[:, :, :1], LoweredMask(), *options
        )
        # -inf and +inf are no scores a softmax has: 0 keys seen, or NaN
        expected = score if math.isfinite(score) or score == -math.inf else math.nan
        assert torch.equal(one.view(()).nan_to_num(7.0), torch.tensor(expected).nan_to_num(7.0)), (score, one)


def test_softcap_follows_tanh(isa: str) -> None:
    x = torch.cat([torch.linspace(-40, 40, 4001), torch.logspace(-30, 0, 200, base=2)])
    q, k = x.view(1, 1, -1, 1), torch.tensor([1.0]).view(1, 1, 1, 1)
    _, lse = cpu.attention_forward(q, k, k, LoweredMask(), NO_BIAS, None, None, None, 1.0, 3.0, 0.0)
    truth = 3 * torch.tanh(x.double() / 3)  # one key: the log-sum-exp is its score
    error = (lse.view(-1).double() - truth).abs()
    assert (error <= 2**-24 * 6 * truth.abs() + 1e-37).all(), (error / truth.abs().clamp(min=1e-30)).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_conversions_are_those_of_torch(isa: str, dtype: torch.dtype) -> None:
    """Every 16-bit pattern in, and float32 values around every rounding boundary out."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[torch.isfinite(every)]
    ones, rows = torch.ones(1, 1, dtype=dtype), finite.view(-1, 1)
    y, _ = cpu.linear_act_forward(rows, ones, None, "none", False)
    subnormal = rows.float().abs() < torch.finfo(dtype).tiny
    # The bfloat16 units of the processor take subnormals as zero.
    keeps = torch.ones_like(subnormal) if dtype is torch.float16 or isa not in ("amx", "avx512bf16") else ~subnormal
    assert torch.equal(y[keeps], rows[keeps])
    neighbours = finite.float().unsqueeze(1) * (1 + torch.arange(-3, 4) * 2.0**-10)
    bias = neighbours.flatten()
    bias = bias[torch.isfinite(bias)]
    zero = torch.zeros(1, 1, dtype=dtype)
    rounded, _ = cpu.linear_act_forward(zero, zero.expand(len(bias), 1).contiguous(), bias, "none", False)
    assert torch.equal(rounded.view(-1), bias.to(dtype))
