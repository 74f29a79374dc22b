"""Random operations on scores: a swapped module gives what it gave, whatever is done to them."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import swap
from fastattn.swap.deferred import products

WIDTH, HEADS, BATCH, LENGTH = 32, 4, 2, 24


def draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """Subclasses write attend(q, k, v), (B, H, S, D) each."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop, self.softmax = nn.Dropout(dropout), nn.Softmax(dim=-1)
        self.scale, self.dropout = (WIDTH // HEADS) ** -0.5, dropout
        self.bias = nn.Parameter(draw(HEADS, LENGTH, LENGTH, seed=2))
        self.temperature = nn.Parameter(draw(HEADS, 1, 1, seed=3))
        self.register_buffer("causal", torch.ones(LENGTH, LENGTH).tril().view(1, 1, LENGTH, LENGTH))
        self.register_buffer("padding", torch.arange(LENGTH) >= torch.tensor([[LENGTH], [LENGTH - 5]]))
        self.register_buffer("lonely", torch.arange(LENGTH) >= torch.tensor([[LENGTH], [0]]))
        self.kept: object = None

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.proj(self.attend(q, k, v).transpose(1, 2).contiguous().view(x.shape))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


def parts_of(module: nn.Module, x: Tensor, *args: object) -> list[Tensor]:
    """The output, and all gradients."""
    x = x.detach().requires_grad_()
    out = module(x, *args)
    out = out[0] if isinstance(out, tuple) else out
    leaves = [x, *module.parameters()]
    gradients = torch.autograd.grad((out * draw(*out.shape, seed=9)).sum(), leaves, allow_unused=True)
    return [out, *(torch.zeros(1) if g is None else g for g in gradients)]


X = draw(BATCH, LENGTH, WIDTH)


class Program(Attention):
    """Random operations on a few variables, in a straight line. Names one product and one softmax: @ and softmax."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.steps, self.log = seed, []

    def attend(self, q, k, v):
        if self.dropout:
            return (q @ k.mT).softmax(-1) @ v
        return run_program(self, q, k, v)


def run_program(module: Program, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What it does depends on the seed and on shapes alone."""
    choose = random.Random(module.steps)
    small, scores, log = [q * 1.0, k * 1.0, v * 1.0], [], module.log
    log.clear()  # nothing is set: a forward that stores what may be weights runs as it is where there are gradients
    see = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    masks = [~see, module.padding[:, None, None], module.lonely[:, None, None], ~see.flip(1) & ~see]
    out = v * 0.1
    for _ in range(choose.randint(3, 12)):
        if not scores or choose.random() < 0.15:
            q, k = choose.choice(small), choose.choice(small).mT
            scores.append(q @ (k.contiguous() if choose.random() < 0.3 else k))
            log.append("product")
            continue
        i = choose.randrange(len(scores)) if choose.random() < 0.3 else len(scores) - 1
        s, what = scores[i], choose.randrange(27)
        log.append(f"{what} of {i}")
        if what < 3:
            scores[i] = s * choose.choice((0.35, 0.5, module.temperature.exp()))
        elif what == 3:
            scores[i] = s / 2.0
        elif what < 6:
            scores[i] = s + choose.choice((module.bias, masks[0] * -1e4, s.new_zeros(LENGTH).float()))
        elif what < 9:
            scores[i] = s.masked_fill(choose.choice(masks), choose.choice((-1e9, -1e4, -3e38)))
        elif what == 9:
            scores[i] = s.masked_fill(masks[0], -math.inf)
        elif what < 13:
            scores.append(s.softmax(-1))
        elif what == 13:
            scores[i] = F.dropout(s, 0.0 if choose.random() < 0.7 else 0.3, module.training and choose.random() < 0.0)
        elif what < 18:
            out = out + s.softmax(-1) @ choose.choice(small)
        elif what == 18:
            out = out + (s.softmax(-1) @ choose.choice(small)).tanh()
            scores.append(s)
        elif what == 19:
            s.mul_(0.5)
        elif what == 20:
            s.masked_fill_(choose.choice(masks), choose.choice((-1e9, -1e4, 0.0)))
        elif what == 21:
            s.add_(module.bias * 0.5)
        elif what == 22:
            scores[i] = s.view(-1, LENGTH, LENGTH).view(BATCH, HEADS, LENGTH, LENGTH)
        elif what == 23:
            s[..., 0] = 0.25
        elif what == 24:
            scores.append(s.transpose(-1, -2) if choose.random() < 0.5 else s[:, :, :LENGTH])
        elif what == 25:
            turned = s.softmax(-1).mT
            out = out + (choose.choice(small).mT @ turned).mT + (0.5 * turned @ v if choose.random() < 0.2 else 0)
        else:
            with torch.set_grad_enabled(choose.random() < 0.5):
                t = choose.choice(small)
                if not torch.is_grad_enabled():
                    out = out + (s.softmax(-1) @ t) * 0.5
                else:
                    scores.append(Straight.apply(s * 1.5))
        if choose.random() < 0.05 and not torch.is_grad_enabled():
            choose.choice(small).mul_(1.5)
    return out + (scores[-1] if choose.random() < 0.2 else scores[0]).clamp(-5, 5).softmax(-1) @ v


def outcome(module: Program, gradients: bool) -> list[Tensor] | str:
    try:
        if gradients:
            return parts_of(module, X)
        with torch.no_grad():
            return [module(X)]
    except RuntimeError as error:
        return str(error).splitlines()[0][:60]


@pytest.mark.parametrize("start", range(0, 400, 40))
def test_random_programs_give_what_they_gave(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attended: list[bool] = []
    real = products.attend
    monkeypatch.setattr(products, "attend", lambda *args: attended.append(True) or real(*args))
    for seed in range(start, start + 40):
        for gradients in (False, True):
            module = Program(seed)
            expected = outcome(module, gradients)
            swap(module, linears=False)
            found = outcome(module, gradients)
            if isinstance(expected, str) or isinstance(found, str):
                assert found == expected, (seed, gradients, module.log)
                continue
            for one, other in zip(found, expected, strict=True):
                scale = 1 + float(other.detach().nan_to_num().abs().max())
                assert torch.allclose(one, other, atol=1e-4 * scale, rtol=1e-3, equal_nan=True), (
                    f"seed {seed}, gradients {gradients}: {float((one - other).abs().max())} of {scale}: {module.log}"
                )
    assert len(attended) > 15
