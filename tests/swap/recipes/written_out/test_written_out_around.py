"""What surrounds attention that a class writes out: weights that are kept, hooks, transformations, threads, files."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn import swap
from fastattn.swap.deferred import products, scores
from fastattn.swap.deferred.tensor import Deferred
from fastattn.swap.recipes import free_linear, written_out

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


class MinGPT(Attention):
    def attend(self, q, k, v):
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.causal == 0, float("-inf"))
        return self.drop(F.softmax(att, dim=-1)) @ v


def parts_of(module: nn.Module, x: Tensor, *args: object) -> list[Tensor]:
    """The output, and all gradients."""
    x = x.detach().requires_grad_()
    out = module(x, *args)
    out = out[0] if isinstance(out, tuple) else out
    leaves = [x, *module.parameters()]
    gradients = torch.autograd.grad((out * draw(*out.shape, seed=9)).sum(), leaves, allow_unused=True)
    return [out, *(torch.zeros(1) if g is None else g for g in gradients)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert type(one) is Tensor
        torch.testing.assert_close(one, other, atol=2e-5 * (1 + float(other.detach().abs().max())), rtol=1e-4)


def row_of(report: fastattn.swap.SwapReport) -> fastattn.swap.Row:
    return next(row for row in report.rows if row.path == "")


# ---- what is kept of scores and weights ------------------------------------------------------------------------------


class Keeps(Attention):
    """Returns its weights, or stores them, as kind says."""

    kind = "returned"

    def attend(self, q, k, v):
        weights = (q @ k.mT * self.scale).softmax(-1)
        if self.kind == "in a buffer":
            self.causal = weights
        elif self.kind == "stored":
            self.kept = weights
        elif self.kind == "in a list":
            self.kept = [{"weights": weights}]
        elif self.kind == "in a child":
            self.drop.kept = weights
        elif self.kind == "elsewhere":
            ELSEWHERE.append(weights)
        elif self.kind == "averaged":
            self.kept = weights.mean(1)
        self.last = weights
        return weights @ v

    def forward(self, x):
        out, last = super().forward(x), self.last
        del self.last
        return (out, last) if self.kind == "returned" else out


ELSEWHERE: list[Tensor] = []


@pytest.mark.parametrize(
    "kind", ("returned", "in a buffer", "stored", "in a list", "in a child", "elsewhere", "averaged")
)
def test_kept_weights_are_what_they_were(kind: str) -> None:
    def found(module: Keeps) -> tuple[Tensor, Tensor]:
        ELSEWHERE.clear()
        out = module(draw(BATCH, LENGTH, WIDTH))
        kept = {
            "returned": lambda: out[1],
            "in a buffer": lambda: module.causal,
            "in a list": lambda: module.kept[0]["weights"],
            "in a child": lambda: module.drop.kept,
            "elsewhere": lambda: ELSEWHERE[0],
        }.get(kind, lambda: module.kept)()
        return (out[0] if kind == "returned" else out), kept

    module = Keeps()
    module.kind = kind
    expected = found(module)
    report = swap(module, linears=False)
    with report.counting():
        out, kept = found(module)
    assert type(out) is Tensor and type(kept) is Tensor
    assert_same([out, kept], list(expected))
    gradients = [torch.autograd.grad(each.square().sum(), module.qkv.weight)[0] for each in (kept, expected[1])]
    assert_same(*([each] for each in gradients))
    module.eval()
    with report.counting(), torch.no_grad():
        out, kept = found(module)
    assert type(out) is Tensor and type(kept) is (Deferred if kind == "elsewhere" else Tensor)
    if kind == "elsewhere":
        assert kept.node.is_made
    assert_same([out, kept + 0], list(expected))
    assert sum(row_of(report).fallbacks.values()) == 1


def test_weights_that_are_kept_after_dropout_are_those_of_the_output() -> None:
    class Dropped(Keeps):
        def attend(self, q, k, v):
            self.last = self.drop((q @ k.mT).softmax(-1))
            self.kept = v
            return self.last @ v

    module = Dropped(dropout=0.5)
    swap(module, linears=False)
    out, weights = module(draw(BATCH, LENGTH, WIDTH))
    assert 0.3 < float((weights == 0).float().mean()) < 0.7
    again = module.proj((weights @ module.kept).transpose(1, 2).reshape(BATCH, LENGTH, WIDTH))
    assert_same([out], [again])


def test_a_module_that_keeps_its_weights_goes_back_to_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Keeps()
    report = swap(module, linears=False)
    products: list[bool] = []
    real = written_out.deferral
    monkeypatch.setattr(written_out, "deferral", lambda *args: products.append(True) or real(*args))
    module.eval()
    with report.counting(), torch.no_grad():
        for _ in range(written_out._RETRY + 1):
            module(draw(BATCH, LENGTH, WIDTH))
    assert len(products) == written_out._PATIENCE + 1
    assert row_of(report).fallbacks == {"its attention scores or weights are kept": written_out._RETRY + 1}


# ---- what surrounds it -----------------------------------------------------------------------------------------------


@pytest.fixture
def module() -> Attention:
    return MinGPT(dropout=0.5).eval()


X = draw(BATCH, LENGTH, WIDTH)


def test_dropout_is_drawn_in_training(module: Attention) -> None:
    module.eval()
    expected = module(X)
    swap(module, linears=False, strict=True)
    module.train()
    assert not torch.equal(module(X), module(X))
    with torch.no_grad():
        mean = torch.stack([module(X) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, expected, atol=0.05, rtol=0.05)
    torch.manual_seed(3)
    first = module(X)
    torch.manual_seed(3)
    assert torch.equal(module(X), first)


def test_hooks_see_what_they_saw(module: Attention) -> None:
    seen: list[Tensor] = []
    report = swap(module, linears=False)
    handle = module.drop.register_forward_hook(lambda child, inputs, output: seen.append(output))
    with report.counting():
        module(X)
    assert type(seen[0]) is Tensor and row_of(report).fallbacks == {"its drop has hooks": 1}
    handle.remove()
    module.proj.register_forward_hook(lambda child, inputs, output: None)
    module.register_forward_hook(lambda child, inputs, output: None)
    with report.counting():
        module(X)
    assert row_of(report).fallbacks == {}


def test_strict_forbids_the_original(module: Attention) -> None:
    swap(module, linears=False, strict=True)
    module(X)
    module.drop.register_forward_hook(lambda child, inputs, output: None)
    with pytest.raises(fastattn.NotSupported, match="its drop has hooks"):
        module(X)
    kept = Keeps()
    swap(kept, linears=False, strict=True)
    with pytest.raises(fastattn.NotSupported, match="its forward stores what may be attention weights"):
        kept(X)
    with pytest.raises(fastattn.NotSupported, match="are kept"), torch.no_grad():
        kept.eval()(X)


def test_a_forced_backend_runs_calls_of_any_size(module: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.backends import reference

    monkeypatch.setattr(written_out, "SMALLEST", {False: 1 << 40, True: 1 << 40})
    calls: list[bool] = []
    forward = reference.attention_forward
    monkeypatch.setattr(reference, "attention_forward", lambda *args: calls.append(True) or forward(*args))
    expected = module(X)
    report = swap(module, linears=False)
    with report.counting():
        for _ in range(3):
            assert torch.equal(module(X), expected)
    assert row_of(report).choices == {written_out.AS_FAST: 3} and not calls
    with fastattn.use_backend("reference"):
        torch.testing.assert_close(module(X), expected, atol=1e-5, rtol=1e-5)
    report.undo()
    swap(module, linears=False, backend="reference")
    torch.testing.assert_close(module(X), expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize("name, least", [("_FIRST_SCORES", BATCH * HEADS * LENGTH**2), ("_FIRST_KEYS", LENGTH)])
def test_channels_first_pays_from_more_on(name: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class ChannelsFirst(Attention):
        def attend(self, q, k, v):
            q, k, v = torch.stack([t.mT for t in (q, k, v)])
            return (v @ (q.mT @ k).softmax(-1).mT).mT

    monkeypatch.setattr(written_out, "SMALLEST", {False: 1, True: 1})
    monkeypatch.setattr(products, "_FIRST_SCORES", 0)
    monkeypatch.setattr(products, "_FIRST_KEYS", 0)
    for limit, choices in ((least, {}), (least + 1, {written_out.AS_FAST: 1})):
        monkeypatch.setattr(products, name, limit)
        module = ChannelsFirst().eval()
        report = swap(module, linears=False)
        with report.counting(), torch.no_grad():
            module(X)
        assert (row_of(report).calls, row_of(report).fallbacks, row_of(report).choices) == (1, {}, choices)


def test_a_learned_bias_on_few_keys_is_trained_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    class Biased(Attention):
        def attend(self, q, k, v):
            return self.softmax(q @ k.mT + self.bias) @ v

    monkeypatch.setattr(written_out, "SMALLEST", {False: 1, True: 1})
    module = Biased()
    report = swap(module, linears=False)
    with report.counting(), torch.no_grad():
        module(X)
    assert row_of(report).choices == {}
    with report.counting():
        module(X)
        module(X)
    assert row_of(report).choices == {written_out.AS_FAST: 2} and row_of(report).fallbacks == {}


def under_vmap(module: nn.Module) -> Tensor:
    return torch.vmap(module)(X[None])[0]


def under_functional_call(module: nn.Module) -> Tensor:
    return torch.func.vjp(module, X)[0]


def under_autocast(module: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return module(X)


def under_a_function_mode(module: nn.Module) -> Tensor:
    with torch.overrides.BaseTorchFunctionMode():
        return module(X)


def under_jvp(module: nn.Module) -> Tensor:
    return torch.func.jvp(module, (X,), (X,))[0]


def of_a_subclass(module: nn.Module) -> Tensor:
    return module(X.as_subclass(type("Mine", (Tensor,), {}))).as_subclass(Tensor)


def compiled(module: nn.Module) -> Tensor:
    torch._dynamo.reset()
    return torch.compile(module, backend="eager", fullgraph=True)(X)


def exported(module: nn.Module) -> Tensor:
    return torch.export.export(module, (X,), strict=False).module()(X)


def traced(module: nn.Module) -> Tensor:
    return torch.jit.trace(module, (X,), check_trace=False)(X)


@pytest.mark.parametrize(
    "run",
    (
        under_vmap,
        under_functional_call,
        under_jvp,
        under_autocast,
        under_a_function_mode,
        of_a_subclass,
        compiled,
        exported,
        traced,
    ),
)
def test_what_torch_does_to_modules_it_does_to_the_original(module: Attention, run) -> None:
    expected = run(copy.deepcopy(module))
    report = swap(module, linears=False)
    with report.counting():
        found = run(module)
    torch.testing.assert_close(found, expected)
    if run not in (compiled, exported):
        assert len(row_of(report).fallbacks) == 1
    with report.counting():
        module(X)
    assert row_of(report).fallbacks == {}


def test_a_default_device_changes_nothing(module: Attention) -> None:
    expected = module(X)
    report = swap(module)
    scores._causal.cache_clear()
    with report.counting(), torch.device("meta"):
        torch.testing.assert_close(module(X), expected)
        drawn = module.train()(X)
        assert drawn.is_cpu and not torch.equal(drawn, expected)
    assert report.all_called and not row_of(report).fallbacks
    torch.testing.assert_close(module.eval()(X), expected)


def test_a_default_device_does_not_move_weights_that_are_kept() -> None:
    class Asks(Keeps):
        def attend(self, q, k, v):
            self.last = self.drop((q @ k.mT).softmax(-1))
            self.kept = self.last.new_zeros(2)
            return self.last @ v

    module = Asks(dropout=0.5)
    swap(module, linears=False)
    with torch.device("meta"):
        _, weights = module(X)
    assert weights.is_cpu and module.kept.is_cpu


def test_on_another_device_it_is_left_with_a_reason(module: Attention) -> None:
    found = row_of(fastattn.plan(module.to("meta")))
    assert found.reason == "attention that a class writes out is taken over on CPUs, and it lies on meta"


class WithoutSoftmax(Attention):
    """That is no child of it."""

    def __init__(self) -> None:
        super().__init__()
        del self.softmax


def test_a_softmax_that_is_made_in_the_call_is_one() -> None:
    """As the first BERTs had it, and what was copied from them."""

    class FirstBertAttention(WithoutSoftmax):
        def attend(self, q, k, v):
            return nn.Softmax(dim=-1)(q @ k.mT * self.scale) @ v

    module = FirstBertAttention().eval()
    with torch.no_grad():
        expected = module(X)
        report = swap(module)
        with report.counting():
            found = module(X)
    assert (row_of(report).calls, row_of(report).fallbacks) == (1, {})
    torch.testing.assert_close(found, expected)


def test_a_class_that_only_multiplies_is_no_attention() -> None:
    class OnlyMultipliesAttention(WithoutSoftmax):
        def attend(self, q, k, v):
            return q @ k.mT @ v

    found = row_of(fastattn.plan(OnlyMultipliesAttention()))
    assert (found.action, found.reason) == ("left", "it takes no softmax")


def test_a_module_with_attention_inside_is_left_to_that(module: Attention) -> None:
    class Outer(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def attend(self, q, k, v):
            return (q @ k.mT).softmax(-1) @ v

    found = {row.path: row.action for row in fastattn.plan(Outer(), linears=False).rows}
    assert found == {"inner": "swap"}


def test_a_method_replaced_later_runs(module: Attention) -> None:
    report = swap(module, linears=False)
    module.attend = lambda q, k, v: v * 0
    with report.counting():
        torch.testing.assert_close(module(X), module.proj.bias.expand(X.shape))
    assert row_of(report).fallbacks == {"its attend was replaced": 1}


def test_errors_are_theirs(module: Attention) -> None:
    short = draw(BATCH, LENGTH, WIDTH // 2)
    swap(module, linears=False)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        module(short)
    with pytest.raises(RuntimeError, match=r"must match the (existing )?size"):
        module(draw(BATCH, LENGTH + 1, WIDTH))
    torch.testing.assert_close(module(X), module(X))


def test_outputs_may_be_viewed_as_products_are() -> None:
    class Views(Attention):
        def forward(self, x):
            q, k, v = self.heads(x)
            out = (q @ k.mT).softmax(-1) @ v
            return out.view(BATCH, -1), out.as_strided((2, 3), (3, 1)), out

    module = Views().eval()
    expected = module(X)
    swap(module, linears=False)
    found = module(X)
    assert_same(list(found), list(expected))
    assert found[2].is_contiguous()


def test_what_is_written_to_behind_the_mode_is_noticed() -> None:
    class Behind(Attention):
        def attend(self, q, k, v):
            q = q.detach().clone()
            dots = q @ k.mT
            with torch._C.DisableTorchFunction():
                q.mul_(2)
            return dots.softmax(-1) @ v

    module = Behind()
    swap(module, linears=False)
    with pytest.raises(RuntimeError, match="leave this module out of the swap"):
        module(X)


def test_copies_and_threads(module: Attention) -> None:
    expected = module(X)
    swap(module, linears=False)
    twin = copy.deepcopy(module)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.extend(twin(X) for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    for each in found:
        torch.testing.assert_close(each, expected, atol=1e-5, rtol=1e-5)


def test_saved_whole_it_loads_swapped_in_a_fresh_process(tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Attention(nn.Module):\n"
        "    def forward(self, q):\n        return (q @ q.mT).softmax(-1) @ q\n"
    )
    script = (
        "import sys, torch\nsys.path.insert(0, {0!r})\nimport theirs, fastattn\nm = theirs.Attention()\n"
        "fastattn.swap(m)\ntorch.save(m, {0!r} + '/m.pt')\n"
    )
    load = (
        "import sys, torch\nsys.path.insert(0, {0!r})\nm = torch.load({0!r} + '/m.pt', weights_only=False)\n"
        "q = torch.randn(1, 2, 400, 8)\n"
        "torch.testing.assert_close(m(q), m.fastattn_original.forward(m, q), atol=1e-5, rtol=1e-5)\n"
        "import fastattn\nr = fastattn.swap(m)\nprint(r)\n"
        "from fastattn.swap.recipes import written_out as w\nassert not w._in_vain and not w._too_small\n"
        "print(type(m).__mro__)\n"
    )
    for text in (script, load):
        run = subprocess.run([sys.executable, "-c", text.format(str(tmp_path))], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    assert "WritesOut" in run.stdout


class Outer(Attention):
    """Attention of its own around a child's, in whose forward it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MinGPT()

    def attend(self, q, k, v):
        dots = q @ k.mT
        x = self.inner(v.transpose(1, 2).flatten(2))
        return dots.softmax(-1) @ v + x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


@pytest.fixture
def every_linear_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the linears here were large, on a machine where the kernel is faster."""
    always = dict.fromkeys(free_linear.PAYS_BY_LONG_CALLS, free_linear.Pays(1, 1, 1))
    for name in ("PAYS_BY_LONG_CALLS", "PAYS_BY_SHORT_CALLS"):
        monkeypatch.setattr(free_linear, name, always)
    for name in ("is_measured", "has_slow_products"):
        monkeypatch.setattr(free_linear, name, lambda dtype: True)
    monkeypatch.setattr(free_linear, "_is_zen4", lambda: False)
    monkeypatch.setattr(free_linear, "_FROM_FEATURES", 1)


@pytest.mark.usefixtures("every_linear_pays")
def test_linears_inside_run_on_their_kernel() -> None:
    model, x = MinGPT().eval(), draw(BATCH, LENGTH, WIDTH)
    expected = parts_of(model, x)
    report = swap(model)
    with report.counting():
        assert_same(parts_of(model, x), expected)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected[0].detach(), atol=2e-5, rtol=1e-4)
    assert {row.path: row.calls for row in report.rows} == {"": 2, "qkv": 2, "proj": 2}
    assert not any(row.choices or row.fallbacks for row in report.rows)


@pytest.mark.usefixtures("every_linear_pays")
def test_few_scores_are_recomputed_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call of its shapes, a checkpoint's, runs without the mode: what is saved has to be the same."""
    monkeypatch.setattr(written_out, "SMALLEST", {False: 10**6, True: 10**6})
    model, x = MinGPT().eval(), draw(BATCH, LENGTH, WIDTH).requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    swap(model)
    out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    (found,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_module_within_another(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Outer()
    expected = parts_of(module, X)
    inner = swap(module.inner, linears=False)
    recipe = written_out.Recipe
    monkeypatch.setattr(written_out, "Recipe", lambda *args, misfit, **options: recipe(*args, **options))
    report = swap(module, linears=False)
    with report.counting(), inner.counting():
        assert_same(parts_of(module, X), expected)
    assert row_of(report).action == "swapped" and row_of(report).fallbacks == {}
    assert row_of(inner).fallbacks == {}


def test_a_torch_that_does_not_tell_the_hooks_of_saved_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(written_out, "TELLS_SAVING_HOOKS", False)
    module, x = MinGPT(), draw(BATCH, LENGTH, WIDTH)
    expected = module(x)
    report = swap(module, linears=False)
    with report.counting(), pytest.warns(UserWarning, match="does not tell the hooks"):
        torch.testing.assert_close(module(x), expected)
    assert not report.all_called
    with report.counting(), torch.no_grad():
        torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)
    assert report.all_called
