"""Linears that a class spells out, as products or with casts to the input's dtype, alone and in blocks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn import swap
from fastattn.swap.recipes import free_linear
from fastattn.swap.recipes.spelled_linear import is_spelled_linear

WIDTH = 512


class Linear(nn.Linear):
    """As whisper writes it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Plain(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Product(nn.Linear):
    """As transformers' Falcon writes it."""

    def forward(self, input: Tensor) -> Tensor:
        hidden_states = input @ self.weight.T
        if self.bias is None:
            return hidden_states
        return hidden_states + self.bias


class Matmul(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, self.weight.transpose(-2, -1))
        return y if self.bias is None else self.bias + y


class Untransposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class TransposedInput(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x.T @ self.weight.T + self.bias


class Unbiased(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)


class Swapped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.bias, self.weight)


class WithoutBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Either(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.weight if self.bias is None else self.bias)


@pytest.fixture(autouse=True)
def paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any machine."""
    monkeypatch.setattr(free_linear, "is_measured", lambda dtype: True)
    monkeypatch.setattr(free_linear, "_is_faster", lambda x, weight, bias: x.dtype is weight.dtype)


def build(kind: type[nn.Linear] = Linear, bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    return kind(WIDTH, WIDTH, bias=bias)


def block(kind: type[nn.Linear] = Linear) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(kind(WIDTH, 2 * WIDTH), nn.GELU(), kind(2 * WIDTH, WIDTH))


X = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(5))


def row_of(report: fastattn.swap.SwapReport) -> fastattn.swap.Row:
    return next(row for row in report.rows if row.path == "")


def swapped_alike(module: nn.Module) -> tuple[fastattn.swap.SwapReport, Tensor]:
    """Swaps the module, once it is seen to answer and to learn as before; the report, and its answer to X before."""
    x = X.clone().requires_grad_()
    leaves = [x, *module.parameters()]
    expected = module(x)
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    report = swap(module, strict=True)
    with report.counting():
        found = module(x)
    assert report.all_called
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for one, other in zip(torch.autograd.grad(found.square().sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    return report, expected


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("kind", (Linear, Plain, Product, Matmul))
def test_alone(kind: type[nn.Linear], bias: bool) -> None:
    module = build(kind, bias)
    report, expected = swapped_alike(module)
    assert row_of(report).kernel == "linear_act"
    torch.testing.assert_close(copy.deepcopy(module)(X), expected, atol=1e-4, rtol=1e-4)
    report.undo()
    assert type(module) is kind and torch.equal(module(X), expected)


@pytest.mark.parametrize("kind", (Linear, Product))
def test_in_a_block(kind: type[nn.Linear]) -> None:
    report, _ = swapped_alike(block(kind))
    assert [row.action for row in report.rows] == ["swapped", "fused", "fused"]


def test_other_dtypes_are_cast_by_the_original() -> None:
    for module, expected in ((build(), build()), (block(), block())):
        report = swap(module)
        with report.counting():
            assert torch.equal(module(X.bfloat16()), expected(X.bfloat16()))
        assert sum(row_of(report).fallbacks.values()) == 1
    for module in (build(), block()):
        report = swap(module, backend="reference")
        with pytest.raises(fastattn.NotSupported):
            module(X.bfloat16())


def test_a_bias_of_another_dtype_is_cast_by_the_original() -> None:
    module, expected = block(), block()
    report = swap(module)
    for each in (module, expected):
        each[0].bias = nn.Parameter(each[0].bias.double())
    with report.counting():
        torch.testing.assert_close(module(X), expected(X), atol=1e-4, rtol=1e-4)
    assert row_of(report).fallbacks == {"0 has a bias of another dtype than its weight": 1}


def test_hooks_and_a_forward_that_was_replaced_since_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    module, expected = block(), block()
    report = swap(module)
    for each in (module, expected):
        each[0].register_forward_hook(lambda child, args, result: result + 1)
    with report.counting():
        torch.testing.assert_close(module(X), expected(X), atol=1e-4, rtol=1e-4)
    assert row_of(report).fallbacks == {"0 has hooks": 1}
    module, alone = block(), build()
    swap(module)
    swap(alone)
    monkeypatch.setattr(Linear, "forward", lambda self, x: nn.Linear.forward(self, x) * 0)
    assert not module(X).any() and not alone(X).any()


@pytest.mark.parametrize("kind", (Scaled, Swapped, WithoutBias, Either, Untransposed, TransposedInput, Unbiased))
def test_what_only_looks_alike_is_left_alone(kind: type[nn.Linear]) -> None:
    assert not is_spelled_linear(kind)
    module = build(kind)
    swap(module)
    assert type(module) is kind


def test_which_classes_are() -> None:
    assert is_spelled_linear(Linear) and is_spelled_linear(Plain)
    assert not is_spelled_linear(nn.Linear) and not is_spelled_linear(nn.Bilinear) and not is_spelled_linear(int)


def test_compiles_whole() -> None:
    for module in (build(), block()):
        torch._dynamo.reset()
        expected = module(X)
        swap(module)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), expected, atol=1e-4, rtol=1e-4)
