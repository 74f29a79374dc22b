"""Gated feed-forward blocks whose flags say how the product is spelled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn import swap

WIDTH, HIDDEN = 16, 48


class GluMlp(nn.Module):
    """As timm writes it."""

    def __init__(self, gate_last: bool, act: nn.Module | None = None, dim: int = -1, drop: float = 0.0) -> None:
        super().__init__()
        self.chunk_dim, self.gate_last = dim, gate_last
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.act = nn.SiLU() if act is None else act
        self.drop1, self.norm, self.drop2 = nn.Dropout(drop), nn.Identity(), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x1, x2 = x.chunk(2, dim=self.chunk_dim)
        x = x1 * self.act(x2) if self.gate_last else self.act(x1) * x2
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        return self.drop2(x)


class Squared(GluMlp):
    """No block at all with its flag set."""

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.fc1(x).chunk(2, -1)
        return self.fc2(x1 * x2.square()) if self.gate_last else self.fc2(x1 * self.act(x2))


X = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(5))


def build(gate_last: bool = False, kind: type[GluMlp] = GluMlp, **options: object) -> GluMlp:
    torch.manual_seed(3)
    return kind(gate_last, **options)


def row_of(report: fastattn.swap.SwapReport) -> fastattn.swap.Row:
    return next(row for row in report.rows if row.path == "")


@pytest.mark.parametrize("gate_last", (False, True))
def test_answers_and_gradients_stay(gate_last: bool) -> None:
    module = build(gate_last)
    x = X.clone().requires_grad_()
    leaves = [x, *module.parameters()]
    expected = module(x)
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    report = swap(module, strict=True)
    assert row_of(report).kernel == "gated_ffn"
    with report.counting():
        found = module(x)
    assert report.all_called
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(torch.autograd.grad(found.square().sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(copy.deepcopy(module)(x), expected, atol=1e-5, rtol=1e-5)
    report.undo()
    assert type(module) is GluMlp and torch.equal(module(x), expected)


def test_the_flag_is_looked_at_at_every_call() -> None:
    module = build()
    report = swap(module)
    module.gate_last = True
    with report.counting():
        torch.testing.assert_close(module(X), build(True)(X), atol=1e-5, rtol=1e-5)
    assert report.all_called


@pytest.mark.parametrize(("name", "value"), (("gate_last", 1), ("chunk_dim", 2), ("chunk_dim", -1.0)))
def test_any_other_flag_is_the_original_s(name: str, value: object) -> None:
    module, expected = build(), build()
    report = swap(module)
    setattr(module, name, value)
    setattr(expected, name, value)
    with report.counting():
        if isinstance(value, float):
            with pytest.raises(TypeError):
                module(X)
        else:
            assert torch.equal(module(X), expected(X))
    assert row_of(report).fallbacks == {"its flags are those of another branch": 1}


def test_hooks_and_adapters_are_called() -> None:
    module, expected = build(), build()
    report = swap(module)
    for each in (module, expected):
        each.fc1.register_forward_hook(lambda child, args, result: result + 1)
    with report.counting():
        torch.testing.assert_close(module(X), expected(X), atol=1e-5, rtol=1e-5)
    assert row_of(report).fallbacks == {"fc1 has hooks": 1}


def test_what_only_looks_alike_is_left_alone() -> None:
    for module in (build(dim=1), build(True, Squared), build(act=nn.Sigmoid())):
        kind = type(module)
        swap(module, linears=False)
        assert type(module) is kind
    assert row_of(swap(build(act=nn.Sigmoid()))).reason == "the activation Sigmoid has no kernel"
    assert row_of(swap(build(False, Squared))).action == "swapped"


def test_dropouts_drop_in_training_alone() -> None:
    module = build(drop=0.5)
    swap(module)
    assert not torch.equal(module(X), module(X))
    module.eval()
    assert torch.equal(module(X), module(X))


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    module = build().eval()
    expected = module(X)
    swap(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected, atol=1e-5, rtol=1e-5)
