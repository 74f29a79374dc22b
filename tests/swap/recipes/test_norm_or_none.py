"""Norms whose forward asks which of weight and bias are None, as diffusers' FP32LayerNorm."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import swap

WIDTH = 32


class FP32LayerNorm(nn.LayerNorm):
    def forward(self, inputs: Tensor) -> Tensor:
        origin_dtype = inputs.dtype
        return F.layer_norm(
            inputs.float(),
            self.normalized_shape,
            self.weight.float() if self.weight is not None else None,
            self.bias.float() if self.bias is not None else None,
            self.eps,
        ).to(origin_dtype)


class RMSNorm(nn.Module):
    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        x = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)
        if self.weight is not None:
            x = x * self.weight
        return x


class SkipsWithoutWeight(FP32LayerNorm):
    def forward(self, inputs: Tensor) -> Tensor:
        if self.weight is None:
            return inputs.square()
        return F.layer_norm(inputs, self.normalized_shape, self.weight, self.bias, self.eps)


def build(kind: str) -> nn.Module:
    torch.manual_seed(3)
    if kind.startswith("rms"):
        return RMSNorm("weight" in kind)
    norm = FP32LayerNorm(WIDTH, elementwise_affine=kind != "none", bias="bias" in kind)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


KINDS = ("none", "weight", "weight, bias", "rms", "rms, weight")
X = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_gradients_stay(kind: str, dtype: torch.dtype) -> None:
    module = build(kind).to(dtype)
    x = X.to(dtype).requires_grad_()
    leaves = [x, *module.parameters()]
    expected = module(x)
    gradients = torch.autograd.grad(expected.float().square().sum(), leaves)
    report = swap(module, strict=True)
    with report.counting():
        found = module(x)
    assert report.all_called and found.dtype is dtype
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(found, expected, **tolerance)
    wide = {name: 20 * value for name, value in tolerance.items()}
    for one, other in zip(torch.autograd.grad(found.float().square().sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(one, other, **wide)
    torch.testing.assert_close(copy.deepcopy(module)(x), expected, **tolerance)
    report.undo()
    assert torch.equal(module(x), expected)


def test_what_is_none_is_looked_at_at_every_call() -> None:
    module, expected = build("weight, bias"), build("weight, bias")
    report = swap(module, backend="reference")
    for name in ("bias", "weight"):
        setattr(module, name, None)
        setattr(expected, name, None)
        with report.counting():
            torch.testing.assert_close(module(X), expected(X), atol=1e-5, rtol=1e-5)
        assert report.all_called


def test_a_case_that_is_no_norm_is_the_original_s() -> None:
    module = SkipsWithoutWeight(WIDTH)
    report = swap(module)
    module.weight = None
    with report.counting():
        assert torch.equal(module(X), X.square())
    assert report.rows[0].fallbacks == {"its flags are those of another branch": 1}
    without = SkipsWithoutWeight(WIDTH, elementwise_affine=False)
    swap(without)
    assert type(without) is SkipsWithoutWeight


def test_compiles_whole() -> None:
    for kind in KINDS:
        torch._dynamo.reset()
        module = build(kind).eval()
        expected = module(X)
        swap(module)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), expected, atol=1e-5, rtol=1e-5)
