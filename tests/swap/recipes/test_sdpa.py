"""Classes whose forward calls torch's scaled_dot_product_attention itself."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import fastattn
from fastattn import swap
from fastattn.swap.recipes import sdpa

WIDTH, HEADS = 32, 4


def heads_of(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Attention(nn.Module):
    """As a ViT of timm or nanoGPT writes it."""

    def __init__(self, dropout: float = 0.0, fused: bool = True) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout, self.fused = dropout, fused

    def forward(self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
        q, k, v = map(heads_of, self.qkv(x).chunk(3, dim=-1))
        if self.fused:
            p = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal)
        else:
            y = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


class FullPath(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q = heads_of(x)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


class ByName(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q = heads_of(x)
        return scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


class InAMethod(Attention):
    def attend(self, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(heads_of(x)).transpose(1, 2).flatten(2)


class InAClosure(Attention):
    def forward(self, x: Tensor) -> Tensor:
        scale = 0.5
        each = [F.scaled_dot_product_attention(q, q, q, scale=scale) for q in heads_of(x).split(1)]
        return (lambda parts: torch.cat(parts))(each).transpose(1, 2).flatten(2)


def doubled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def run(self: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return 2 * function(self, *args, **kwargs)

    return run


class Decorated(Attention):
    """Twice, and with super() in it."""

    @doubled
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        q = heads_of(x)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2) + super().extra_repr().count("x")


class DecoratedMethod(InAMethod):
    @doubled
    def attend(self, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q)


class LocalName(Attention):
    def forward(self, x: Tensor) -> Tensor:
        functional, q = F, heads_of(x)
        return functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


class OwnFunction(Attention):
    def scaled_dot_product_attention(self, q: Tensor) -> Tensor:
        return q * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled_dot_product_attention(heads_of(x)).transpose(1, 2).flatten(2)


class CallsSuper(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", (Attention, FullPath, ByName, InAMethod, InAClosure, Decorated, DecoratedMethod))
def test_the_answers_and_gradients_stay(kind: type[Attention]) -> None:
    module = kind()
    x = draw(2, 50, WIDTH).requires_grad_()
    leaves = [x, *module.parameters()]
    expected = module(x)
    gradients = torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True)
    report = swap(module)
    row = next(row for row in report.rows if row.path == "")
    assert (row.action, row.kernel) == ("swapped", "scaled_dot_product_attention")
    with report.counting():
        found = module(x)
    assert (row.calls, row.fallbacks) == (1, {})
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    again = torch.autograd.grad(found.square().sum(), leaves, allow_unused=True)
    for one, other in zip(again, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert inspect.signature(module.forward) == inspect.signature(kind().forward)
    report.undo()
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("options", ({"causal": True}, {"mask": torch.rand(50, 50) < 0.7}, {"mask": draw(4, 50, 50)}))
def test_arguments_reach_the_kernels(options: dict[str, object]) -> None:
    module = Attention().eval()
    expected = module(draw(2, 50, WIDTH), **options)
    report = swap(module, strict=True, backend="reference")
    with report.counting(), fastattn.use_backend("reference"):
        torch.testing.assert_close(module(draw(2, 50, WIDTH), **options), expected, atol=1e-5, rtol=1e-5)
    assert report.all_called


@pytest.mark.parametrize("kind", (LocalName, OwnFunction, CallsSuper))
def test_what_is_not_plain_is_left_alone(kind: type[Attention]) -> None:
    module = kind()
    expected = module(draw(2, 50, WIDTH))
    assert "swapped" not in {row.action for row in swap(module, linears=False).rows}
    assert torch.equal(module(draw(2, 50, WIDTH)), expected)


class OwnName(nn.Module):
    """As litgpt's attention."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled_dot_product_attention(x, x, x)

    def scaled_dot_product_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.3)


def test_a_method_may_have_the_name_of_torchs() -> None:
    module, x = OwnName(), draw(2, 4, 50, 16)
    expected = module(x)
    report = swap(module, strict=True, backend="reference")
    with report.counting(), fastattn.use_backend("reference"):
        torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
    assert report.all_called and report.rows[0].kernel == "scaled_dot_product_attention"


class Skips(nn.Module):
    """As its flag says."""

    fused = False

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x) if self.fused else x


def test_a_forward_that_goes_another_way_is_a_fallback() -> None:
    module = Skips()
    report = swap(module)
    with report.counting():
        module(draw(2, 50, WIDTH))
    reason = "its forward did not call scaled_dot_product_attention"
    assert report.rows[0].fallbacks == {reason: 1} and not report.all_called


def test_what_the_kernels_do_not_take_is_a_fallback_and_can_be_forbidden() -> None:
    module = Attention().eval()
    mask = torch.rand(50, 50).double()
    report = swap(module)
    with report.counting(), pytest.raises(RuntimeError):
        module(draw(2, 50, WIDTH), mask)  # as torch says
    assert list(report.rows[0].fallbacks) == ["attn_mask has dtype torch.float64 beside query of torch.float32"]
    report.undo()
    swap(module, backend="cpu")
    with pytest.raises(fastattn.NotSupported, match="attn_mask has dtype"):
        module(draw(2, 50, WIDTH), mask)


def test_a_forced_backend_is_that_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of no other that calls torch's function in the same thread."""
    from fastattn.backends import reference

    calls: list[bool] = []
    forward = reference.attention_forward
    monkeypatch.setattr(reference, "attention_forward", lambda *args: calls.append(True) or forward(*args))
    forced, free = Attention().eval(), Attention().eval()
    swap(forced, backend="reference")
    swap(free)
    with torch.no_grad():
        free(draw(2, 5, WIDTH))
        assert not calls
        forced(draw(2, 5, WIDTH))
        free(draw(2, 5, WIDTH))
    assert len(calls) == 1


def test_a_method_replaced_later_runs() -> None:
    module = InAMethod()
    report = swap(module)
    module.attend = lambda q: q * 0
    with report.counting():
        assert not module(draw(2, 5, WIDTH)).any()
    assert report.rows[0].fallbacks == {"its attend was replaced": 1}


def test_a_decorated_method_replaced_later_runs() -> None:
    report = swap(DecoratedMethod())
    module = report.swapped_modules[""]
    module.attend = lambda q: q * 0
    with report.counting():
        assert not module(draw(2, 5, WIDTH)).any()
    assert report.rows[0].fallbacks == {"its attend was replaced": 1}


def test_dropout_is_drawn_in_training_alone() -> None:
    module = Attention(dropout=0.5)
    swap(module)
    x = draw(2, 50, WIDTH)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_a_thread_without_an_eager_call_compiles_graph_after_graph() -> None:
    module = Attention().eval()
    expected = copy.deepcopy(module)
    swap(module)
    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager")
    found: list[Tensor | BaseException] = []

    def work() -> None:
        try:
            found.extend(compiled(torch.ones(batch, length, WIDTH)) for batch, length in ((2, 9), (3, 12)))
            with torch.no_grad():
                found.append(compiled(torch.ones(2, 9, WIDTH)))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [type(result) for result in found] == [Tensor] * 3, found[-1]
    torch.testing.assert_close(found[1], expected(torch.ones(3, 12, WIDTH)))


@pytest.mark.parametrize("kind", (Attention, ByName, InAMethod))
def test_compiles_whole_and_is_exported(kind: type[Attention]) -> None:
    torch._dynamo.reset()
    module = kind().eval()
    x = draw(2, 50, WIDTH)
    expected = module(x)
    swap(module, linears=False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        graph = torch.export.export(module, (x,), strict=False).graph
    assert any("fastattn.attention" in str(node.target) for node in graph.nodes)


def test_copies_and_threads() -> None:
    module = Attention().eval()
    x = draw(2, 50, WIDTH)
    expected = module(x)
    swap(module)
    twin = copy.deepcopy(module)
    report = swap(nn.ModuleList([nn.Identity()]))
    assert not report.swapped_modules
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(twin(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        torch.testing.assert_close(each, expected, atol=1e-5, rtol=1e-5)


def test_saved_whole_it_loads_swapped_in_a_fresh_process(fresh_process, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "import torch.nn.functional as F\nfrom torch import nn\n\n\n"
        "class Attention(nn.Module):\n"
        "    def forward(self, q):\n        return F.scaled_dot_product_attention(q, q, q)\n"
    )
    script = (
        "import sys, torch\nsys.path.insert(0, {0!r})\nimport theirs, fastattn\nm = theirs.Attention()\n"
        "fastattn.swap(m)\ntorch.save(m, {0!r} + '/m.pt')\n"
    )
    load = (
        "import sys, torch\nsys.path.insert(0, {0!r})\nm = torch.load({0!r} + '/m.pt', weights_only=False)\n"
        "from fastattn import dispatch\nq = torch.ones(1, 2, 3, 8).requires_grad_()\n"
        "assert torch.equal(m(q), q)\n"
        "print([choice.backend.__name__ for choice in dispatch._choices.values()])\n"
    )
    for text in (script, load):
        run = fresh_process(text.format(str(tmp_path)))
        assert run.returncode == 0, run.stderr
    assert "fastattn.backends" in run.stdout


class Nested(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x: Tensor) -> Tensor:
        q = heads_of(x)
        return self.inner(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_within_another_keeps_its_own_backend(compiled, monkeypatch, long_way) -> None:
    asked: list[str | None] = []
    real = sdpa.on_kernels

    def noted(*args: object) -> Tensor:
        asked.append(args[-1])
        return real(*args)

    monkeypatch.setattr(sdpa, "on_kernels", noted)
    module, x = Nested(), torch.randn(2, 5, WIDTH)
    expected = module(x)
    swap(module.inner)
    swap(module, backend="reference")
    if compiled:
        module.inner.compile(backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
    assert asked == ["reference", None]


@pytest.mark.usefixtures("long_way")
def test_on_a_gpu_without_kernels_torchs_function_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "no kernels run on this GPU: cuda: too old"
    monkeypatch.setattr(sdpa, "why_no_kernels", lambda query, backend: None if backend else reason)
    module, x = Attention(), torch.randn(2, 5, WIDTH)
    expected = module(x)
    report = swap(module)
    with report.counting():
        torch.testing.assert_close(module(x), expected)
    assert {reason: 1} in [row.fallbacks for row in report.rows]


def test_what_stands_in_the_place_of_torchs_is_called_by_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other parameters may be its own, as SageAttention's are, in an order of their own."""
    module, x = Attention(), torch.randn(2, 7, WIDTH)
    expected = module(x, causal=True)
    report, theirs = swap(module), F.scaled_dot_product_attention

    def sage(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, **rest):
        assert (tensor_layout, sm_scale, rest) == ("HND", None, {})
        return theirs(q, k, v, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", sage)
    with report.counting():
        torch.testing.assert_close(module(x, causal=True), expected)
    assert report.rows[0].fallbacks == {"torch's scaled_dot_product_attention was replaced": 1}
