"""Norms behind flags, with a bias, in other orders of their factors, and as calls of torch's functions."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.swap import plan, swap

WIDTH = 24
HALVES = (torch.float32, torch.bfloat16)


class Norm(nn.Module):
    """Everything that the forwards below use."""

    eps = 1e-5
    with_scale = True

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.rand(WIDTH, generator=draw) + 0.5)
        self.bias: nn.Parameter | None = nn.Parameter(torch.rand(WIDTH, generator=draw) - 0.5)
        self.shape, self.width = (WIDTH,), WIDTH


class Gemma4(Norm):
    def _norm(self, hidden_states):
        return hidden_states * torch.pow(hidden_states.pow(2).mean(-1, keepdim=True) + self.eps, -0.5)

    def forward(self, hidden_states):
        normed = self._norm(hidden_states.float())
        if self.with_scale:
            normed = normed * self.weight.float()
        return normed.type_as(hidden_states)


class Gemma4WithoutScale(Gemma4):
    with_scale = False


class NegatedFlag(Norm):
    def forward(self, x):
        inverse = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x.float() * inverse).to(x.dtype) if not self.with_scale else self.weight * (x * inverse).to(x.dtype)


class DeepseekV4(Norm):
    def forward(self, x):
        return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps).to(x.dtype)


class ImageGPT(Norm):
    def forward(self, x):
        return x / torch.sqrt(torch.mean(torch.square(x), axis=-1, keepdim=True) + self.eps) * self.weight


class WeightFirst(Norm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Deberta(Norm):
    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        hidden_states = hidden_states.float()
        mean = hidden_states.mean(-1, keepdim=True)
        variance = (hidden_states - mean).pow(2).mean(-1, keepdim=True)
        hidden_states = (hidden_states - mean) / torch.sqrt(variance + self.eps)
        return self.weight * hidden_states.to(dtype) + self.bias


class ByHand(Norm):
    def forward(self, x):
        mean = x.mean(dim=-1, keepdim=True)
        variance = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.bias + self.weight * (x - mean) / torch.sqrt(variance + self.eps)


class Corrected(Norm):
    def forward(self, x):
        wide = x.float()
        centred = wide - wide.mean(-1, keepdim=True)
        normed = centred * torch.rsqrt(torch.var(wide, -1, correction=0, keepdim=True) + 1e-6)
        return (normed * self.weight.float() + self.bias.float()).to(x.dtype)


class ByKeywords(Norm):
    def forward(self, x):
        variance = torch.var(x, dim=-1, correction=0, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + self.eps) * self.weight


class NanoGPT(Norm):
    def forward(self, input):
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class Nemotron(Norm):
    def forward(self, x):
        return F.layer_norm(x, self.shape, self.weight + 1, self.bias, self.eps)


class OLMo(Norm):
    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        return F.layer_norm(hidden_states.to(dtype=torch.float32), self.shape, None, None, eps=1e-5).to(dtype)


class Float32(Norm):
    def forward(self, x):
        return F.layer_norm(x.float(), (self.width,), self.weight.float(), self.bias.float(), self.eps).type_as(x)


class FunctionOfRMS(Norm):
    def forward(self, x):
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


class FunctionOfFloat32(Norm):
    def forward(self, x):
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype)


class XTransformers(Norm):
    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias)


class FunctionOfWide(Norm):
    def forward(self, x):
        wide = x.float()
        return F.rms_norm(wide, wide.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


SPELLED = (
    Gemma4,
    Gemma4WithoutScale,
    NegatedFlag,
    DeepseekV4,
    ImageGPT,
    WeightFirst,
    Deberta,
    ByHand,
    Corrected,
    ByKeywords,
)
FUNCTIONS = (NanoGPT, Nemotron, OLMo, Float32, XTransformers, FunctionOfRMS, FunctionOfFloat32, FunctionOfWide)
LAYER_NORMS = (NanoGPT, Nemotron, OLMo, Float32, XTransformers)


def pair(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A swapped copy, every row of which is swapped, and the module."""
    swapped = copy.deepcopy(module)
    assert {row.action for row in swap(swapped).rows} == {"swapped"}
    return swapped, module


def results(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    """The output for an input that is a half exactly, and the gradients of input and parameters."""
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype).requires_grad_()
    y = module(x)
    seen = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    (y * seen).sum().backward()
    return [y.detach(), x.grad, *(each.grad for each in module.parameters() if each.grad is not None)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("norm_class", (*SPELLED, *FUNCTIONS))
def test_is_as_near_to_the_exact_one_as_the_original(norm_class, dtype: torch.dtype) -> None:
    swapped, original = pair(norm_class().to(dtype))
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.copy_(parameter.bfloat16())  # the same number in all dtypes
        swapped.load_state_dict(original.state_dict())
    exact = results(copy.deepcopy(original).float(), torch.float32)
    for found, eager, true in zip(results(swapped, dtype), results(original, dtype), exact, strict=True):
        assert found.dtype == eager.dtype == dtype
        error, bound, size = (float(each.abs().max()) for each in (found.float() - true, eager.float() - true, true))
        assert error <= 2 * bound + 2 * torch.finfo(dtype).eps * size


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("norm_class", (*SPELLED, *FUNCTIONS))
def test_a_float32_weight_beside_halves_gives_the_originals_dtype(norm_class) -> None:
    original = norm_class()
    swapped = copy.deepcopy(original)
    report = swap(swapped)
    x = torch.randn(4, WIDTH).bfloat16()
    with report.counting():
        found = swapped(x)
    expected = original(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), atol=3e-2, rtol=3e-2)
    assert bool(report.rows[0].fallbacks) == (norm_class is FunctionOfRMS)  # which torch does op by op


@pytest.mark.parametrize("norm_class", (*SPELLED, *FUNCTIONS))
def test_is_undone_and_compiled_as_one_graph(norm_class) -> None:
    module, x = norm_class().bfloat16(), torch.randn(4, WIDTH).bfloat16()
    expected = module(x)
    report = swap(module)
    found = module(x)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), found)
    report.undo()
    assert type(module) is norm_class
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("norm_class", LAYER_NORMS)
def test_float32_inference_on_a_cpu_is_left_to_torch(norm_class) -> None:
    module, x = norm_class(), torch.randn(4, WIDTH)
    expected = module(x)
    report = swap(module)
    with torch.no_grad(), report.counting():
        assert torch.equal(module(x), expected)
    (row,) = report.rows
    assert not row.fallbacks and list(row.choices.values()) == [1]


class Affine(Norm):
    def forward(self, input):
        return F.layer_norm(input, self.shape, self.weight, self.bias, 1e-5)


@pytest.mark.parametrize("absent", [("bias",), ("weight",), ("weight", "bias")])
def test_a_function_without_weight_or_bias(absent: tuple[str, ...]) -> None:
    module = Affine().bfloat16()
    for name in absent:
        setattr(module, name, None)
    swapped, original = pair(module)
    x = torch.randn(4, WIDTH).bfloat16()
    torch.testing.assert_close(swapped(x), original(x), atol=2e-2, rtol=2e-2)


def test_flags_are_looked_at_in_every_call() -> None:
    module = Gemma4()
    x = torch.randn(2, WIDTH)
    with_scale = module(x)
    report = swap(module)
    assert report.rows[0].kernel == "rms_norm"
    with report.counting():
        torch.testing.assert_close(module(x), with_scale)
        module.with_scale = False
        torch.testing.assert_close(module(x), with_scale / module.weight)
        module.with_scale = 1  # true, but no bool: the original asks it
        torch.testing.assert_close(module(x), with_scale)
    assert report.rows[0].fallbacks == {"its flags are those of another branch": 1}


def test_a_branch_that_is_no_norm_is_left() -> None:
    class Halved(Norm):
        def forward(self, x):
            y = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
            return y if self.with_scale else y / 2

    module = Halved()
    assert [row.action for row in plan(module).rows] == ["swap"]
    module.with_scale = False
    assert not [row for row in plan(module).rows if row.action == "swap"]


def test_shapes_that_are_not_the_last_dimension() -> None:
    class TwoDimensions(Norm):
        def forward(self, x):
            return F.layer_norm(x, self.shape, None, None, self.eps)

    module = TwoDimensions().bfloat16()
    module.shape = (5, WIDTH)
    (row,) = plan(module).rows
    assert (row.action, row.reason) == ("left", "it normalises over 2 dimensions")
    module.shape = (WIDTH,)
    report = swap(module)
    module.shape = (5, WIDTH)
    x = torch.randn(5000, 5, WIDTH).bfloat16()
    with report.counting():
        assert torch.equal(module(x), F.layer_norm(x, (5, WIDTH)))
    assert report.rows[0].fallbacks == {"it does not normalise over the last dimension alone": 1}


def test_what_torch_refuses_it_still_refuses() -> None:
    for module, x in (
        (NanoGPT().bfloat16(), torch.randn(2, WIDTH).half()),
        (NanoGPT().bfloat16(), torch.randn(2, WIDTH + 1).bfloat16()),
        (FunctionOfRMS(), torch.randn(2, WIDTH + 1)),
    ):
        with pytest.raises(RuntimeError) as raised:
            module(x)
        swap(module)
        with pytest.raises(RuntimeError) as found:
            module(x)
        assert str(found.value) == str(raised.value)


def test_a_number_for_a_weight_is_left() -> None:
    module = WeightFirst()
    del module.weight
    module.weight = 2.0
    (row,) = plan(module).rows
    assert (row.action, row.reason) == ("left", "its weight is a float")


# ---- what only looks like one ----------------------------------------------------------------------------------------


class UnbiasedVariance(Norm):
    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + self.eps) * self.weight


class VarianceWithoutDim(Norm):
    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False) + self.eps) * self.weight


class CorrectedByTwo(Norm):
    def forward(self, x):
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, correction=2) + self.eps)


class MeanOfAnotherAxis(Norm):
    def forward(self, x):
        z = x - x.mean(0, keepdim=True)
        return z / torch.sqrt(z.pow(2).mean(-1, keepdim=True) + self.eps)


class VarianceOfAnother(Norm):
    def forward(self, x):
        z = x - x.mean(-1, keepdim=True)
        return z / torch.sqrt(self.weight.var(-1, keepdim=True, unbiased=False) + self.eps)


class VarianceNotCentred(Norm):
    def forward(self, x):
        return x / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + self.eps)


class StandardDeviation(Norm):
    def forward(self, x):
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.weight * (x - mean) / (std + self.eps) + self.bias


class TwoWeights(Norm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.bias


class DividedByTheWeight(Norm):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) / self.weight


class Squared(Norm):
    def forward(self, x):
        return x * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class RootTwice(Norm):
    def forward(self, x):
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * inverse * inverse


class MultipliedByTheRoot(Norm):
    def forward(self, x):
        return x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Inverse(Norm):
    def forward(self, x):
        return torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) / x


class BiasBeforeTheWeight(Norm):
    def forward(self, x):
        z = x - x.mean(-1, keepdim=True)
        return self.weight * (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + self.eps) + self.bias)


class BiasScaled(Norm):
    def forward(self, x):
        z = x - x.mean(-1, keepdim=True)
        return torch.add(
            self.weight * (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + self.eps)), self.bias, alpha=2
        )


class BiasPlusOne(Norm):
    def forward(self, x):
        z = x - x.mean(-1, keepdim=True)
        return self.weight * (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + self.eps)) + (1 + self.bias)


class RMSWithBias(Norm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)) + self.bias


class ResidualInside(Norm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)) + x


class SumOfSquares(Norm):
    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) + self.eps)).type_as(x)


class InverseAlone(Norm):
    def forward(self, x):
        return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps).to(x.dtype)


class WideWeightStays(Norm):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.float()


class OnePlusTwice(Norm):
    def forward(self, x):
        return (1 + (1 + self.weight)) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class FunctionStaysWide(Norm):
    def forward(self, x):
        return F.layer_norm(x.float(), self.shape, None, None, self.eps)


class FunctionOfTwice(Norm):
    def forward(self, x):
        return F.layer_norm(x + x, self.shape, self.weight, self.bias, self.eps)


class FunctionByBias(Norm):
    def forward(self, x):
        return F.layer_norm(x, self.shape, self.weight, self.bias + 1, self.eps)


class FunctionOfFirst(Norm):
    def forward(self, x):
        return F.rms_norm(x, (x.size(0),), None, self.eps)


class FunctionWithoutEps(Norm):
    def forward(self, x):
        return F.rms_norm(x.float(), self.shape).to(x.dtype)


class Groups(Norm):
    def forward(self, x):
        return F.group_norm(x, 2, self.weight, self.bias, self.eps)


@pytest.mark.parametrize(
    "norm_class",
    [
        UnbiasedVariance,
        VarianceWithoutDim,
        CorrectedByTwo,
        MeanOfAnotherAxis,
        VarianceOfAnother,
        VarianceNotCentred,
        StandardDeviation,
        TwoWeights,
        DividedByTheWeight,
        Squared,
        RootTwice,
        MultipliedByTheRoot,
        Inverse,
        BiasBeforeTheWeight,
        BiasScaled,
        BiasPlusOne,
        RMSWithBias,
        ResidualInside,
        SumOfSquares,
        InverseAlone,
        WideWeightStays,
        OnePlusTwice,
        FunctionStaysWide,
        FunctionOfTwice,
        FunctionByBias,
        FunctionOfFirst,
        FunctionWithoutEps,
        Groups,
    ],
)
def test_what_only_looks_like_one_is_left(norm_class) -> None:
    assert not [row for row in plan(norm_class()).rows if row.action == "swap"]
