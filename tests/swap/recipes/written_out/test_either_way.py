"""Classes that call torch's scaled_dot_product_attention or write their attention out, as a flag says."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastattn import swap
from fastattn.swap.recipes import either_way, written_out
from fastattn.swap.report import SwapReport

WIDTH, HEADS = 32, 4


def draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Either(nn.Module):
    """As timm's, monai's and x-transformers' attention."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(draw(HEADS, 1, 1, seed=2))
        self.fused, self.drop = fused, nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.expand(-1, x.shape[1], x.shape[1]))
        else:
            scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1) + self.bias
            out = self.drop(scores.softmax(dim=-1)) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class OfOther(Either):
    """Without its flag it does what is no attention of ours."""

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(x, x, x)
        return (x @ x.transpose(-2, -1)).relu() @ x + 0.0 * x.softmax(dim=-1)


def with_swapped(original: nn.Module) -> tuple[nn.Module, nn.Module, SwapReport]:
    """The module, a copy whose attention is swapped, and the report."""
    module = copy.deepcopy(original)
    return original, module, swap(module, norms=False, ffns=False, linears=False)


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = module(x)
    return [out, *torch.autograd.grad((out * draw(*out.shape, seed=9)).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize("fused", [True, False])
def test_each_side_runs_on_the_kernels(fused: bool) -> None:
    original, module, report = with_swapped(Either(fused).eval())
    x = draw(2, 24, WIDTH)
    with report.counting(), torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(module(x), original(x), atol=2e-5, rtol=1e-4)
    assert either_way._written.get(module, False) is not fused
    row = next(row for row in report.rows if "attention" in row.kernel)
    assert row.calls == 3 and not row.fallbacks
    assert dict(row.choices) == ({} if fused else {either_way.FIRST: 1})
    for found, expected in zip(gradients(module, x), gradients(original, x), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_flag_may_change() -> None:
    original, module, report = with_swapped(Either(False).eval())
    x = draw(2, 24, WIDTH)
    with torch.no_grad():
        for fused in (False, False, True, True, True, False):
            original.fused = module.fused = fused
            torch.testing.assert_close(module(x), original(x), atol=2e-5, rtol=1e-4)
        module.fused = True
        with report.counting():
            module(x)
    row = next(row for row in report.rows if "attention" in row.kernel)
    assert row.calls == 1 and not row.fallbacks and not row.choices


@pytest.mark.filterwarnings("ignore:.*runs original code")
def test_what_is_no_attention_falls_back_until_the_flag_changes() -> None:
    original, module, report = with_swapped(OfOther(False).eval())
    x = draw(2, 24, WIDTH)
    with report.counting(), torch.no_grad():
        for _ in range(4):
            assert torch.equal(module(x), original(x))
    row = next(row for row in report.rows if "attention" in row.kernel)
    assert sum(row.fallbacks.values()) == 3 and dict(row.choices) == {either_way.FIRST: 1}
    original.fused = module.fused = True
    with torch.no_grad():
        for _ in range(written_out._RETRY):
            torch.testing.assert_close(module(x), original(x), atol=2e-5, rtol=1e-4)
        with report.counting():
            module(x)
    row = next(row for row in report.rows if "attention" in row.kernel)
    assert row.calls == 1 and not row.fallbacks


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_first_call_that_is_checkpointed_is_run_again_alike(reentrant: bool) -> None:
    """Dropout is drawn alike, and the same tensors are saved."""
    original, module, _ = with_swapped(Either(False).train())
    x = draw(2, 24, WIDTH)

    def step(each: nn.Module) -> list[Tensor]:
        torch.manual_seed(3)
        given = x.clone().requires_grad_()
        out = checkpoint(each, given, use_reentrant=reentrant)
        out.square().sum().backward()
        return [out, given.grad]

    for found, expected in zip(step(module), step(original), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    first, again = step(module), step(module)  # by now it may run on kernels, whose dropout is drawn otherwise
    for found, expected in zip(first, again, strict=True):
        assert torch.equal(found, expected)


def test_a_strict_swap_runs_it() -> None:
    module = Either(False).eval()
    expected = module(draw(1, 24, WIDTH))
    swap(module, norms=False, ffns=False, linears=False, strict=True)
    for _ in range(2):
        torch.testing.assert_close(module(draw(1, 24, WIDTH)), expected, atol=2e-5, rtol=1e-4)
