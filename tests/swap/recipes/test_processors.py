"""Attention that hands itself to an object that it holds, and the functions on the way to torch's."""

from __future__ import annotations

import copy
import inspect
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn import swap

WIDTH, HEADS = 32, 4


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Processor:
    """As diffusers writes it."""

    shift: float | None = None

    def __call__(self, attn, x, context=None, mask=None, temb=None, *args, **kwargs) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for y in (attn.to_q(x), attn.to_k(context), attn.to_v(context))
        )
        if self.shift is not None:
            v = v + self.shift
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)
        return attn.to_out[1](attn.to_out[0](y.transpose(1, 2).flatten(2)))


class ByAFunction(Processor):
    def __call__(self, attn, x, context=None, mask=None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for y in (attn.to_q(x), attn.to_k(context), attn.to_v(context))
        )
        return attn.to_out[0](attend(q, k, v, mask).transpose(1, 2).flatten(2))


class WrittenOut(Processor):
    def __call__(self, attn, x, context=None, mask=None) -> Tensor:
        return attn.to_out[0](attn.to_v(x)) * 2


class WithWeights(nn.Module):
    """As diffusers' IP adapters: a module with a `__call__` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(WIDTH, WIDTH)

    def __call__(self, attn, x, context=None, mask=None) -> Tensor:
        q = self.scale(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2).flatten(2)


class ByForward(nn.Module):
    def forward(self, attn, x, context=None, mask=None) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Attention(nn.Module):
    def __init__(self, processor: object = None) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Dropout(0.0)])
        self.processor = Processor() if processor is None else processor

    def forward(self, x, context=None, mask=None, **options) -> Tensor:
        known = set(inspect.signature(self.processor.__call__).parameters.keys())
        options = {name: value for name, value in options.items() if name in known}
        if context is None:
            return self.processor(self, x, mask=mask, **options)
        return self.processor(self, x, context, mask, **options)


class KeepsAnother(Attention):
    """Whose forward does not hand itself on."""

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(x.shape, x)


class Rebinds(Attention):
    def forward(self, x: Tensor) -> Tensor:
        self = copy.copy(self)
        return self.processor(self, x)


def first_of(one: object, other: object) -> object:
    return one


class Mentions(Attention):
    """Whose forward does other things with the processor and with itself, all of which stay as they are."""

    def forward(self, x: Tensor) -> Tensor:
        same = first_of(self.processor, self) is (self.processor, self)[0] is [self.processor, self][0]
        assert same and self.processor != self and type(self.processor).__name__.startswith("P")
        for _ in range(2):
            y = self.processor(self, self.to_q(x))
        options = {"mask": None}
        return y + self.to_out[0](self.to_q(x)) + self.processor(self, x, **options)


class Visitor(nn.Module):
    """No attention, and calls what it holds with itself all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.visit = lambda module, x: x * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.visit(self, x)


class CallsAFunction(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return attend(q, q, q, None).transpose(1, 2).flatten(2)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


X, CONTEXT = draw(3, 50, WIDTH), draw(3, 20, WIDTH)
CALLS: dict[str, dict[str, object]] = {
    "self": {},
    "cross": {"context": CONTEXT},
    "padding": {"context": CONTEXT, "mask": torch.arange(20).lt(torch.tensor([5, 20, 1])[:, None])[:, None, None]},
    "bias": {"mask": draw(3, HEADS, 50, 50)},
}


def build(kind: type[Attention] = Attention, processor: object = None) -> Attention:
    torch.manual_seed(3)
    return kind(processor)


def only_row(report: fastattn.swap.SwapReport) -> fastattn.swap.Row:
    return next(row for row in report.rows if row.path == "")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("processor", (Processor, ByAFunction))
def test_answers_and_gradients_stay(processor: type[Processor], call: str) -> None:
    module = build(processor=processor())
    x = X.clone().requires_grad_()
    leaves = [x, *module.parameters()]
    expected = module(x, **CALLS[call])
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    report = swap(module)
    with report.counting():
        found = module(x, **CALLS[call])
    assert report.all_called and only_row(report).kernel == "scaled_dot_product_attention"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(torch.autograd.grad(found.square().sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    report.undo()
    assert type(module) is Attention and torch.equal(module(x, **CALLS[call]), expected)


def test_the_kernels_run_and_options_are_sorted_out_as_before() -> None:
    module = build().eval()
    swap(module, strict=True, backend="reference")
    expected = build().eval()(X)
    torch.testing.assert_close(module(X, temb=3, unknown=4), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(module(X), expected, atol=1e-5, rtol=1e-5)


def test_a_function_in_the_place_of_torchs_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build().eval()
    report = swap(module)
    calls: list[int] = []
    theirs = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *args, **kwargs: calls.append(1) or theirs(*args, **kwargs)
    )
    with report.counting(), torch.no_grad():
        torch.testing.assert_close(module(X), build().eval()(X), atol=1e-5, rtol=1e-5)
    assert len(calls) == 2  # of the module that is not swapped, too
    assert only_row(report).fallbacks == {"torch's scaled_dot_product_attention was replaced": 1}


def test_what_the_processor_holds_is_looked_at_at_every_call() -> None:
    module = build().eval()
    report = swap(module)
    expected = build().eval()
    module.processor.shift = expected.processor.shift = 2.0
    torch.testing.assert_close(module(X), expected(X), atol=1e-5, rtol=1e-5)
    assert type(module.processor) is Processor
    report.undo()
    assert torch.equal(module(X), expected(X))


@pytest.mark.parametrize("processor", (ByAFunction, WithWeights))
def test_a_processor_that_is_set_later_is_as_good(processor: type) -> None:
    module = build()
    report = swap(module)
    module.processor = processor()
    expected = build()
    expected.processor = module.processor
    with report.counting():
        torch.testing.assert_close(module(X), expected(X), atol=1e-5, rtol=1e-5)
    assert report.all_called


@pytest.mark.parametrize("processor", (WrittenOut(), lambda attn, x, **_: x * 3))
def test_one_that_cannot_be_copied_runs_as_it_is(processor: object) -> None:
    expected = build(processor=processor)(X)
    left = build(processor=processor)
    row = only_row(swap(left))
    assert row.action == "left" and "its processor is a" in row.reason and torch.equal(left(X), expected)
    module = build()
    report = swap(module, linears=False)
    module.processor = processor
    with report.counting():
        assert torch.equal(module(X), expected)
    (reason,) = only_row(report).fallbacks
    assert reason.endswith("whose __call__ does not call scaled_dot_product_attention")
    report.undo()
    module.processor = Processor()
    swap(module, strict=True)
    module.processor = processor
    with pytest.raises(fastattn.NotSupported, match="its processor is a"):
        module(X)


def test_a_module_that_is_called_is_a_module_of_its_own() -> None:
    module = build(processor=ByForward())
    expected = module(X)
    report = swap(module, linears=False, strict=True)
    with report.counting():
        torch.testing.assert_close(module(X), expected, atol=1e-5, rtol=1e-5)
    assert [row.path for row in report.rows] == ["processor"] and report.all_called


def test_a_call_that_was_replaced_since_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build()
    report = swap(module)
    monkeypatch.setattr(Processor, "__call__", WrittenOut.__call__)
    with report.counting():
        assert torch.equal(module(X), module.to_out[0](module.to_v(X)) * 2)
    assert not report.all_called
    monkeypatch.setattr(Processor, "__call__", ByAFunction.__call__)
    with report.counting():
        module(X)
    assert report.all_called


@pytest.mark.parametrize("through", ("a processor", "its forward"))
def test_a_function_that_was_replaced_since_is_the_one_that_runs(through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(processor=ByAFunction()) if through == "a processor" else build(CallsAFunction)
    report = swap(module, linears=False)
    with report.counting():
        expected = module(X)
    assert report.all_called
    monkeypatch.setitem(globals(), "attend", lambda q, k, v, mask: v * 0 + 1)
    with report.counting():
        assert not torch.allclose(module(X), expected)
    assert not report.all_called


@pytest.mark.parametrize("kind", (KeepsAnother, Rebinds, Visitor))
def test_what_only_looks_alike_is_left_alone(kind: type[nn.Module]) -> None:
    module = kind()
    assert "swapped" not in {row.action for row in swap(module, linears=False).rows}
    assert type(module) is kind


def test_only_the_call_is_another_one() -> None:
    module = build(Mentions)
    expected = module(X)
    report = swap(module, linears=False)
    with report.counting():
        torch.testing.assert_close(module(X), expected, atol=1e-5, rtol=1e-5)
    assert report.all_called


def test_a_visitor_is_no_business_of_a_swap() -> None:
    assert not swap(Visitor()).rows


def test_adapters_hooks_and_a_replaced_forward_are_kept() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    module, seen = build(), []
    report = swap(module)
    adapted = Adapted(WIDTH, WIDTH)
    module.to_q = adapted
    module.register_forward_hook(lambda module, args, result: seen.append(result))
    expected = build()
    expected.to_q = adapted
    torch.testing.assert_close(module(X), expected(X), atol=1e-5, rtol=1e-5)
    assert len(seen) == 1
    module.forward = lambda x: x * 5
    assert torch.equal(module(X), X * 5)
    with pytest.raises(RuntimeError, match="replaced on the instance"):
        report.undo()


def test_copies_keep_a_processor_of_their_own() -> None:
    module = build()
    swap(module)
    twin = copy.deepcopy(module)
    twin.processor.shift = 1.0
    assert module.processor.shift is None
    expected = build()
    torch.testing.assert_close(module(X), expected(X), atol=1e-5, rtol=1e-5)
    expected.processor.shift = 1.0
    torch.testing.assert_close(twin(X), expected(X), atol=1e-5, rtol=1e-5)


def test_one_processor_of_two_models_stays_as_it_is_in_the_other() -> None:
    shared = Processor()
    module, other = build(processor=shared), build(processor=shared)
    swap(module)
    assert type(other) is Attention and other.processor is module.processor
    torch.testing.assert_close(module(X), other(X), atol=1e-5, rtol=1e-5)


def test_compiles_whole_and_again_for_another_processor() -> None:
    torch._dynamo.reset()
    module, expected = build().eval(), build().eval()
    swap(module, linears=False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for processor in (Processor(), ByAFunction(), WrittenOut()):
        module.processor = expected.processor = processor
        for call in ({}, CALLS["padding"]):
            torch.testing.assert_close(compiled(X, **call), expected(X, **call), atol=1e-5, rtol=1e-5)
    module.processor = Processor()
    with torch.no_grad():
        graph = torch.export.export(module, (X,), strict=False).graph
    assert any("fastattn.attention" in str(node.target) for node in graph.nodes)


def test_saved_whole_it_loads_swapped_in_a_fresh_process(fresh_process, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "import torch.nn.functional as F\nfrom torch import nn\n\n\n"
        "class Processor:\n"
        "    def __call__(self, attn, q):\n        return F.scaled_dot_product_attention(q, q, q)\n\n\n"
        "class Attention(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.processor = Processor()\n\n"
        "    def forward(self, q):\n        return self.processor(self, q)\n"
    )
    script = (
        "import sys, torch\nsys.path.insert(0, {0!r})\nimport theirs, fastattn\nm = theirs.Attention()\n"
        "assert fastattn.swap(m).swapped_modules\ntorch.save(m, {0!r} + '/m.pt')\n"
    )
    load = (
        "import sys, torch\nsys.path.insert(0, {0!r})\nm = torch.load({0!r} + '/m.pt', weights_only=False)\n"
        "q = torch.ones(1, 2, 3, 8).requires_grad_()\nassert torch.equal(m(q), q)\n"
        "from fastattn import dispatch\n"
        "print([choice.backend.__name__ for choice in dispatch._choices.values()])\n"
    )
    for text in (script, load):
        run = fresh_process(text.format(str(tmp_path)))
        assert run.returncode == 0, run.stderr
    assert "fastattn.backends" in run.stdout


# ---- functions -------------------------------------------------------------------------------------------------------


def test_a_function_of_the_same_package_is_followed() -> None:
    module = build(CallsAFunction)
    expected = module(X)
    report = swap(module, linears=False)
    with report.counting():
        torch.testing.assert_close(module(X), expected, atol=1e-5, rtol=1e-5)
    assert report.all_called
    report.undo()
    assert torch.equal(module(X), expected)


# ---- diffusers' registry of backends ---------------------------------------------------------------------------------


REGISTRY = """
import enum
import torch


class Name(str, enum.Enum):
    NATIVE = "native"
    OTHER = "other"


class _AttentionBackendRegistry:
    _backends = {}
    _active = Name.NATIVE
    _checks_enabled = False

    @classmethod
    def get_active_backend(cls):
        return cls._active, cls._backends[cls._active]


def dispatch_attention_fn(query, key, value, attn_mask=None, *, backend=None):
    if backend is None:
        backend_name, backend_fn = _AttentionBackendRegistry.get_active_backend()
    else:
        backend_name, backend_fn = backend, _AttentionBackendRegistry._backends.get(backend)
    if _AttentionBackendRegistry._checks_enabled:
        raise ValueError("checked")
    return backend_fn(query, key, value, attn_mask)


def _native_attention(query, key, value, attn_mask):
    query, key, value = (x.permute(0, 2, 1, 3) for x in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=attn_mask)
    return out.permute(0, 2, 1, 3)


def other(query, key, value, attn_mask):
    return value * 2


_AttentionBackendRegistry._backends = {Name.NATIVE: _native_attention, Name.OTHER: other}
"""

MODELS = """
from diffusers.models.attention_dispatch import dispatch_attention_fn


class Processor:
    _attention_backend = None

    def __call__(self, attn, x, mask=None):
        q = x.unflatten(-1, (4, -1))
        return dispatch_attention_fn(q, q, q, attn_mask=mask, backend=self._attention_backend).flatten(2)
"""


@pytest.fixture
def diffusers(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """What is spelled as diffusers' dispatch is, in modules of its names."""
    made = {}
    for name, source in (("diffusers.models.attention_dispatch", REGISTRY), ("diffusers.models.flux", MODELS)):
        module = made[name] = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        for parent in ("diffusers", "diffusers.models"):
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        exec(source, module.__dict__)
    return types.SimpleNamespace(
        dispatch=made["diffusers.models.attention_dispatch"], flux=made["diffusers.models.flux"]
    )


def test_the_native_backend_of_a_registry_is_taken_and_no_other(diffusers: types.SimpleNamespace) -> None:
    module = build(processor=diffusers.flux.Processor())
    expected = module(X)
    report = swap(module, linears=False)
    with report.counting():
        torch.testing.assert_close(module(X), expected, atol=1e-5, rtol=1e-5)
    assert report.all_called
    registry, names = diffusers.dispatch._AttentionBackendRegistry, diffusers.dispatch.Name
    for chosen in ("by the user", "by the registry"):
        if chosen == "by the user":
            module.processor._attention_backend = names.OTHER
        else:
            module.processor._attention_backend, registry._active = None, names.OTHER
        with report.counting():
            assert torch.equal(module(X), X * 2)
        assert only_row(report).fallbacks == {"its forward did not call scaled_dot_product_attention": 1}
    registry._active, registry._checks_enabled = names.NATIVE, True
    with pytest.raises(ValueError, match="checked"):
        module(X)


def test_a_registry_in_other_words_is_left_alone(diffusers: types.SimpleNamespace) -> None:
    diffusers.flux.dispatch_attention_fn = types.FunctionType(
        (lambda query, key, value, attn_mask=None, backend=None: value).__code__, diffusers.dispatch.__dict__
    )
    diffusers.flux.dispatch_attention_fn.__name__ = "dispatch_attention_fn"
    diffusers.flux.dispatch_attention_fn.__module__ = "diffusers.models.attention_dispatch"
    module = build(processor=diffusers.flux.Processor())
    assert only_row(swap(module, linears=False)).action == "left"


def test_the_registry_compiles_whole(diffusers: types.SimpleNamespace) -> None:
    torch._dynamo.reset()
    module = build(processor=diffusers.flux.Processor()).eval()
    expected = module(X)
    swap(module, linears=False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected, atol=1e-5, rtol=1e-5)
