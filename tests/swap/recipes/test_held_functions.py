"""Classes whose forward calls a function that the module holds, and that calls torch's scaled_dot_product_attention."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import fastattn
from fastattn import swap

WIDTH, HEADS, BATCH, LENGTH = 32, 4, 2, 12


class Attention(nn.Module):
    """Subclasses set self.attend."""

    attend: Callable[..., Tensor]

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = self.attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.proj(y.transpose(1, 2).flatten(2))


def chosen(causal: bool = False) -> Callable[..., Tensor]:
    """A function that calls torch's, of a closure."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout_p: float) -> Tensor:
        if isinstance(mask, str):
            return q * len(mask)
        if mask is not None:
            mask = mask[:, None]
        return nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=causal)

    return attend


def helper(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    mask = None if mask is None else mask[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


class OfAFactory(Attention):
    """As torchtune's."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.attend = chosen()


class ByDefault(Attention):
    """As timesfm's."""

    def __init__(self, dropout: float = 0.0, *, attend: Callable[..., Tensor] = helper) -> None:
        super().__init__(dropout)
        self.attend = attend


class Either(Attention):
    def __init__(self, dropout: float = 0.0, plain: bool = False) -> None:
        super().__init__(dropout)
        self.attend = written if plain else helper


class TorchsOwn(Attention):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.function = F.scaled_dot_product_attention

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:  # type: ignore[override]
        return self.function(q, k, v, None if mask is None else mask[:, None], dropout_p)


class OfThatName(TorchsOwn):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.function = scaled_dot_product_attention


KINDS = (OfAFactory, ByDefault, Either, TorchsOwn, OfThatName)


def draw(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts_of(module: nn.Module, *args: Any) -> list[Tensor]:
    """The output, and all gradients."""
    x = draw(BATCH, LENGTH, WIDTH).requires_grad_()
    out = module(x, *args)
    return [out, *torch.autograd.grad((out * draw(*out.shape, seed=9)).sum(), [x, *module.parameters()])]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * (1 + float(other.detach().abs().max())), rtol=1e-4)


def swapped(module: nn.Module, **options: Any) -> fastattn.SwapReport:
    report = swap(module, linears=False, **options)
    assert [(row.path, row.action, row.kernel) for row in report.rows] == [
        ("", "swapped", "scaled_dot_product_attention")
    ]
    return report


MASK = torch.rand(BATCH, LENGTH, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.7


@pytest.mark.parametrize("mask", [None, MASK, torch.where(MASK, 0.0, -math.inf)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_and_gradients_stay(kind: type[Attention], mask: Tensor | None, on_kernels) -> None:
    module = kind().eval()
    expected, attend = parts_of(module, mask), vars(module).get("attend")
    report = swapped(module)
    with report.counting():
        assert_same(parts_of(module, mask), expected)
        with torch.no_grad():
            torch.testing.assert_close(module(draw(BATCH, LENGTH, WIDTH), mask), expected[0], atol=1e-5, rtol=1e-4)
    (row,) = report.rows
    assert (row.calls, row.fallbacks, row.choices) == (2, {}, {}) and on_kernels() == 2
    assert inspect.signature(module.forward) == inspect.signature(kind().forward)
    assert vars(module).get("attend") is attend and getattr(module, "attend", None) == (attend or module.attend)
    report.undo()
    assert type(module) is kind and torch.equal(module(draw(BATCH, LENGTH, WIDTH), mask), expected[0])


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many calls the reference backend, which is forced, has run."""
    from fastattn.backends import reference

    calls: list[bool] = []
    forward = reference.attention_forward
    monkeypatch.setattr(reference, "attention_forward", lambda *args: calls.append(True) or forward(*args))
    with fastattn.use_backend("reference"):
        yield lambda: len(calls)


def test_dropout_is_drawn_in_training_alone() -> None:
    module = OfAFactory(dropout=0.5)
    swapped(module)
    x = draw(BATCH, LENGTH, WIDTH)
    assert not torch.equal(module(x), module(x))
    torch.manual_seed(3)
    first = module(x)
    torch.manual_seed(3)
    assert torch.equal(module(x), first)
    module.eval()
    assert torch.equal(module(x), module(x))


# ---- what is held may change -----------------------------------------------------------------------------------------


def test_a_function_that_was_set_since_runs() -> None:
    module, x = OfAFactory().eval(), draw(BATCH, LENGTH, WIDTH)
    report = swapped(module)
    for attend, falls_back in ((chosen(causal=True), False), (written, True), (functools.partial(helper), True)):
        module.attend = attend
        plain = Attention().eval()
        plain.attend = attend
        with report.counting():
            torch.testing.assert_close(module(x), plain(x), atol=1e-5, rtol=1e-4)
        reasons = {"its forward did not call scaled_dot_product_attention": 1} if falls_back else {}
        assert report.rows[0].fallbacks == reasons


def test_a_branch_that_does_not_call_it_is_a_fallback() -> None:
    module, x = OfAFactory().eval(), draw(BATCH, LENGTH, WIDTH)
    expected = module(x, "another kind of mask")
    report = swapped(module)
    with report.counting():
        assert torch.equal(module(x, "another kind of mask"), expected)
    assert report.rows[0].fallbacks == {"its forward did not call scaled_dot_product_attention": 1}
    report.undo()
    swapped(module, strict=True)
    with pytest.raises(fastattn.NotSupported, match="did not call"):
        module(x, "another kind of mask")


def test_torchs_function_replaced_since_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = ByDefault().eval(), draw(BATCH, LENGTH, WIDTH)
    report = swapped(module)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, *_, **__: q * 3)
    with report.counting():
        found = module(x)
    report.undo()
    assert torch.equal(found, module(x))


def test_a_missing_attribute_is_theirs_to_name() -> None:
    module = OfAFactory()
    swapped(module)
    del module.attend
    with pytest.raises(AttributeError, match="attend"):
        module(draw(BATCH, LENGTH, WIDTH))


# ---- near misses -----------------------------------------------------------------------------------------------------


class OtherNames(OfAFactory):
    """The name stands for more than the attribute of the module."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        other = ByDefault()
        return super().forward(x, mask) + other.attend(x, x, x)


class InAClosure(OfAFactory):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return (lambda t: self.attend(t, t, t, None, 0.0))(x)


class AnotherSelf(OfAFactory):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self = copy.copy(self)
        return self.attend(x, x, x, None, 0.0)


class NeverSet(Attention):
    def __init__(self, function: Any = None) -> None:
        super().__init__()
        self.attend = function


class OfTheClass(OfAFactory):
    attend = helper


@pytest.mark.parametrize("kind", (OtherNames, InAClosure, AnotherSelf, NeverSet, OfTheClass))
def test_what_is_not_plain_is_left_alone(kind: type[Attention]) -> None:
    assert not [row for row in fastattn.plan(kind(), linears=False).rows if row.action == "swapped"]


@pytest.mark.parametrize(
    "module", [Either(plain=True), ByDefault(attend=functools.partial(helper)), ByDefault(attend=nn.Identity())]
)
def test_a_module_that_holds_something_else_is_left_alone(module: Attention) -> None:
    assert not [row for row in fastattn.plan(module, linears=False).rows if row.action == "swapped"]


def test_the_class_above_may_be_swapped_too() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = OfAFactory(), Either(plain=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    report = swap(Outer(), linears=False)
    assert [(row.path, row.action) for row in report.rows if row.action == "swapped"] == [("first", "swapped")]


# ---- around it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole(kind: type[Attention]) -> None:
    module, x = kind().eval(), draw(BATCH, LENGTH, WIDTH)
    expected = module(x)
    swapped(module, strict=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-4)
    graph = torch.export.export(module, (x,), strict=False)
    assert any("fastattn" in str(node.target) for node in graph.graph.nodes)


def test_copies_of_functions_do_not_keep_them() -> None:
    module = OfAFactory()
    swapped(module)
    module(draw(BATCH, LENGTH, WIDTH))
    held = weakref.ref(module.attend)
    del module
    gc.collect()
    assert held() is None


def test_a_copy_is_swapped() -> None:
    module, x = ByDefault().eval(), draw(BATCH, LENGTH, WIDTH)
    expected = module(x)
    swapped(module)
    other = copy.deepcopy(module)
    assert type(other) is type(module) is not ByDefault
    torch.testing.assert_close(other(x), expected, atol=1e-5, rtol=1e-4)


def test_saved_whole_it_loads_swapped_in_a_fresh_process(fresh_process, tmp_path: Path) -> None:
    (tmp_path / "holding.py").write_text(
        "import torch.nn.functional as F\nfrom torch import nn\n\n\n"
        "class Attention(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.attend = helper\n\n"
        "    def forward(self, q):\n        return self.attend(q)\n\n\n"
        "def helper(q):\n    return F.scaled_dot_product_attention(q, q, q)\n"
    )
    begin = f"import sys, torch\nsys.path.insert(0, {str(tmp_path)!r})\npath = {str(tmp_path / 'module.pt')!r}\n"
    save = "import holding, fastattn\nm = holding.Attention()\nfastattn.swap(m)\ntorch.save(m, path)\n"
    load = (
        "m = torch.load(path, weights_only=False)\nq = torch.ones(1, 2, 3, 8).requires_grad_()\n"
        "assert torch.equal(m(q), q)\nfrom fastattn import dispatch\n"
        "print([choice.backend.__name__ for choice in dispatch._choices.values()])\n"
    )
    for text in (save, load):
        done = fresh_process(begin + text)
        assert done.returncode == 0, done.stderr
    assert "fastattn.backends" in done.stdout
