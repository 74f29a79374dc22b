"""Blocks as timm and open_clip spell them: a place for a norm that holds nn.Identity, activations and norms of their
own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.swap import plan, swap

WIDTH, HIDDEN = 16, 24


def fast_layer_norm(x: Tensor, *args: object) -> Tensor:
    raise AssertionError("not the branch that the flag chooses")


class LayerNorm(nn.LayerNorm):
    """timm's: another implementation behind a flag."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)
        self._fast_norm = False
        nn.init.normal_(self.weight)
        nn.init.normal_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self._fast_norm:
            x = fast_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        else:
            x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x


class GELU(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input)


class GELUTanh(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, approximate="tanh")


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul(x.sigmoid())


class ReLU2(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class WideSiLU(nn.Module):
    """As diffusers' FP32SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x.float(), inplace=False).to(x.dtype)


class StaysWide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x.float())


class WideAgain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x.double()).to(x.dtype)


class AlmostQuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.7 * x)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.gelu(x)


class Counting(nn.Module):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 1

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class Inplace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=True)


class Mlp(nn.Module):
    """timm's."""

    def __init__(self, act: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(WIDTH, HIDDEN), act, nn.Dropout(0.0)
        self.norm = nn.Identity() if norm is None else norm
        self.fc2, self.drop2 = nn.Linear(HIDDEN, WIDTH), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        x = self.drop2(x)
        return x


class SwiGLU(Mlp):
    def __init__(self, act: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__(act, norm)
        self.gate = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.gate(x)) * self.fc1(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        return self.drop2(x)


def agrees(module: nn.Module, action: str, kernel: str, dtype: torch.dtype = torch.float32) -> None:
    """The module is swapped, and its results and gradients are those of the original within the dtype's rounding."""
    module.to(dtype)
    original = copy.deepcopy(module)
    report = swap(module)
    assert [(row.action, row.kernel) for row in report.rows if not row.path] == [(action, kernel)]
    x = torch.randn(2, 5, WIDTH, dtype=dtype)
    results = []
    for each in (original, module):
        inputs = x.clone().requires_grad_()
        with report.counting():
            y = each(inputs)
        y.float().square().sum().backward()
        results.append((y, inputs.grad, *(p.grad for p in each.parameters())))
    assert report.all_called
    tolerance = 1e-5 if dtype is torch.float32 else 4e-2
    for ours, theirs in zip(*results, strict=True):
        scale = float(theirs.detach().float().abs().max())
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * max(scale, 1e-6))
    report.undo()
    assert torch.equal(module(x), original(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [GELU, GELUTanh, QuickGELU, Swish, ReLU2, WideSiLU, nn.GELU])
def test_activations_by_what_their_forward_computes(act, dtype):
    agrees(Mlp(act()), "swapped", "ffn", dtype)
    agrees(SwiGLU(act()), "swapped", "gated_ffn", dtype)


@pytest.mark.parametrize("act", [AlmostQuickGELU, Doubled, Counting, Inplace, StaysWide, WideAgain])
def test_activations_that_only_look_like_one(act):
    (row,) = [row for row in plan(Mlp(act())).rows if not row.path]
    assert row.action != "swapped" and "has no kernel" in (row.reason or "")


def test_an_activation_whose_forward_is_replaced_later():
    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(x)

    module, x = Mlp(Act()), torch.randn(2, WIDTH)
    report = swap(module)
    Act.forward = lambda self, x: F.relu(x)
    relu = Mlp(nn.ReLU())
    relu.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), relu(x))
    Act.forward = lambda self, x: x + 1
    with report.counting(), pytest.warns(UserWarning, match="has no kernel"):
        module(x)
    assert not report.all_called


def test_a_norm_in_the_place_is_called():
    for block in (Mlp, SwiGLU):
        module = block(nn.GELU(), nn.LayerNorm(HIDDEN))
        assert all(row.action != "swapped" for row in plan(module).rows if not row.path)


def test_a_hook_on_the_identity_is_called():
    module, x, seen = Mlp(nn.GELU()), torch.randn(2, WIDTH), list[int]()
    swap(module)
    expected = module(x)
    module.norm.register_forward_hook(lambda *args: seen.append(1))
    with pytest.warns(UserWarning, match="original code"):
        torch.testing.assert_close(module(x), expected)
    assert seen == [1]


def test_compiles_whole():
    torch.compiler.reset()
    module, x = SwiGLU(QuickGELU()), torch.randn(2, WIDTH)
    expected = module(x)
    swap(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_behind_a_flag(dtype):
    agrees(LayerNorm(WIDTH), "swapped", "layer_norm", dtype)


def test_the_other_branch_is_the_originals():
    norm, x = LayerNorm(WIDTH), torch.randn(64, WIDTH)
    swap(norm)
    norm._fast_norm = True
    with pytest.warns(UserWarning, match="original code"), pytest.raises(AssertionError, match="not the branch"):
        norm(x)
