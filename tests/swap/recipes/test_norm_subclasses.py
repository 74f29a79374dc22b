"""Norms of classes that come of torch's own: by super().forward(...), or with torch's forward as it is."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import LayerNorm

from fastattn.swap import plan, swap

WIDTH = 24
HALVES = (torch.float32, torch.bfloat16)


def pair(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A swapped copy, every row of which is swapped, and the module."""
    swapped = copy.deepcopy(module)
    assert {row.action for row in swap(swapped).rows} == {"swapped"}
    return swapped, module


class Clip(nn.LayerNorm):
    def forward(self, x):
        dtype = x.dtype
        result = super().forward(x.type(torch.float32))
        return result.type(dtype)


class ClipAgain(Clip):
    """The class whose super() it is, and not that of the module, says whose forward comes next."""


class WideRMS(nn.RMSNorm):
    def forward(self, input):
        return super(WideRMS, self).forward(input.float()).type_as(input)  # noqa: UP008


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("norm_class", [Clip, ClipAgain, WideRMS])
def test_what_widens_around_the_forward_above(norm_class, dtype: torch.dtype) -> None:
    module = norm_class(WIDTH)
    with torch.no_grad():
        module.weight.copy_(torch.rand(WIDTH) + 0.5)
    swapped, original = copy.deepcopy(module), module
    report = swap(swapped, backend="reference")  # which leaves no choice
    x = torch.randn(7, 5, WIDTH).to(dtype)
    found, expected = [each.requires_grad_() for each in (x.clone(), x.clone())]
    with report.counting():
        y = swapped(found)
    assert report.all_called
    wanted = original(expected)
    assert y.dtype is dtype
    size = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(y, wanted, atol=size, rtol=size)
    y.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(found.grad, expected.grad, atol=size, rtol=size)
    torch.testing.assert_close(swapped.weight.grad, original.weight.grad, atol=1e-2, rtol=1e-4)


def test_an_eps_of_none_is_that_of_what_the_forward_above_is_given() -> None:
    swapped, original = pair(WideRMS(WIDTH))
    x = (1e-4 * torch.randn(9, WIDTH)).bfloat16()  # where an epsilon of bfloat16 would be all there is
    torch.testing.assert_close(swapped(x), original(x), atol=2e-2, rtol=2e-2)


class PlainRMS(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x)


class OwnInit(nn.RMSNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_class", [PlainRMS, OwnInit])
def test_an_eps_of_none_is_that_of_float32_for_halves_too(norm_class, dtype: torch.dtype) -> None:
    swapped, original = pair(norm_class(WIDTH).to(dtype))
    x = (3e-3 * torch.randn(9, WIDTH)).to(dtype)
    torch.testing.assert_close(swapped(x), original(x), atol=2e-2, rtol=2e-2)


def test_a_forward_above_that_is_replaced_after_the_swap_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped, original = copy.deepcopy(Clip(WIDTH)), Clip(WIDTH)
    report = swap(swapped)
    torchs = nn.LayerNorm.forward
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: 2 * torchs(self, x))
    x = torch.randn(3, WIDTH)
    with report.counting():
        torch.testing.assert_close(swapped(x), original(x))
    assert report.rows[0].fallbacks == {"the forward of LayerNorm was replaced": 1}


class FiveTimes(nn.Module):
    def forward(self, x):
        return 5 * x


class PastLayerNorm(nn.LayerNorm, FiveTimes):
    def forward(self, x):
        return super(nn.LayerNorm, self).forward(x)


class PastItsOwn(LayerNorm, FiveTimes):
    def forward(self, x):
        return super(LayerNorm, self).forward(x)


class Remembers(nn.LayerNorm):
    def forward(self, x):
        super().__setattr__("last", x.shape)
        return super().forward(x)


@pytest.mark.parametrize("norm_class", [PastLayerNorm, PastItsOwn, Remembers])
def test_what_else_super_may_be_asked_for_is_left(norm_class) -> None:
    assert not [row for row in plan(norm_class(WIDTH)).rows if row.action == "swap"]


def test_another_forward_above_is_not_read_nor_one_that_a_library_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Above(nn.LayerNorm):
        def forward(self, x):
            return 2 * F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    class Below(Above):
        def forward(self, x):
            return super().forward(x)

    class Plain(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x)

    assert [row.action for row in plan(Below(WIDTH)).rows] == ["left"]
    assert [row.action for row in plan(Plain(WIDTH)).rows] == ["swap"]
    monkeypatch.setattr(nn.LayerNorm, "forward", Above.forward)
    assert [row.action for row in plan(Plain(WIDTH)).rows] == ["left"]


class Subclass(nn.LayerNorm):
    """Whose forward is torch's, which calls the function."""


class OfRMSNorm(nn.RMSNorm):
    pass


@pytest.mark.parametrize("norm", [Subclass(WIDTH), Subclass(WIDTH, bias=False), OfRMSNorm(WIDTH, eps=1e-6)])
def test_subclasses_of_torchs_modules_with_the_same_forward(norm: nn.Module) -> None:
    swapped, original = pair(norm.bfloat16())
    x = torch.randn(4, WIDTH).bfloat16()
    torch.testing.assert_close(swapped(x), original(x), atol=2e-2, rtol=2e-2)


def test_a_forward_of_torchs_module_replaced_later_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = Subclass(WIDTH).bfloat16(), torch.randn(4, WIDTH).bfloat16()
    report = swap(module)
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, input: input + 1)
    with report.counting():
        assert torch.equal(module(x), x + 1)
    assert report.rows[0].fallbacks == {"its forward was replaced": 1}
