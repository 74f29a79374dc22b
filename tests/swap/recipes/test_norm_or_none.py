"""Norms whose forward asks which of weight and bias are None, as diffusers' FP32LayerNorm, the weight's dtype, as its
RMSNorm, or along which dimension it is, as litgpt's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import plan, swap

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


def test_compiles_whole(compiles_whole) -> None:
    for kind in KINDS:
        compiles_whole(build(kind).eval(), X)


# ---- the dtype of the weight -----------------------------------------------------------------------------------------


def is_torch_npu_available() -> bool:
    return False


class OfWeightsDtype(nn.Module):
    """In halves where the weight is one, else in float32; in the input's dtype where there is no weight."""

    eps = 1e-6

    def __init__(self, affine: bool = True, bias: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter((torch.rand(WIDTH, generator=draw) + 0.5).bfloat16().float()) if affine else None
        self.bias = nn.Parameter(torch.zeros(WIDTH)) if bias else None

    def forward(self, states: Tensor) -> Tensor:
        if is_torch_npu_available() and self.weight is not None:
            import torch_npu

            return torch_npu.npu_rms_norm(states, self.weight, epsilon=self.eps)[0]
        given = states.dtype
        mean = states.float().square().mean(dim=-1, keepdim=True)
        states = states * torch.rsqrt(mean + self.eps)
        if self.weight is None:
            return states.to(given)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            states = states.to(self.weight.dtype)
        states = states * self.weight
        return states if self.bias is None else states + self.bias


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients."""
    x = x.detach().requires_grad_()
    leaves = [x, *module.parameters()]
    y = module(x)
    seen = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * seen).sum(), leaves)]


def is_as_near(module: nn.Module, original: nn.Module, x: Tensor) -> bool:
    """Whether output and gradients are as near to the exact ones as the original's, and of its dtypes. The original's
    intermediate results have the coarsest dtype that is about."""
    exact = results(copy.deepcopy(original).double(), x.double())
    coarsest = max(torch.finfo(each.dtype).eps for each in (x, *original.parameters()))
    near = True
    for one, other, true in zip(results(module, x), results(original, x), exact, strict=True):
        errors = [float((each.double() - true).abs().max()) for each in (one, other)]
        near &= one.dtype is other.dtype and errors[0] <= 2 * errors[1] + 2 * coarsest * float(true.abs().max())
    return near


@pytest.mark.parametrize("given", DTYPES)
@pytest.mark.parametrize("dtype", (*DTYPES, None))
def test_the_dtype_of_the_weight_is_that_of_the_result(dtype: torch.dtype | None, given: torch.dtype) -> None:
    original = OfWeightsDtype(affine=dtype is not None).to(dtype or torch.float32)
    module = copy.deepcopy(original)
    report = swap(module, strict=True)
    assert [row.kernel for row in report.rows] == ["rms_norm"]
    x = X.bfloat16().to(given)
    with report.counting():
        y = module(x)
    assert report.all_called and y.dtype is original(x).dtype is (dtype or given)
    assert module.state_dict().keys() == original.state_dict().keys()
    assert is_as_near(module, original, x)
    report.undo()
    assert type(module) is OfWeightsDtype and torch.equal(module(x), original(x))


def test_the_dtype_is_looked_at_at_every_call() -> None:
    module, original = OfWeightsDtype(), OfWeightsDtype()
    report = swap(module)
    for dtype in DTYPES:
        for each in (module, original):
            each.to(dtype)
        with report.counting():
            assert is_as_near(module, original, X)
        assert report.all_called
    for each in (module, original):
        each.double()
    with report.counting():
        assert torch.equal(module(X), original(X))
    assert report.rows[0].fallbacks == {"its flags are those of another branch": 1}


def test_a_bias_makes_it_another_thing() -> None:
    assert [row.action for row in plan(OfWeightsDtype(bias=True)).rows] != ["swap"]
    module = OfWeightsDtype()
    report = swap(module)
    module.bias = nn.Parameter(torch.ones(WIDTH))
    with report.counting():
        torch.testing.assert_close(module(X), OfWeightsDtype()(X) + 1)
    assert report.rows[0].fallbacks == {"its flags are those of another branch": 1}


@pytest.mark.parametrize("dtype", DTYPES)
def test_which_dtypes_are_asked_for_is_what_counts(dtype: torch.dtype) -> None:
    class OtherList(OfWeightsDtype):
        def forward(self, x: Tensor) -> Tensor:
            y = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
            if self.weight.dtype in [torch.float16, torch.float32]:
                y = y.to(self.weight.dtype)
            return self.weight * y

    class NotInList(OfWeightsDtype):
        def forward(self, x: Tensor) -> Tensor:
            y = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
            if self.weight.dtype not in (torch.float16, torch.bfloat16):
                y = y.to(self.weight.dtype)
            return self.weight * y

    class AnyDtype(OfWeightsDtype):
        def forward(self, x: Tensor) -> Tensor:
            y = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
            return self.weight * y.to(dtype=self.weight.dtype)

    left = {OtherList: (torch.bfloat16,), NotInList: (torch.bfloat16, torch.float16), AnyDtype: ()}
    for kind, others in left.items():
        original = kind().to(dtype)
        module = copy.deepcopy(original)
        swap(module)
        assert (type(module) is kind) == (dtype in others), kind
        for given in DTYPES:
            assert is_as_near(module, original, X.bfloat16().to(given))


class EpsOutside(OfWeightsDtype):
    def forward(self, x: Tensor) -> Tensor:
        y = x * (torch.rsqrt(x.float().square().mean(-1, keepdim=True)) + self.eps)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            y = y.to(self.weight.dtype)
        return y * self.weight


class ToAnothersDtype(OfWeightsDtype):
    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return y.to(self.other.dtype) * self.weight


class WideWeight(OfWeightsDtype):
    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return y.to(self.weight.dtype) * self.weight.float()


class StaysWide(OfWeightsDtype):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps))


class InASet(OfWeightsDtype):
    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        if self.weight.dtype in {torch.float16, torch.bfloat16}:
            y = y.to(self.weight.dtype)
        return y * self.weight


class Imports(OfWeightsDtype):
    def forward(self, x: Tensor) -> Tensor:
        import math  # noqa: F401

        y = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(self.weight.dtype)


@pytest.mark.parametrize("kind", (EpsOutside, ToAnothersDtype, WideWeight, StaysWide, InASet, Imports))
def test_what_only_looks_alike_is_left(kind: type[OfWeightsDtype]) -> None:
    for dtype in DTYPES:
        assert not [row for row in plan(kind().to(dtype)).rows if row.action == "swap"]


# ---- along a dimension that an attribute says -----------------------------------------------------------------------


class Along(nn.Module):
    def __init__(self, dim: object = -1, shifted: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.rand(WIDTH, generator=draw))
        self.dim, self.shifted = dim, shifted

    def forward(self, x: Tensor) -> Tensor:
        given, x = x.dtype, x.float()
        inverse = torch.rsqrt(torch.mean(x * x, dim=self.dim, keepdim=True) + 1e-6)
        scale = (1 + self.weight) if self.shifted else self.weight
        return (x * inverse * scale.float()).to(dtype=given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifted", (False, True))
def test_along_the_last_dimension(shifted: bool, dtype: torch.dtype) -> None:
    original = Along(shifted=shifted).to(dtype)
    module = copy.deepcopy(original)
    report = swap(module, strict=True)
    with report.counting():
        assert is_as_near(module, original, X.bfloat16().to(dtype))
    assert report.all_called and [row.kernel for row in report.rows] == ["rms_norm"]


@pytest.mark.parametrize("dim", (1, -2, 2, (-1,)))
def test_along_any_other_runs_the_original(dim: object) -> None:
    assert not [row for row in plan(Along(dim)).rows if row.action == "swap"]
    module = Along()
    report = swap(module)
    module.dim = dim
    with report.counting():
        assert torch.equal(module(X), Along(dim)(X))
    assert report.rows[0].fallbacks == {"its flags are those of another branch": 1}


@pytest.mark.parametrize("make", (OfWeightsDtype, Along))
def test_what_they_ask_compiles_whole(make: type[nn.Module]) -> None:
    torch._dynamo.reset()
    module = make().bfloat16()
    swap(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X.bfloat16()), module(X.bfloat16()))
