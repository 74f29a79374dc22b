"""Feed-forward blocks whose flags, or those of their config, say how they are spelled."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
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


def test_compiles_whole(compiles_whole) -> None:
    compiles_whole(build().eval(), X)


# ---- the form of gelu in a config ------------------------------------------------------------------------------------


class Config:
    def __init__(self, form: object) -> None:
        self.form = form


class OfForm(nn.Module):
    """As litgpt writes it."""

    def __init__(self, form: object) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.beside = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.config = Config(form)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden = F.gelu(hidden, approximate=self.config.form)
        return self.down(hidden)


class GatedOfForm(OfForm):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x), approximate=self.config.form) * self.beside(x)
        return self.down(hidden)


class FormOfItsOwn(OfForm):
    def __init__(self, form: object) -> None:
        super().__init__(form)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.form))


forms = pytest.mark.parametrize(
    ("kind", "kernel"), ((OfForm, "ffn"), (GatedOfForm, "gated_ffn"), (FormOfItsOwn, "ffn"))
)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("form", ("none", "tanh"))
@forms
def test_forms_of_gelu(kind: type[OfForm], kernel: str, form: str, dtype: torch.dtype) -> None:
    original = kind(form).to(dtype)
    module = copy.deepcopy(original)
    report = swap(module, strict=True, linears=False)
    assert row_of(report).kernel == kernel
    exact = copy.deepcopy(original).double()
    found, eager, true = [], [], []
    for each, results in ((original, eager), (exact, true), (module, found)):
        x = X.bfloat16().to(next(each.parameters()).dtype).requires_grad_()
        with report.counting():
            y = each(x)
        used = [p for p in each.parameters() if kernel == "gated_ffn" or p not in set(each.beside.parameters())]
        results += [y.detach(), *torch.autograd.grad(y.double().sum(), [x, *used])]
        assert y.dtype is x.dtype
    assert report.all_called
    for one, other, best in zip(found, eager, true, strict=True):
        bound = 2 * (other - best).abs().max() + 4 * torch.finfo(dtype).eps * best.abs().max()
        assert (one - best).abs().max() <= bound
    assert module.state_dict().keys() == original.state_dict().keys()
    report.undo()
    assert type(module) is kind


@forms
def test_a_form_is_looked_at_at_every_call(kind: type[OfForm], kernel: str) -> None:
    module = kind("none")
    report = swap(module)
    module.config.form = module.form = "tanh"
    with report.counting():
        torch.testing.assert_close(module(X), kind("tanh")(X), atol=1e-6, rtol=1e-6)
    assert report.all_called
    module.config.form = module.form = "other"
    with pytest.raises(RuntimeError, match="approximate"), report.counting():
        module(X)
    assert row_of(report).fallbacks == {"its flags are those of another branch": 1}


@pytest.mark.parametrize("form", ("other", None))
@forms
def test_another_form_is_left(kind: type[OfForm], kernel: str, form: object) -> None:
    module = kind(form)
    swap(module, linears=False)
    assert type(module) is kind


@forms
def test_forms_compile_whole(compiles_whole, kind: type[OfForm], kernel: str) -> None:
    compiles_whole(kind("tanh").eval(), X)
