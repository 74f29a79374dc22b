"""Feed-forward blocks in the ways that they are about."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.swap import plan, swap

WIDTH, HIDDEN = 16, 24


class Block(nn.Module):
    """Children by every name that the forwards below use."""

    p = 0.5

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.both = nn.Linear(WIDTH, 2 * HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.drop, self.last = nn.Dropout(0.5), nn.Dropout(0.5)
        self.activation = act or nn.GELU()


class Plain(Block):
    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class Timm(Block):
    def forward(self, x):
        x = self.up(x)
        x = self.activation(x)
        x = self.drop(x)
        x = self.down(x)
        x = self.last(x)
        return x


class DropsLast(Block):
    def forward(self, hidden_states):
        return self.last(self.down(self.activation(self.up(hidden_states))))


class Functions(Block):
    def forward(self, x):
        x = F.dropout(F.gelu(self.up(x), approximate="tanh"), p=self.p, training=self.training)
        return F.dropout(self.down(x), p=0.25, training=self.training)


class Squared(Block):
    def forward(self, x):
        return self.down(torch.relu(self.up(x)).square())


class Llama(Block):
    def forward(self, x):
        return self.down(self.activation(self.gate(x)) * self.up(x))


class GPTFast(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.up(x) * F.silu(self.gate(x))))


class GLM(Block):
    def forward(self, hidden_states):
        gate, up = self.both(hidden_states).chunk(2, dim=-1)
        return self.down(up * self.activation(gate))


class ModernBERT(Block):
    def forward(self, hidden_states):
        halves = self.both(hidden_states).chunk(2, dim=-1)
        return self.down(self.drop(halves[0] * self.activation(halves[1])))


class ChatGLM(Block):
    def forward(self, hidden_states):
        halves = torch.chunk(self.both(hidden_states), 2, dim=-1)
        return self.down(F.silu(halves[0]) * halves[1])


class CutByName(Block):
    def forward(self, x):
        up, gate = self.both(x).chunk(chunks=2, dim=-1)
        return self.down(up * F.gelu(gate))


class SplitInTwo(Block):
    def forward(self, x):
        up, gate = torch.tensor_split(self.both(x), 2, -1)
        return self.down(up * F.gelu(gate))


class OneLinearTwice(Block):
    def forward(self, x):
        return self.down(F.silu(self.up(x)) * self.up(x))


class InPlace(Block):
    def forward(self, x):
        return self.down(F.relu(self.up(x), inplace=True))


class InPlaceByMethod(Block):
    def forward(self, x):
        hidden = self.up(x)
        hidden = hidden.relu_()
        return self.last(self.down(self.drop(hidden)))


class InPlaceGate(Block):
    def forward(self, x):
        return self.down(F.silu(self.gate(x), inplace=True) * self.up(x))


class Bert(Block):
    def forward(self, hidden_states):
        return self.activation(self.up(hidden_states))


KERNELS = {
    Plain: "ffn",
    Timm: "ffn",
    DropsLast: "ffn",
    Functions: "ffn",
    Squared: "ffn",
    Llama: "gated_ffn",
    GPTFast: "gated_ffn",
    GLM: "gated_ffn",
    ModernBERT: "gated_ffn",
    ChatGLM: "gated_ffn",
    CutByName: "gated_ffn",
    SplitInTwo: "gated_ffn",
    OneLinearTwice: "gated_ffn",
    InPlace: "ffn",
    InPlaceByMethod: "ffn",
    InPlaceGate: "gated_ffn",
    Bert: "linear_act",
}
blocks = pytest.mark.parametrize("block_class", KERNELS)


def sequence() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Dropout(0.5), nn.Linear(HIDDEN, WIDTH), nn.Dropout(0.5)
    )


def results(module: nn.Module, seed: int = 0) -> list[Tensor]:
    """Output, the input's gradient and those of all parameters."""
    x = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@blocks
def test_equals_the_original(block_class) -> None:
    module = block_class().eval()
    expected = results(copy.deepcopy(module))
    report = swap(module, strict=True)
    with report.counting():
        found = results(module)
    (row,) = report.rows
    assert (row.kernel, row.calls, row.fallbacks) == (KERNELS[block_class], 1, {})
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block_class", [Timm, Functions, ModernBERT])
def test_compiles_as_one_graph(compiles_whole, block_class) -> None:
    compiles_whole(block_class().eval(), torch.randn(2, WIDTH))


def hidden_and_last(module: nn.Module) -> tuple[float, float]:
    """The shares of the hidden features and of the output that a training call drops, for a block that adds up ones."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.up.bias.fill_(1.0)
        module.down.weight.copy_(torch.eye(WIDTH, HIDDEN))
        module.down.bias.fill_(-5.0)
        y = module(torch.zeros(500, WIDTH))
    whole = float(y[y != 0].min())  # only the bias is left where the hidden feature is dropped
    return float((y == whole).sum() / (y != 0).sum()), float((y == 0).float().mean())


@pytest.mark.parametrize(
    ("block_class", "hidden", "last"),
    [(Plain, 0.0, 0.0), (Timm, 0.5, 0.5), (DropsLast, 0.0, 0.5), (Functions, 0.5, 0.25)],
)
def test_training_drops_where_the_original_does(block_class, hidden: float, last: float) -> None:
    module = block_class(nn.ReLU()).train()
    swap(module, strict=True)
    torch.manual_seed(0)
    found_hidden, found_last = hidden_and_last(module)
    if hidden:  # else every feature has the same value
        assert abs(found_hidden - hidden) < 0.03
    assert abs(found_last - last) < 0.03


def test_sequences() -> None:
    module = sequence().eval()
    expected = results(copy.deepcopy(module))
    report = swap(module)
    with report.counting():
        found = results(module)
    assert [(row.class_name, row.kernel, row.calls) for row in report.rows] == [("Sequential", "ffn", 1)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    module.append(nn.ReLU())  # no block any more
    with report.counting():
        assert module(torch.randn(2, WIDTH)).min() >= 0
    reason = "its children are no longer those of a feed-forward block"
    assert report.rows[0].fallbacks == {reason: 1}


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(),
        nn.Sequential(nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()),
        nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU(), nn.Conv1d(4, 4, 1)),
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)),
    ],
    ids=str,
)
def test_other_sequences_are_no_business_of_a_swap(module: nn.Sequential) -> None:
    assert plan(module).rows == []


def test_a_sequence_in_another_order_is_none() -> None:
    class Backwards(nn.Sequential):
        def __iter__(self):
            return iter(list(self._modules.values())[::-1])

    (row,) = plan(Backwards(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))).rows
    assert row.action == "left"


class SigmoidGate(Block):
    def forward(self, x):
        return self.down(torch.sigmoid(self.gate(x)) * self.up(x))


class SumOfBoth(Block):
    def forward(self, x):
        return self.down(self.activation(self.gate(x)) + self.up(x))


class ThreeHalves(Block):
    def forward(self, x):
        first, second, _ = self.both(x).chunk(3, dim=-1)
        return self.down(first * self.activation(second))


class CutAtAPlace(Block):
    def forward(self, x):
        first, second = torch.tensor_split(self.both(x), [1], dim=-1)
        return self.down(first * self.activation(second))


class OneHalf(Block):
    def forward(self, x):
        half, _ = self.both(x).chunk(2, dim=-1)
        return self.down(half * self.activation(half))


class HalvesOfTheRows(Block):
    def forward(self, x):
        first, second = self.both(x).chunk(2, dim=0)
        return self.down(first * self.activation(second))


class OnTheSide(Block):
    def forward(self, x):
        return self.down(self.activation(self.up(x))) + x


class AlwaysDrops(Block):
    def forward(self, x):
        return self.down(F.dropout(F.relu(self.up(x)), p=0.5, training=True))


class TwoLinears(Block):
    def forward(self, x):
        return self.down(self.drop(self.up(x)))


class OverwritesItsInput(Block):
    def forward(self, x):
        return self.down(self.activation(self.up(F.relu(x, inplace=True))))


class OverwritesWhatItReadsAgain(Block):
    def forward(self, x):
        hidden = self.up(x)
        return self.down(F.silu(hidden, inplace=True) * hidden)


class OverwritesAHalf(Block):
    def forward(self, x):
        first, second = self.both(x).chunk(2, dim=-1)
        return self.down(F.silu(first, inplace=True) * second)


class OverwritesTwice(Block):
    def forward(self, x):
        hidden = self.up(x)
        F.silu(hidden, inplace=True)
        return self.down(F.silu(hidden, inplace=True))


@pytest.mark.parametrize(
    "block_class",
    [
        *(
            SigmoidGate,
            SumOfBoth,
            ThreeHalves,
            CutAtAPlace,
            OneHalf,
            HalvesOfTheRows,
            OnTheSide,
            AlwaysDrops,
            TwoLinears,
        ),
        *(OverwritesItsInput, OverwritesWhatItReadsAgain, OverwritesAHalf, OverwritesTwice),
    ],
)
def test_what_only_looks_like_one_is_left(block_class) -> None:
    assert not [row for row in plan(block_class()).rows if row.action == "swap"]


class OfWhatWasActivated(Block):
    def forward(self, x):
        hidden = self.up(x)
        return self.down(self.activation(hidden) * hidden)


def test_a_child_that_overwrites_one_of_two_factors() -> None:
    for activation in (nn.SiLU(), nn.SiLU(inplace=True)):
        module, x = OfWhatWasActivated(activation), torch.randn(3, WIDTH)
        with torch.no_grad():
            expected = module(x)
            swap(module, linears=False)
            torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_class", [InPlace, InPlaceGate])
def test_halves_of_blocks_that_overwrite_and_what_a_swap_leaves(block_class, dtype: torch.dtype) -> None:
    module = block_class().to(dtype).eval()
    x = torch.randn(5, WIDTH).to(dtype)
    expected, saved = module(x), list(module.state_dict())
    exact = copy.deepcopy(module).float()(x.float())
    report = swap(module, strict=True)
    found = module(x)
    assert found.dtype is dtype and list(module.state_dict()) == saved
    bound = 2 * (expected.float() - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert (found.float() - exact).abs().max() <= bound
    report.undo()
    assert type(module) is block_class and torch.equal(module(x), expected)


def test_an_activation_without_a_kernel_is_left_with_its_name() -> None:
    (row,) = plan(Llama(nn.Tanh())).rows
    assert (row.action, row.reason) == ("left", "the activation Tanh has no kernel")


def hook(block: Block) -> str:
    block.down.register_forward_hook(lambda module, args, output: output + 1.0)
    return "down has hooks"


def other_class(block: Block) -> str:
    class Adapted(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1.0

    block.up.__class__ = Adapted
    return f"up is a {__name__}.other_class.<locals>.Adapted"


def other_activation(block: Block) -> str:
    block.activation = nn.Tanh()
    return "activation is Tanh, which has no kernel"


def other_dtype(block: Block) -> str:
    block.down.double()
    block.down.register_forward_pre_hook(lambda module, args: args[0].double())
    return "down has hooks"


def broadcast_bias(block: Block) -> str:
    block.up.bias = nn.Parameter(torch.ones(1))
    return "up has a bias that is broadcast"


def shadowed(block: Block) -> str:
    block.down.__dict__["weight"] = torch.zeros(WIDTH, HIDDEN)
    return "down has a Tensor as its weight"


def sparse(block: Block) -> str:
    block.up.weight = nn.Parameter(torch.eye(HIDDEN, WIDTH).to_sparse_csr(), requires_grad=False)
    return "up has a sparse_csr weight"


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("change", [hook, other_class, other_activation, other_dtype, broadcast_bias, shadowed, sparse])
@pytest.mark.parametrize("block_class", [Plain, Llama])
def test_changed_children_are_called_and_counted(change, block_class) -> None:
    module, twin = block_class().eval(), block_class().eval()
    twin.load_state_dict(module.state_dict())
    report = swap(module)
    reason = change(module)
    change(twin)
    x = torch.randn(3, WIDTH)
    with report.counting():
        torch.testing.assert_close(module(x), twin(x), atol=1e-6, rtol=1e-6)
    assert report.rows[0].fallbacks == {reason: 1}


def test_a_last_linear_of_another_dtype_runs_the_original() -> None:
    """As in half checkpoints of T5, whose `wo` stays float32."""
    module = Plain().to(torch.bfloat16)
    module.down.float()
    report = swap(module)
    with report.counting(), pytest.raises(RuntimeError, match="dtype"):
        module(torch.randn(2, WIDTH, dtype=torch.bfloat16))
    assert report.rows[0].fallbacks == {"down is float32, not the input's dtype": 1}


class OneGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_one_gate_for_all_features_is_broadcast() -> None:
    module, x = OneGate(), torch.randn(2, WIDTH)
    expected, report = module(x), swap(module)
    with report.counting():
        torch.testing.assert_close(module(x), expected)
    assert report.rows[0].fallbacks == {"gate and up have different numbers of features": 1}


def test_forwards_of_torch_that_were_replaced_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """As loaders of adapters do it, for a whole process."""
    module, x = Plain().eval(), torch.randn(2, WIDTH)
    report = swap(module)
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: plain(self, input) + 1)
    expected = Plain.forward(module, x)
    with report.counting():
        torch.testing.assert_close(module(x), expected)
    assert report.rows[0].fallbacks == {"up is of a class whose forward was replaced": 1}


def test_the_signature_is_the_originals() -> None:
    module = GLM().eval()
    x = torch.randn(2, WIDTH)
    expected = module(x)
    swap(module)
    assert list(inspect.signature(module.forward).parameters) == ["hidden_states"]
    torch.testing.assert_close(module(hidden_states=x), expected, atol=1e-6, rtol=1e-6)
    for args, kwargs in (((), {}), ((x, x), {}), ((), {"x": x})):
        with pytest.raises(TypeError, match="forward"):
            module(*args, **kwargs)


def test_derivatives_of_torch_func() -> None:
    """Inside a compiled graph the original runs: autograd's functions are not seen there."""
    module, x = Plain().eval(), torch.randn(WIDTH)
    total = lambda x: module(x).square().sum()  # noqa: E731
    expected = torch.func.grad(total)(x)
    swap(module)
    torch.testing.assert_close(torch.func.grad(total)(x), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(total), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
    tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, torch.func.jacrev(module)(x).sum(-1), atol=1e-5, rtol=1e-5)


def test_under_autocast_it_casts_as_linears_do() -> None:
    module = Llama().eval()
    x = torch.randn(3, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(x)
        report = swap(module)
        with report.counting():
            found = module(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert not report.rows[0].fallbacks
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_names_of_children_hide_nothing() -> None:
    """What the swapped classes add begins with fastattn or is every module's: no child of any class is hidden."""
    from fastattn.swap import recognised
    from fastattn.swap.recipes import feedforward, norm

    assert recognised.recipe_for(Plain) is not None
    for mixin in (feedforward.FeedForward, feedforward.GatedFeedForward, feedforward.LinearAct, norm.SpelledNorm):
        added = {name for base in mixin.__mro__ if base.__module__.startswith("fastattn") for name in vars(base)}
        own = {name for name in added if not name.startswith(("fastattn_", "__"))}
        assert own <= set(dir(nn.Module)), (mixin, own)
