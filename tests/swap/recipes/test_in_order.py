"""Feed-forward blocks that call the children of a list in their order."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn import swap

WIDTH, HIDDEN = 16, 48
CALLED: list[str] = []
torch_npu = None


def deprecate(name: str) -> None:
    CALLED.append(name)


def is_torch_npu_available() -> bool:
    return False


def is_torch_version(*version: str) -> bool:
    raise AssertionError("not asked on a CPU")


class GELU(nn.Module):
    """The first modules are as diffusers writes them."""

    def __init__(self, approximate: str = "none", bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.approximate = approximate

    def gelu(self, gate: Tensor) -> Tensor:
        if gate.device.type == "mps" and is_torch_version("<", "2.0.0"):
            return F.gelu(gate.to(dtype=torch.float32), approximate=self.approximate).to(dtype=gate.dtype)
        return F.gelu(gate, approximate=self.approximate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        x = self.gelu(x)
        return x


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, 2 * HIDDEN)


class GEGLU(Gated):
    def gelu(self, gate: Tensor) -> Tensor:
        if gate.device.type == "mps" and is_torch_version("<", "2.0.0"):
            return F.gelu(gate.to(dtype=torch.float32)).to(dtype=gate.dtype)
        return F.gelu(gate)

    def forward(self, x, *args, **kwargs) -> Tensor:
        if len(args) > 0 or kwargs.get("scale") is not None:
            deprecate("scale")
        x = self.proj(x)
        if is_torch_npu_available():
            return torch_npu.npu_geglu(x)
        else:
            x, gate = x.chunk(2, dim=-1)
            return x * self.gelu(gate)


class SwiGLU(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        x, gate = x.chunk(2, dim=-1)
        return x * self.activation(gate)


class ApproximateGELU(GELU):
    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x * torch.sigmoid(1.702 * x)


class LinearActivation(GELU):
    def __init__(self) -> None:
        super().__init__()
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return self.activation(x)


class Reglu(Gated):
    """No kernel for what is under the square."""

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * gate.square()


class FeedForward(nn.Module):
    def __init__(self, first: list[nn.Module], dropout: float = 0.0, final: bool = False) -> None:
        super().__init__()
        self.net = nn.ModuleList([*first, nn.Dropout(dropout), nn.Linear(HIDDEN, WIDTH)])
        if final:
            self.net.append(nn.Dropout(dropout))

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if len(args) > 0 or kwargs.get("scale") is not None:
            deprecate("scale")
        for module in self.net:
            hidden_states = module(hidden_states)
        return hidden_states


class Plain(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class Backwards(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net[::-1]:
            x = layer(x)
        return x


class Residual(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.net:
            y = layer(y)
        return x + y


class Twice(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
            layer(x)
        return x


class InTraining(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            if self.training or len(self.net) > 3:
                x = layer(x)
        return x


class UntilNone(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        while x is not None:
            x = self.net[0](x)
        return x


class WhileAny(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        while x:
            x = self.net[0](x)
        return x


class Keeps(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
            self.last = x
        return x


FIRSTS = {
    "gelu": lambda: [GELU()],
    "gelu, tanh": lambda: [GELU("tanh", bias=False)],
    "geglu": lambda: [GEGLU()],
    "swiglu": lambda: [SwiGLU()],
    "approximate": lambda: [ApproximateGELU()],
    "silu": lambda: [LinearActivation()],
    "flat": lambda: [nn.Linear(WIDTH, HIDDEN), nn.GELU()],
}


def build(first: str = "geglu", kind: type[FeedForward] = FeedForward, **options: object) -> FeedForward:
    torch.manual_seed(3)
    return kind(FIRSTS[first](), **options)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


X = draw(3, 5, WIDTH)


def row_of(report: fastattn.swap.SwapReport) -> fastattn.swap.Row:
    return next(row for row in report.rows if row.path == "")


@pytest.mark.parametrize("kind", (FeedForward, Plain))
@pytest.mark.parametrize("first", FIRSTS)
def test_answers_and_gradients_stay(first: str, kind: type[FeedForward]) -> None:
    module = build(first, kind, final=True)
    x = X.clone().requires_grad_()
    leaves = [x, *module.parameters()]
    expected = module(x)
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    report = swap(module)
    assert [row.action for row in report.rows if row.kernel] == ["swapped"]
    with report.counting():
        found = module(hidden_states=x) if kind is FeedForward else module(x)
    assert report.all_called
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(torch.autograd.grad(found.square().sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    report.undo()
    assert type(module) is kind and torch.equal(module(x), expected)


@pytest.mark.parametrize("first", FIRSTS)
def test_it_is_one_call(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(first)
    expected = module(X)
    swap(module, strict=True, backend="reference")
    monkeypatch.setattr(nn.Linear, "__call__", None)
    torch.testing.assert_close(module(X), expected, atol=1e-5, rtol=1e-5)


def test_dropouts_drop_in_training_alone() -> None:
    module = build(dropout=0.5, final=True)
    swap(module)
    assert not torch.equal(module(X), module(X)) and (module(X) == 0).any()
    module.eval()
    assert torch.equal(module(X), module(X)) and not (module(X) == 0).any()


def test_more_than_the_input_is_the_original_s() -> None:
    module = build()
    report = swap(module)
    CALLED.clear()
    with report.counting():
        module(X, scale=1.0)
    assert CALLED == ["scale"] and row_of(report).fallbacks == {"it is given more than its input": 1}


@pytest.mark.parametrize("kind", (Backwards, Residual, Twice, InTraining, Keeps, UntilNone, WhileAny))
def test_what_only_looks_alike_is_left_alone(kind: type[FeedForward]) -> None:
    module = build("flat", kind)
    assert "swapped" not in {row.action for row in swap(module, linears=False).rows}
    assert type(module) is kind


def test_lists_of_other_children_are_no_business_of_a_swap() -> None:
    linears = [nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()]
    for first in ([nn.Linear(WIDTH, HIDDEN)], linears, [nn.Conv1d(5, 5, 1), nn.ReLU()], [nn.Flatten()], []):
        module = FeedForward(first)
        swap(module, linears=False)
        assert type(module) is FeedForward
    assert row_of(swap(FeedForward([Reglu()]), linears=False)).action == "left"
    row = row_of(swap(FeedForward([nn.Linear(WIDTH, HIDDEN), nn.Tanh()]), linears=False))
    assert (row.action, row.reason) == ("left", "the activation Tanh has no kernel")
    row = row_of(swap(FeedForward([GELU("relu")]), linears=False))
    assert (row.action, row.reason) == ("left", "the activation gelu of the form 'relu' has no kernel")


class Adapted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def hook(module: FeedForward) -> None:
    module.net[0].register_forward_hook(lambda child, args, result: result + 1)


def hook_inside(module: FeedForward) -> None:
    module.net[0].proj.register_forward_hook(lambda child, args, result: result + 1)


def adapt(module: FeedForward) -> None:
    module.net[0].proj.__class__ = Adapted


def adapt_down(module: FeedForward) -> None:
    module.net[2].__class__ = Adapted


def replace_a_helper(module: FeedForward) -> None:
    module.net[0].gelu = lambda gate: gate * 0


def replace_a_child(module: FeedForward) -> None:
    module.net[0] = Reglu()


def replace_a_forward(module: FeedForward) -> None:
    module.net[0].forward = lambda x: x[..., :1].expand(3, 5, HIDDEN)


def add_a_child(module: FeedForward) -> None:
    module.net.append(nn.Tanh())


def widen(module: FeedForward) -> None:
    module.net[2].weight = nn.Parameter(module.net[2].weight.double())
    module.net[2].bias = nn.Parameter(module.net[2].bias.double())
    module.net[1].register_forward_hook(lambda child, args, result: result.double())


CHANGES = (
    (hook, "net.0 has hooks"),
    (hook_inside, "net.0.proj has hooks"),
    (adapt, f"net.0.proj is a {__name__}.Adapted"),
    (adapt_down, f"net.2 is a {__name__}.Adapted"),
    (replace_a_helper, "net.0 has its gelu replaced on the instance"),
    (replace_a_child, "its children are no longer those of a feed-forward block"),
    (replace_a_forward, "net.0 has its forward replaced on the instance"),
    (add_a_child, "its children are no longer those of a feed-forward block"),
    (widen, "net.2 is of another dtype than the input"),
)


@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_what_is_changed_afterwards_is_called(change, reason: str) -> None:
    module, expected = build(), build()
    report = swap(module)
    torch.manual_seed(4)
    change(module)
    torch.manual_seed(4)
    change(expected)
    with report.counting():
        torch.testing.assert_close(module(X), expected(X), atol=1e-5, rtol=1e-5)
    assert row_of(report).fallbacks == {reason: 1}


def test_a_class_that_was_changed_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build("gelu")
    report = swap(module)
    monkeypatch.setattr(GELU, "gelu", lambda self, gate: gate * 2)
    with report.counting():
        torch.testing.assert_close(module(X), build("gelu")(X), atol=1e-5, rtol=1e-5)
    assert not report.all_called
    monkeypatch.setattr(GELU, "gelu", lambda self, gate: F.relu(gate))
    with report.counting():
        torch.testing.assert_close(module(X), build("gelu")(X), atol=1e-5, rtol=1e-5)
    assert report.all_called


@pytest.mark.parametrize("first", ("gelu", "geglu", "flat"))
def test_compiles_whole_and_is_exported(compiles_whole, first: str) -> None:
    module = build(first).eval()
    compiles_whole(module, X)
    with torch.no_grad():
        graph = torch.export.export(module, (X,), strict=False).graph
    assert any("fastattn" in str(node.target) for node in graph.nodes)


def test_copies_and_a_fresh_process(fresh_process, tmp_path: Path) -> None:
    module = build()
    expected = module(X)
    swap(module)
    torch.testing.assert_close(copy.deepcopy(module)(X), expected, atol=1e-5, rtol=1e-5)
    (tmp_path / "theirs.py").write_text(
        "from torch import nn\n\n\nclass Loop(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.net = nn.ModuleList([nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)])\n\n"
        "    def forward(self, x):\n        for layer in self.net:\n            x = layer(x)\n        return x\n"
    )
    start = "import sys, torch\nsys.path.insert(0, {0!r})\n"
    save = (
        "import theirs, fastattn\nm = theirs.Loop()\ny = m(torch.ones(2, 4))\n"
        "assert fastattn.swap(m).swapped_modules\ntorch.save((m, y), {0!r} + '/m.pt')\n"
    )
    load = (
        "m, y = torch.load({0!r} + '/m.pt', weights_only=False)\nprint(type(m).__module__)\n"
        "torch.testing.assert_close(m(torch.ones(2, 4)), y)\n"
    )
    for text in (start + save, start + load):
        run = fresh_process(text.format(str(tmp_path)))
        assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "fastattn.swap.recognised"
