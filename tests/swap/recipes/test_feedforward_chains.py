"""Feed-forward blocks with a norm in front, a dropout before the activation, or chunks."""

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

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(HIDDEN)
        self.up, self.gate, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.both = nn.Linear(WIDTH, 2 * HIDDEN)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.5)
        with torch.no_grad():
            for norm in (self.norm, self.inner_norm):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)


class Evolla(Block):
    def forward(self, x):
        return self.down(self.act(self.up(self.norm(x))))


class Conformer(Block):
    def forward(self, hidden_states):
        hidden_states = self.norm(hidden_states)
        hidden_states = self.drop(self.act(self.up(hidden_states)))
        return self.drop(self.down(hidden_states))


class FunctionAfterNorm(Block):
    def forward(self, x):
        return self.down(F.silu(self.up(self.norm(x))))


class GatedAfterNorm(Block):
    def forward(self, x):
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Phi4(Block):
    def forward(self, x):
        up, gate = self.both(self.norm(x)).chunk(2, dim=-1)
        return self.drop(self.down(self.drop(up * self.act(gate))))


class Sam3(Block):
    def forward(self, x):
        return self.down(self.act(self.drop(self.up(x))))


class NormAndEarlyDropout(Block):
    def forward(self, x):
        return self.down(self.drop(self.act(self.drop(self.up(self.norm(x))))))


def sequence(*rest: nn.Module) -> nn.Sequential:
    """As in vit-pytorch."""
    norm = Block().norm
    return nn.Sequential(
        norm, nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(0.5), nn.Linear(HIDDEN, WIDTH), nn.Dropout(0.5), *rest
    )


class GEGLU(nn.Module):
    def forward(self, x):
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class SwiGLU(nn.Module):
    def forward(self, x):
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value


def geglu(*rest: nn.Module) -> nn.Sequential:
    """As in local-attention."""
    return nn.Sequential(
        Block().norm, nn.Linear(WIDTH, 2 * HIDDEN), GEGLU(), nn.Dropout(0.5), nn.Linear(HIDDEN, WIDTH), *rest
    )


def swiglu() -> nn.Sequential:
    """As in coca-pytorch."""
    return nn.Sequential(nn.Linear(WIDTH, 2 * HIDDEN, bias=False), SwiGLU(), nn.Linear(HIDDEN, WIDTH, bias=False))


class ChildThatMultiplies(Block):
    def __init__(self) -> None:
        super().__init__()
        self.act = SwiGLU()

    def forward(self, x):
        return self.down(F.dropout(self.act(self.both(x)), p=0.5, training=self.training))


KERNELS = {
    Evolla: "ffn",
    Conformer: "ffn",
    FunctionAfterNorm: "ffn",
    GatedAfterNorm: "gated_ffn",
    Phi4: "gated_ffn",
    Sam3: "ffn",
    NormAndEarlyDropout: "ffn",
    sequence: "ffn",
    geglu: "gated_ffn",
    swiglu: "gated_ffn",
    ChildThatMultiplies: "gated_ffn",
}
blocks = pytest.mark.parametrize("make", KERNELS)


def results(module: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output, the input's gradient and those of the parameters."""
    module.zero_grad()
    x = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16().to(dtype).requires_grad_()
    y = module(x)
    seen = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
    (y * seen).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_near_to_the_exact_one_as_the_original(make, dtype: torch.dtype) -> None:
    module = make().bfloat16().to(dtype).eval()
    exact = results(copy.deepcopy(module).double(), torch.float64)
    eager = results(module, dtype)
    report = swap(module, strict=True)
    with report.counting():
        found = results(module, dtype)
    row = next(row for row in report.rows if row.path == "")
    assert (row.kernel, row.calls, row.fallbacks) == (KERNELS[make], 1, {})
    for one, other, true in zip(found, eager, exact, strict=True):
        error, bound, size = (float(each.abs().max()) for each in (one.double() - true, other.double() - true, true))
        assert error <= 2 * bound + 2 * torch.finfo(dtype).eps * size
    report.undo()
    assert torch.equal(results(module, dtype)[0], eager[0])


@blocks
def test_compiles_as_one_graph(compiles_whole, make) -> None:
    compiles_whole(make().eval(), torch.randn(2, WIDTH))


def test_the_norm_is_swapped_by_itself_and_its_hooks_see_one_call() -> None:
    module = Evolla().bfloat16()
    report = swap(module)
    assert {row.path: (row.action, row.kernel) for row in report.rows if row.path in ("", "norm")} == {
        "": ("swapped", "ffn"),
        "norm": ("swapped", "layer_norm"),
    }
    calls: list[Tensor] = []
    module.norm.register_forward_hook(lambda norm, args, output: calls.append(output))
    x = torch.randn(2, WIDTH).bfloat16()
    with report.counting():
        found = module(x)
    assert len(calls) == 1
    assert report.rows[0].fallbacks == {"norm has hooks": 1}
    torch.testing.assert_close(found, Evolla.forward(module, x), atol=2e-2, rtol=2e-2)


def test_another_norm_put_in_its_place_is_called() -> None:
    module = GatedAfterNorm()
    report = swap(module)
    module.norm = nn.BatchNorm1d(WIDTH).train()
    twin = copy.deepcopy(module)
    x = torch.randn(5, WIDTH)
    with report.counting():
        found = module(x)
    torch.testing.assert_close(found, GatedAfterNorm.forward(twin, x))
    torch.testing.assert_close(module.norm.running_mean, twin.norm.running_mean)
    assert list(report.rows[0].fallbacks.values()) == [1]


def test_a_dropout_before_the_activation_runs_the_original_while_it_drops() -> None:
    module = Sam3().train()
    report = swap(module)
    x = torch.randn(2, WIDTH)
    with report.counting():
        torch.manual_seed(0)
        found = module(x)
    torch.manual_seed(0)
    assert torch.equal(found, Sam3.forward(module, x))
    assert report.rows[0].fallbacks == {"drop drops before the activation": 1}
    module.drop.p = 0.0
    with report.counting():
        torch.testing.assert_close(module(x), Sam3.forward(module, x), atol=1e-5, rtol=1e-5)
    assert report.rows[0].fallbacks == {}


def test_a_whole_layer_does_not_take_a_block_with_a_norm_for_one_without() -> None:
    for make, whole in ((Evolla, False), (GatedAfterNorm, False), (Sam3, True)):
        module = make().eval()
        swap(module)
        assert isinstance(module.fastattn_call(torch.randn(2, WIDTH)), str) != whole


class BatchNormBefore(Evolla):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)


class LinearBefore(Evolla):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Linear(WIDTH, WIDTH)


class DropoutBefore(Evolla):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Dropout(0.5)


class DerivedNorm(Evolla):
    def __init__(self) -> None:
        super().__init__()

        class Doubled(nn.LayerNorm):
            def forward(self, input):
                return super().forward(input) * 2

        self.norm = Doubled(WIDTH)


class NormInside(Block):
    def forward(self, x):
        return self.down(self.inner_norm(self.act(self.up(x))))


class NormBeforeTheActivation(Block):
    def forward(self, x):
        return self.down(self.act(self.inner_norm(self.up(x))))


class NormOfTheGateOnly(Block):
    def forward(self, x):
        return self.down(F.silu(self.gate(self.norm(x))) * self.up(x))


class NormTwice(Block):
    def forward(self, x):
        return self.down(self.act(self.up(self.norm(self.norm(x)))))


class TwoEarlyDropouts(Block):
    def forward(self, x):
        return self.down(self.act(self.drop(self.drop(self.up(x)))))


class NormAlone(Block):
    def forward(self, x):
        return self.act(self.up(self.norm(x)))


class LastNorm(Block):
    def forward(self, x):
        return self.norm(self.down(self.act(self.up(x))))


@pytest.mark.parametrize(
    "make",
    [
        BatchNormBefore,
        LinearBefore,
        DropoutBefore,
        DerivedNorm,
        NormInside,
        NormBeforeTheActivation,
        NormOfTheGateOnly,
        NormTwice,
        TwoEarlyDropouts,
        NormAlone,
        LastNorm,
    ],
)
def test_what_only_looks_like_one_is_left(make) -> None:
    assert not [row for row in plan(make()).rows if row.action == "swap" and row.path == ""]


@pytest.mark.parametrize(
    "module",
    [
        sequence(nn.Linear(WIDTH, WIDTH)),
        nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU()),
        nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)),
        nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
        nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4)),
        geglu(nn.Tanh()),
        nn.Sequential(nn.Linear(4, 8), GEGLU()),
        nn.Sequential(nn.Linear(4, 8), GEGLU(), nn.LayerNorm(4), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 8), nn.GELU(), GEGLU(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 8), nn.GLU(), nn.Linear(4, 4)),
        nn.Sequential(GEGLU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)),
    ],
    ids=str,
)
def test_other_sequences_are_no_business_of_a_swap(module: nn.Sequential) -> None:
    assert not [row for row in plan(module).rows if row.path == ""]


class Alone(nn.Module):
    def forward(self, x):
        _, gate = x.chunk(2, dim=-1)
        return F.gelu(gate)


class OfRows(nn.Module):
    def forward(self, x):
        value, gate = x.chunk(2, dim=0)
        return value * F.gelu(gate)


class Thirds(nn.Module):
    def forward(self, x):
        value, gate, _ = x.chunk(3, dim=-1)
        return value * F.gelu(gate)


class TwiceTheSame(nn.Module):
    def forward(self, x):
        _, gate = x.chunk(2, dim=-1)
        return gate * F.gelu(gate)


class Sigmoid(nn.Module):
    def forward(self, x):
        value, gate = x.chunk(2, dim=-1)
        return value * gate.sigmoid()


class Overwrites(nn.Module):
    def forward(self, x):
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate, inplace=True)


@pytest.mark.parametrize("kind", [Alone, OfRows, Thirds, TwiceTheSame, Sigmoid, Overwrites])
def test_what_is_no_product_of_halves_is_left(kind) -> None:
    module = nn.Sequential(nn.Linear(4, 8), kind(), nn.Linear(4, 4))
    assert not [row for row in plan(module, linears=False).rows if row.path == ""]


def test_a_product_that_is_hooked_replaced_or_put_in_another_s_place(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, WIDTH)
    module = swiglu()
    original = copy.deepcopy(module)
    report = swap(module)

    def reasons() -> dict[str, int]:
        with report.counting():
            torch.testing.assert_close(module(x), original(x))
        return next(row for row in report.rows if row.path == "").fallbacks

    assert reasons() == {}
    hooks = [each[1].register_forward_hook(lambda child, args, y: y + 1) for each in (module, original)]
    assert reasons() == {"1 has hooks": 1}
    for hook in hooks:
        hook.remove()
    module[1], original[1] = GEGLU(), GEGLU()
    assert reasons() == {}
    module[1], original[1] = Sigmoid(), Sigmoid()
    assert reasons() == {"1 is Sigmoid, which has no kernel": 1}
    module[1], original[1] = GEGLU(), GEGLU()
    monkeypatch.setattr(GEGLU, "forward", Sigmoid.forward)
    assert reasons() == {"1 is GEGLU, which has no kernel": 1}
    assert module.state_dict().keys() == original.state_dict().keys()


def test_dropouts_behind_a_product_drop_in_training() -> None:
    module = geglu().train()
    swap(module)
    x = torch.randn(3, WIDTH)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def distilbert(**settings: object) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    from transformers.models.distilbert.modeling_distilbert import FFN

    return FFN(transformers.DistilBertConfig(dim=WIDTH, hidden_dim=HIDDEN, **settings)).eval()


def test_distilberts_block() -> None:
    module = distilbert()
    expected = results(module)
    report = swap(module)
    assert list(inspect.signature(module.forward).parameters) == ["input"]
    with report.counting():
        found = results(module)
    (row,) = [row for row in report.rows if row.path == ""]
    assert (row.kernel, row.fallbacks) == ("ffn", {})
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    module.chunk_size_feed_forward = 2
    with report.counting():
        torch.testing.assert_close(module(torch.ones(1, 4, WIDTH)), module.ff_chunk(torch.ones(1, 4, WIDTH)))
    assert row.fallbacks == {"its input is cut into chunks": 1}


def test_distilberts_block_with_another_chunk_is_left() -> None:
    class Doubled(type(distilbert())):  # type: ignore[misc]
        def ff_chunk(self, input):
            return 2 * super().ff_chunk(input)

    module = distilbert()
    module.__class__ = Doubled
    assert not [row for row in plan(module).rows if row.action == "swap" and row.path == ""]
