"""Attention that a class writes out, in training: dropout that a checkpoint draws again, weights that gradients reach,
outputs that are written to, and what looks at scores from below autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastattn import swap
from fastattn.nn.attention_weights import _CACHED_SCORES
from fastattn.swap.recipes import written_out

WIDTH, HEADS, BATCH, LENGTH = 32, 4, 2, 20


class Attention(nn.Module):
    """Its output is linear in the weight of its last linear."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) * 0.5
        return self.proj(self.attend(scores, v).transpose(1, 2).reshape(x.shape))

    def attend(self, scores: Tensor, v: Tensor) -> Tensor:
        return self.drop(scores.softmax(-1)) @ v


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def both(attend: Callable[..., Tensor], dropout: float = 0.0) -> tuple[nn.Module, nn.Module, Any]:
    """A module whose method attend is this function, and its swapped copy."""
    module = type("Attends", (Attention,), {"attend": attend})(dropout)
    swapped = copy.deepcopy(module)
    report = swap(swapped, linears=False)
    assert report.rows[0].action == "swapped"
    return module, swapped, report


def parts(module: nn.Module) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    x = draw(BATCH, LENGTH, WIDTH).requires_grad_()
    out = module(x)
    return [out, *torch.autograd.grad((out * draw(*out.shape)).sum(), [x, *module.parameters()])]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert type(one) is Tensor
        torch.testing.assert_close(one, other, atol=2e-5 * (1 + float(other.detach().abs().max())), rtol=1e-4)


@torch.jit.script
def entropy(p: Tensor) -> Tensor:
    return -(p * (p + 1e-9).log()).sum(-1, keepdim=True)


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        ctx.save_for_backward(p)
        return p * p

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


def scripted(module: nn.Module, scores: Tensor, v: Tensor) -> Tensor:
    p = scores.softmax(-1)
    e = entropy(p)
    return p @ v + e


def written_to(module: nn.Module, scores: Tensor, v: Tensor) -> Tensor:
    out = scores.softmax(-1) @ v
    out += v
    out.transpose(1, 2)[:, 0] *= 2
    return out


def in_lists(module: nn.Module, scores: Tensor, v: Tensor) -> Tensor:
    other = v.detach().clone()
    biased = scores + other.mean()
    torch._foreach_mul_([other], 0.0)
    return biased.softmax(-1) @ v


def by_numpy(module: nn.Module, scores: Tensor, v: Tensor) -> Tensor:
    return (scores / np.sqrt(3.0)).softmax(-1) @ v


def by_func(module: nn.Module, scores: Tensor, v: Tensor) -> Tensor:
    return torch.func.grad(lambda t: t.softmax(-1).square().sum())(scores) @ v


def viewed_as(module: nn.Module, scores: Tensor, v: Tensor) -> Tensor:
    out = scores.softmax(-1) @ v
    return out.view_as(torch.empty(BATCH * HEADS, LENGTH, out.shape[-1])).view(out.shape)


def written_to_in_another_shape(module: nn.Module, scores: Tensor, v: Tensor) -> Tensor:
    out = (scores.softmax(-1) @ v).view(BATCH * HEADS, LENGTH, -1)
    out += 1.0
    return out.view(v.shape)


def checkpointed_softmax(module: nn.Module, scores: Tensor, v: Tensor) -> Tensor:
    return checkpoint(lambda a, b: a.softmax(-1) @ b, scores, v, use_reentrant=False)


@pytest.mark.parametrize(
    "attend",
    [scripted, written_to, in_lists, by_numpy, viewed_as, written_to_in_another_shape, checkpointed_softmax],
    ids=lambda f: f.__name__,
)
def test_outputs_and_gradients_are_the_originals(attend: Callable[..., Tensor]) -> None:
    module, swapped, _ = both(attend)
    for _ in range(3):
        assert_same(parts(swapped), parts(module))
    with torch.no_grad():
        assert_same([swapped(draw(BATCH, LENGTH, WIDTH))], [module(draw(BATCH, LENGTH, WIDTH))])


def test_torch_func_inside_of_a_forward() -> None:
    module, swapped, _ = both(by_func)
    with torch.no_grad():
        assert_same([swapped(draw(BATCH, LENGTH, WIDTH))], [module(draw(BATCH, LENGTH, WIDTH))])


def test_a_numpy_scale_is_a_number() -> None:
    _, swapped, report = both(by_numpy)
    with report.counting():
        parts(swapped)
    assert report.rows[0].calls == 1 and not report.rows[0].fallbacks


def test_a_gradient_penalty_through_a_function_of_the_models_own() -> None:
    module, swapped, _ = both(lambda module, scores, v: Squared.apply(scores).softmax(-1) @ v)
    found = []
    for each in (module, swapped):
        x = draw(BATCH, LENGTH, WIDTH).requires_grad_()
        (gradient,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), each.qkv.weight)[0])
    assert_same(found[1:], found[:1])


@pytest.mark.parametrize("view", ["itself", "flat", "turned"])
def test_weights_dropped_before_a_function_of_the_models_own_have_their_gradient(view: str) -> None:
    """That of the scores, by differences between draws of the same dropout."""
    there, back = {
        "itself": (lambda t: t, lambda t: t),
        "flat": (lambda t: t.flatten(0, 1), lambda t: t.unflatten(0, (BATCH, HEADS))),
        "turned": (lambda t: t.transpose(-2, -1), lambda t: t.transpose(-2, -1)),
    }[view]

    def attend(module: Any, scores: Tensor, v: Tensor) -> Tensor:
        return back(Squared.apply(there(module.drop(scores.softmax(-1))))) @ v

    _, swapped, _ = both(attend, 0.4)
    swapped.double()
    x = draw(BATCH, LENGTH, WIDTH).double().requires_grad_()

    def total() -> Tensor:
        torch.manual_seed(4)
        out = swapped(x)
        return (out * draw(*out.shape)).sum()

    weight = swapped.qkv.weight
    (gradient,) = torch.autograd.grad(total(), [weight])
    step = 1e-5 * draw(*weight.shape).double()
    with torch.no_grad():
        weight += step
    above = total().detach()
    with torch.no_grad():
        weight -= 2 * step
    torch.testing.assert_close((above - total().detach()) / 2, (gradient * step).sum(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("scores", [100, 10_000])
def test_a_checkpoint_draws_the_same_dropout_again(use_reentrant, keeps, scores, monkeypatch) -> None:
    """With other numbers of the smallest call for inference and training, on either side of this one's scores."""
    monkeypatch.setattr(written_out, "SMALLEST", {False: 100, True: scores})

    class Keeps(Attention):
        def forward(self, x: Tensor, flag: bool = False) -> Tensor:
            out = super().forward(x)
            if keeps:
                self.last = out
            return out

    module = Keeps(0.3)
    swap(module, linears=False)
    for _ in range(2 * written_out._PATIENCE):
        assert_linear(module.proj.weight, module, use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_of_multi_head_attention_draws_the_same_dropout_again(use_reentrant) -> None:
    length = int((_CACHED_SCORES / 2) ** 0.5) + 8
    module = nn.MultiheadAttention(8, 2, dropout=0.3, bias=False, batch_first=True)
    swap(module)
    assert_linear(module.out_proj.weight, lambda t: module(t, t, t)[0], use_reentrant, draw(1, length, 8))


def assert_linear(weight: nn.Parameter, run: Callable[[Tensor], Tensor], use_reentrant: bool, *inputs: Tensor) -> None:
    """<out, g> = <W, dW> of an output that is linear in W, as long as dW is that of the output's own dropout."""
    x = (inputs[0] if inputs else draw(BATCH, LENGTH, WIDTH)).requires_grad_()
    weight.grad = None
    out = checkpoint(run, x, use_reentrant=use_reentrant)
    product = (out * draw(*out.shape)).sum()
    product.backward()
    torch.testing.assert_close(product, (weight * weight.grad).sum(), rtol=1e-4, atol=1e-3)


def test_stored_weights_are_in_the_graph_of_the_output() -> None:
    def attend(module: Any, scores: Tensor, v: Tensor) -> Tensor:
        module.weights = scores.softmax(-1)
        return module.weights @ v

    _, swapped, report = both(attend)
    with report.counting():
        for _ in range(2):
            out = swapped(draw(BATCH, LENGTH, WIDTH))
            (gradient,) = torch.autograd.grad(out.sum(), swapped.weights)
            assert gradient.shape == (BATCH, HEADS, LENGTH, LENGTH)
    assert sum(report.rows[0].fallbacks.values()) == 2


def test_weights_that_are_held_elsewhere_are_counted() -> None:
    held: list[Tensor] = []

    def attend(module: Any, scores: Tensor, v: Tensor) -> Tensor:
        held.append(scores.softmax(-1))
        return held[-1] @ v

    _, swapped, report = both(attend)
    with report.counting(), torch.no_grad():
        swapped(draw(BATCH, LENGTH, WIDTH))
    assert report.rows[0].fallbacks == {"its attention scores or weights are kept": 1}


def test_weights_that_were_asked_for_leave_as_plain_tensors() -> None:
    class Returns(Attention):
        def forward(self, x: Tensor, flag: bool = False) -> Any:
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            weights = (q @ k.mT).softmax(-1)
            return weights @ v, weights.mean(), weights

    module = Returns()
    swap(module, linears=False)
    with torch.no_grad():
        assert [type(each) for each in module(draw(BATCH, LENGTH, WIDTH))] == [Tensor] * 3


def test_what_one_kind_of_call_keeps_says_nothing_of_another() -> None:
    class Returns(Attention):
        def forward(self, x: Tensor, flag: bool = False) -> Any:
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            weights = (q @ k.mT).softmax(-1)
            return (weights @ v, weights) if flag else weights @ v

    module = Returns()
    report = swap(module, linears=False)
    x = draw(BATCH, LENGTH, WIDTH)
    for _ in range(2 * written_out._PATIENCE):
        module(x, True)
        module(x, flag=True)
    with report.counting():
        module(x)
        module(x, False)
    assert report.rows[0].calls == 2 and not report.rows[0].fallbacks


def test_a_position_does_not_make_a_call_of_another_kind() -> None:
    class Keeps(Attention):
        def forward(self, x: Tensor, position: int = 0) -> Tensor:
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            self.weights = (q @ k.mT).softmax(-1)
            return self.weights @ v

    module = Keeps().eval()
    swap(module, linears=False)
    with torch.no_grad():
        for position in range(2 * written_out._PATIENCE):
            module(draw(BATCH, LENGTH, WIDTH), position)
    ((calls, _),) = written_out._in_vain[module].values()
    assert calls == 2 * written_out._PATIENCE


def test_one_seed_gives_one_output() -> None:
    _, swapped, _ = both(Attention.attend, 0.3)
    outputs = []
    for _ in range(3 * written_out._PATIENCE):
        torch.manual_seed(7)
        outputs.append(swapped(draw(BATCH, LENGTH, WIDTH)))
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_autocast_inside_of_a_forward_is_heeded() -> None:
    def attend(module: Any, scores: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (scores.softmax(-1) @ v).float()

    class Inside(Attention):
        def forward(self, x: Tensor, flag: bool = False) -> Tensor:
            q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            with torch.autocast("cpu", torch.bfloat16):
                weights = (q @ k.mT).softmax(-1)
                assert weights.dtype == torch.bfloat16
                return weights @ v

    module, swapped, _ = both(attend)
    assert torch.equal(swapped(draw(BATCH, LENGTH, WIDTH)), module(draw(BATCH, LENGTH, WIDTH)))
    inside = Inside()
    swap(inside, linears=False)
    assert inside(draw(BATCH, LENGTH, WIDTH)).dtype == torch.bfloat16


def test_float64_scores_beside_a_float32_mask_are_cast_as_they_were() -> None:
    def attend(module: Any, scores: Tensor, v: Tensor) -> Tensor:
        weights = (scores + torch.zeros(LENGTH, LENGTH)).float().softmax(-1)
        assert weights.dtype == torch.float32
        return weights.double() @ v

    module, swapped, _ = both(attend)
    found = [each.double()(draw(BATCH, LENGTH, WIDTH).double()) for each in (module, swapped)]
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-6)


def test_one_product_is_no_attention() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(draw(WIDTH, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x @ self.weight, dim=-1)

    report = swap(Router(), strict=True)
    assert [row.action for row in report.rows if row.action == "swapped"] == []
