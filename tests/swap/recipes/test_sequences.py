"""Sequences whose first linear and activation are within a child, as in F5-TTS and latent-diffusion."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.swap import plan, swap

WIDTH, HIDDEN = 16, 24
X = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(5))


class ProjectedGEGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, 2 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class WithHelper(ProjectedGEGLU):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * self.act(gate)

    def act(self, gate: Tensor) -> Tensor:
        return F.silu(gate)


class OfForm(nn.Module):
    def __init__(self, form: str = "tanh") -> None:
        super().__init__()
        self.proj, self.approximate = nn.Linear(WIDTH, HIDDEN), form

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate=self.approximate)


class NoActivation(OfForm):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def nested(*more: nn.Module) -> nn.Sequential:
    inner = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), *more)
    return nn.Sequential(inner, nn.Dropout(0.5), nn.Linear(HIDDEN, WIDTH))


def begun_by(first: nn.Module, *more: nn.Module) -> nn.Sequential:
    return nn.Sequential(first, nn.Dropout(0.5), nn.Linear(HIDDEN, WIDTH), *more)


MAKE = {
    "nested": (nested, "ffn"),
    "geglu": (lambda: begun_by(ProjectedGEGLU()), "gated_ffn"),
    "helper": (lambda: begun_by(WithHelper(), nn.Dropout(0.5)), "gated_ffn"),
    "form": (lambda: begun_by(OfForm()), "ffn"),
}
kinds = pytest.mark.parametrize("kind", MAKE)


def build(kind: str) -> nn.Sequential:
    torch.manual_seed(3)
    return MAKE[kind][0]()


def results(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    module.zero_grad()
    x = X.bfloat16().to(dtype).requires_grad_()
    y = module(x)
    (y * torch.linspace(-1, 1, WIDTH).bfloat16().to(dtype)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_as_near_to_the_exact_one_as_the_original(kind: str, dtype: torch.dtype) -> None:
    module = build(kind).bfloat16().to(dtype).eval()
    exact = results(copy.deepcopy(module).double(), torch.float64)
    eager, keys = results(module, dtype), list(module.state_dict())
    report = swap(module, strict=True)
    with report.counting():
        found = results(module, dtype)
    (row,) = [row for row in report.rows if row.path == ""]
    assert (row.kernel, row.calls, row.fallbacks) == (MAKE[kind][1], 1, {}) and list(module.state_dict()) == keys
    for one, other, true in zip(found, eager, exact, strict=True):
        error, bound, size = (float(each.abs().max()) for each in (one.double() - true, other.double() - true, true))
        assert one.dtype is dtype and error <= 2 * bound + 2 * torch.finfo(dtype).eps * size
    report.undo()
    assert type(module) is nn.Sequential and torch.equal(results(module, dtype)[0], eager[0])


@kinds
def test_compiles_as_one_graph(compiles_whole, kind: str) -> None:
    compiles_whole(build(kind).eval(), X)


@kinds
def test_dropouts_drop_in_training_alone(kind: str) -> None:
    module = build(kind)
    swap(module)
    assert not torch.equal(module(X), module(X))
    module.eval()
    assert torch.equal(module(X), module(X))


@kinds
@pytest.mark.parametrize("where", ["", "proj"])
def test_hooks_on_what_is_within_are_called(kind: str, where: str) -> None:
    module, original = build(kind).eval(), build(kind).eval()
    report = swap(module)
    path = "0" if not where else "0.0" if kind == "nested" else "0.proj"
    for each in (module, original):
        each.get_submodule(path).register_forward_hook(lambda child, args, y: y + 1)
    with report.counting():
        torch.testing.assert_close(module(X), original(X), atol=1e-5, rtol=1e-5)
    assert next(row for row in report.rows if row.path == "").fallbacks == {f"{path} has hooks": 1}


def test_a_helper_or_a_forward_replaced_later(monkeypatch: pytest.MonkeyPatch) -> None:
    module, original = build("helper").eval(), build("helper").eval()
    report = swap(module)
    for each in (module, original):
        each[0].act = torch.sigmoid
    with report.counting():
        torch.testing.assert_close(module(X), original(X))
    assert next(row for row in report.rows if row.path == "").fallbacks == {"0 has its act replaced on the instance": 1}
    module, original = build("geglu").eval(), build("geglu").eval()
    report = swap(module)
    monkeypatch.setattr(ProjectedGEGLU, "forward", lambda self, x: self.proj(x)[..., :HIDDEN])
    with report.counting():
        torch.testing.assert_close(module(X), original(X))
    assert len(next(row for row in report.rows if row.path == "").fallbacks) == 1


def test_another_form_or_another_child_later() -> None:
    module = build("form").eval()
    report = swap(module)
    module[0].approximate = "none"
    expected = copy.deepcopy(module)
    report.undo()
    torch.testing.assert_close(expected(X), module(X), atol=1e-5, rtol=1e-5)
    module = build("nested").eval()
    swap(module)
    module[0].append(nn.Tanh())
    expected = nested(nn.Tanh()).eval()
    expected.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(X), expected(X))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nested(nn.Dropout(0.5)),
        lambda: begun_by(OfForm("other")),
        lambda: begun_by(NoActivation()),
        lambda: nn.Sequential(ProjectedGEGLU()),
        lambda: nn.Sequential(nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU())),
        lambda: nn.Sequential(nn.Sequential(nn.GELU(), nn.Linear(WIDTH, HIDDEN)), nn.Linear(HIDDEN, WIDTH)),
        lambda: nn.Sequential(nn.ModuleList([nn.Linear(WIDTH, HIDDEN), nn.GELU()]), nn.Linear(HIDDEN, WIDTH)),
        lambda: nn.Sequential(ProjectedGEGLU(), nn.Tanh(), nn.Linear(HIDDEN, WIDTH)),
        lambda: nn.Sequential(nn.LayerNorm(WIDTH), ProjectedGEGLU(), nn.Linear(HIDDEN, WIDTH)),
        lambda: nn.Sequential(nn.Sequential(), nn.Linear(HIDDEN, WIDTH)),
        lambda: nn.Sequential(),
    ],
)
def test_other_sequences_are_no_business_of_a_swap(make) -> None:
    assert not [row for row in plan(make(), linears=False).rows if row.path == ""]
