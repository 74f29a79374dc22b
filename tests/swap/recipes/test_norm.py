"""Norms that classes spell out themselves, in the ways that are about."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.swap import plan, swap

WIDTH = 24


class Norm(nn.Module):
    eps = 1e-5

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width, generator=torch.Generator().manual_seed(3)) + 0.5)


class Llama(Norm):
    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.eps)).to(dtype)


class WeightInside(Norm):
    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(torch.mean(wide.square(), dim=-1, keepdim=True) + 1e-6)
        return (wide * self.weight.float()).to(x.dtype)


class Gemma(Norm):
    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return (self._norm(x.float()) * (1.0 + self.weight.float())).type_as(x)


class LitGPT(Norm):
    def forward(self, x):
        return self.weight * self._norm(x.float()).type_as(x)

    def _norm(self, x):
        return x / torch.sqrt((x * x).mean(-1, True) + self.eps)


class Unwidened(Norm):
    def forward(self, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class NoWeight(Norm):
    def forward(self, x):
        wide = x.to(dtype=torch.float32)
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(dtype=x.dtype)


class Cohere(Norm):
    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        mean = hidden_states.mean(-1, keepdim=True)
        variance = (hidden_states - mean).pow(2).mean(-1, keepdim=True)
        hidden_states = (hidden_states - mean) * torch.rsqrt(variance + self.eps)
        return (self.weight.to(torch.float32) * hidden_states).to(dtype)


class CentredGemma(Norm):
    def forward(self, x):
        centred = x.float() - x.float().mean(-1, keepdim=True)
        return (
            centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight.float())
        ).to(x.dtype)


SPELLINGS = (Llama, WeightInside, Gemma, LitGPT, Unwidened, NoWeight, Cohere, CentredGemma)
spellings = pytest.mark.parametrize("norm_class", SPELLINGS)


def pair(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A swapped copy, every row of which is swapped, and the module."""
    swapped = copy.deepcopy(module)
    rows = swap(swapped).rows
    assert rows and {row.action for row in rows} <= {"swapped", "fused"}
    return swapped, module


@spellings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_equals_the_original(norm_class, dtype, weight_dtype) -> None:
    swapped, original = pair(norm_class().to(weight_dtype))
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, expected = swapped(x), original(x)
    exact = copy.deepcopy(original).double()(x.double()) if norm_class is Unwidened else original.float()(x.float())
    exact = exact.detach()
    assert found.dtype == expected.dtype
    error, bound = (float((each.detach().double() - exact).abs().max()) for each in (found, expected))
    assert error <= 1.01 * bound + 2e-6


@spellings
def test_gradients_equal_the_originals(norm_class) -> None:
    swapped, original = pair(norm_class())
    gradients = []
    for module in (swapped, original):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
        module(x).square().sum().backward()
        gradients.append([x.grad, module.weight.grad])
    for found, expected in zip(*gradients, strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@spellings
def test_the_call_by_name_and_a_wrong_call(norm_class) -> None:
    swapped, original = pair(norm_class())
    x = torch.randn(2, WIDTH)
    name = "hidden_states" if norm_class in (Llama, Cohere) else "x"
    torch.testing.assert_close(swapped(**{name: x}), original(x))
    for wrong in ({"args": (x, x)}, {"kwargs": {"z": x}}, {}):
        with pytest.raises(TypeError, match="forward"):
            swapped(*wrong.get("args", ()), **wrong.get("kwargs", {}))


class SumOfSquares(Norm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + self.eps)


class FirstAxis(Norm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + self.eps))


class Cubes(Norm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + self.eps))


class OfTheHalf(Norm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt((x / 2).pow(2).mean(-1, keepdim=True) + self.eps))


class EpsilonOutside(Norm):
    def forward(self, x):
        return self.weight * (x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) + self.eps))


class TwiceTheWeight(Norm):
    def forward(self, x):
        return (2.0 + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Shifted(Norm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)) + 1.0


class AddsMore(Norm):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True).add(self.eps, alpha=1e5)))


class Rounds(Norm):
    def forward(self, x):
        return self.weight * torch.div(x, (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt(), rounding_mode="floor")


class HalfCentred(Norm):
    def forward(self, x):
        x = x.sub(x.mean(-1, keepdim=True), alpha=0.5)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class StaysWide(Norm):
    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps))


@pytest.mark.parametrize(
    "norm_class",
    [
        SumOfSquares,
        FirstAxis,
        Cubes,
        OfTheHalf,
        EpsilonOutside,
        TwiceTheWeight,
        Shifted,
        AddsMore,
        Rounds,
        HalfCentred,
        StaysWide,
    ],
)
def test_what_only_looks_like_one_is_left(norm_class) -> None:
    assert not [row for row in plan(norm_class()).rows if row.action == "swap"]


def test_what_cannot_be_known_beforehand_falls_back_and_is_counted() -> None:
    module = Llama()
    x = torch.randn(2, WIDTH)
    expected = module(x)
    report = swap(module)
    module.eps = torch.tensor(1e-5)  # a plain attribute, no buffer
    with report.counting():
        torch.testing.assert_close(module(x), expected)
        assert module(x.double()).dtype == torch.float64
    assert dict(report.rows[0].fallbacks) == {"its eps is a Tensor": 1, "the input is float64": 1}
    module.eps = -1e-9
    with report.counting():
        module(x)
    assert dict(report.rows[0].fallbacks) == {"its eps is -1e-09": 1}
    module.weight = None
    module.eps = 1e-5
    with pytest.raises(TypeError):
        module(x)


@spellings
def test_the_result_lies_in_memory_as_the_input(norm_class) -> None:
    original = norm_class()
    swapped = copy.deepcopy(original)
    report = swap(swapped)
    x = torch.randn(2, 3, 5, WIDTH)
    for each, on_kernel in (
        (x.permute(2, 0, 1, 3), True),
        (x.transpose(0, 1), True),
        (x[:, ::2], True),
        (x[:, :, 1:4].transpose(0, 1), True),
        (torch.randn(2, 5, 2 * WIDTH)[..., 3 : 3 + WIDTH], True),  # half of a projection, as in latent attention
        (torch.randn(2, 5, 2 * WIDTH)[..., ::2], False),
        (x.transpose(-1, -2).contiguous().transpose(-1, -2), False),
        (x[:, :, :1].expand(2, 3, 5, WIDTH), False),
    ):
        with report.counting():
            found = swapped(each)
        expected = original(each)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert found.stride() == expected.stride()
        assert (not report.rows[0].fallbacks) == on_kernel


@pytest.mark.parametrize("dynamic", (None, True))
def test_the_sizes_of_a_transposed_input_may_be_left_open(dynamic) -> None:
    """As those of the queries and keys that Gemma 3 and others normalise."""
    swapped, original = pair(Llama())
    torch._dynamo.reset()
    compiled = torch.compile(swapped, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, length in ((2, 5), (2, 7), (3, 4)):
        x = torch.randn(batch, length, 3, WIDTH).transpose(1, 2)
        found, expected = compiled(x), original(x)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert found.stride() == expected.stride()


def test_a_weight_of_two_dimensions_is_left() -> None:
    module = Cohere()
    module.weight = nn.Parameter(torch.ones(2, WIDTH))
    (row,) = plan(module).rows
    assert (row.action, row.reason) == ("left", "its weight has 2 dimensions")


def test_the_normalised_shape_is_that_of_the_weight() -> None:
    module, original = pair(Llama(1))
    x = torch.randn(3, 4)  # the weight is broadcast along the last dimension
    torch.testing.assert_close(module(x), original(x))


class Residual(nn.Module):
    """The block that ends both halves of a layer of BERT."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.project = nn.Linear(8, WIDTH)
        self.drop = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, states: Tensor, skip: Tensor) -> Tensor:
        return self.norm(skip + self.drop(self.project(states)))


def test_a_residual_block() -> None:
    swapped, original = pair(Residual())
    states, skip = torch.randn(2, 3, 8), torch.randn(2, 3, WIDTH)
    for call in (lambda m: m(states, skip), lambda m: m(states, skip=skip), lambda m: m(skip=skip, states=states)):
        torch.testing.assert_close(call(swapped), call(original), atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="skip"):
        swapped(states)


def test_a_residual_of_another_shape_or_dtype() -> None:
    swapped, original = pair(Residual())
    states = torch.randn(2, 3, 8)
    for skip in (torch.randn(WIDTH), torch.randn(1, 3, WIDTH), torch.tensor(0.5), torch.randn(2, 3, WIDTH).bfloat16()):
        found, expected = swapped(states, skip), original(states, skip)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class WeightedResidual(Residual):
    def forward(self, states, skip):
        return self.norm(torch.add(self.drop(self.project(states)), skip, alpha=0.5))


def test_a_weighted_residual_is_none() -> None:
    assert {row.path: row.action for row in plan(WeightedResidual()).rows} == {"": "left", "norm": "swap"}


def test_a_residual_block_in_training_drops() -> None:
    module = Residual(0.5).train()
    swap(module)
    states, skip = torch.randn(2, 3, 8), torch.randn(2, 3, WIDTH)
    assert not torch.equal(module(states, skip), module(states, skip))
    assert torch.equal(module.eval()(states, skip), module(states, skip))


class ConvolutionalResidual(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv1d(8, WIDTH, 1)


def test_a_residual_block_of_a_convolution_is_none() -> None:
    rows = {row.path: row.action for row in plan(ConvolutionalResidual()).rows}
    assert rows == {"norm": "swap"}


def test_a_method_replaced_after_the_swap_is_called_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Gemma(), torch.randn(2, WIDTH)
    report = swap(module)
    module._norm = lambda x: x * 2  # on the instance
    with report.counting():
        torch.testing.assert_close(module(x), x * 2 * (1 + module.weight))
    assert report.rows[0].fallbacks == {"its _norm was replaced": 1}
    del module._norm
    monkeypatch.setattr(Gemma, "forward", lambda self, x: x - 1)
    with report.counting():
        assert torch.equal(module(x), x - 1)
    assert report.rows[0].fallbacks == {"its forward was replaced": 1}


def test_a_helper_replaced_on_the_class_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(Gemma()).rows[0].action == "swap"
    monkeypatch.setattr(Gemma, "_norm", lambda self, x: x)
    assert not [row for row in plan(Gemma()).rows if row.action == "swap"]


def test_a_forward_replaced_on_the_class_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As other libraries of kernels do it, for a whole process."""
    assert plan(Llama()).rows[0].action == "swap"
    monkeypatch.setattr(Llama, "forward", lambda self, x: F.normalize(x))
    assert not [row for row in plan(Llama()).rows if row.action == "swap"]


class Centred(nn.Module):
    """Its square is widened, the input less its mean is not."""

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.float().pow(2).mean(-1, keepdim=True) + 1e-5)


class NarrowedAgain(Centred):
    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return (centred * torch.rsqrt(centred.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_square_that_is_widened_widens_the_result(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, WIDTH).to(dtype)
    for module, is_swapped in ((Centred(), False), (NarrowedAgain(), True)):
        expected, report = module(x), swap(module)
        found = module(x)
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found.float(), expected.float(), atol=2 * torch.finfo(dtype).eps, rtol=1e-2)
        assert bool(report.rows) == is_swapped
