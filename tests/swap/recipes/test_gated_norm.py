"""norm(x) * silu(gate)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.swap import plan, swap

transformers = pytest.importorskip("transformers")

from transformers.activations import ACT2FN  # noqa: E402
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated  # noqa: E402

WIDTH = 24


class Norm(nn.Module):
    eps, activation, other = 1e-6, "silu", "gelu"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH, generator=torch.Generator().manual_seed(3)) + 0.5)

    def norm(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Functional(Norm):
    def forward(self, x, gate):
        return F.silu(gate) * self.norm(x)


class Widened(Norm):
    def forward(self, hidden_states, gate):
        return (self.norm(hidden_states) * F.silu(gate.float())).to(hidden_states.dtype)


class FromTheTable(Norm):
    def forward(self, x, z):
        return (self.norm(x) * ACT2FN[self.activation](z.to(torch.float32))).type_as(x)


class Qwen3Next(Qwen3NextRMSNormGated):
    def __init__(self) -> None:
        super().__init__(WIDTH, eps=1e-6)


GATED = pytest.mark.parametrize("norm_class", [Functional, Widened, FromTheTable, Qwen3Next])


def results(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    x, gate = (torch.randn(3, 5, WIDTH, generator=draw).bfloat16().to(dtype).requires_grad_() for _ in range(2))
    y = module(x, gate)
    (y * torch.randn(y.shape, generator=draw).bfloat16().to(y.dtype)).sum().backward()
    return [y.detach(), x.grad, gate.grad, module.weight.grad]


@GATED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_near_to_the_exact_one_as_the_original(norm_class, dtype: torch.dtype) -> None:
    module = norm_class().bfloat16().to(dtype)
    exact, eager = results(copy.deepcopy(module).float(), torch.float32), results(copy.deepcopy(module), dtype)
    report = swap(module)
    assert [(row.action, row.kernel) for row in report.rows] == [("swapped", "rms_norm")]
    with report.counting():
        found = results(module, dtype)
    assert not report.rows[0].fallbacks
    for one, other, true in zip(found, eager, exact, strict=True):
        assert one.dtype == other.dtype == dtype
        error, bound, size = (float(each.abs().max()) for each in (one.float() - true, other.float() - true, true))
        assert error <= 2 * bound + 2 * torch.finfo(dtype).eps * size
    report.undo()
    module.zero_grad()
    assert torch.equal(results(module, dtype)[0], eager[0])


@GATED
def test_dtypes_that_differ_and_one_graph(norm_class) -> None:
    for weight_dtype, gate_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        original = norm_class().to(weight_dtype)
        module = copy.deepcopy(original)
        swap(module)
        x, gate = torch.randn(4, WIDTH).bfloat16(), torch.randn(4, WIDTH).to(gate_dtype)
        found, expected = module(x, gate), original(x, gate)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found.float(), expected.float(), atol=3e-2, rtol=3e-2)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, gate), found)


def test_another_activation_is_left_and_one_named_later_is_the_originals() -> None:
    module = FromTheTable()
    module.activation = "gelu"
    (row,) = plan(module).rows
    assert (row.action, row.reason) == ("left", "its activation is 'gelu'")
    module.activation = "swish"
    report = swap(module)
    x, gate = torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    module.activation = "relu"
    with report.counting():
        torch.testing.assert_close(module(x, gate), module.norm(x) * F.relu(gate))
    assert report.rows[0].fallbacks == {"its activation is 'relu'": 1}


def test_an_entry_of_the_table_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, gate = FromTheTable(), torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    report = swap(module)
    monkeypatch.setitem(ACT2FN, "silu", nn.Tanh)
    with report.counting():
        torch.testing.assert_close(module(x, gate), module.norm(x) * torch.tanh(gate))
    assert report.rows[0].fallbacks == {"its activation is 'silu'": 1}


class GateFirst(Norm):
    def forward(self, x, gate):
        return self.norm(x * F.silu(gate))


class NormOfTheGate(Norm):
    def forward(self, x, gate):
        return self.norm(gate) * F.silu(x)


class SiluOfTheNorm(Norm):
    def forward(self, x, gate):
        return F.silu(self.norm(x)) * gate


class SumOfBoth(Norm):
    def forward(self, x, gate):
        return self.norm(x) + F.silu(gate)


class AnotherFunction(Norm):
    def forward(self, x, gate):
        return self.norm(x) * F.gelu(gate)


class ConstantOfTheTable(Norm):
    def forward(self, x, gate):
        return self.norm(x) * ACT2FN["gelu"](gate)


class GateTwice(Norm):
    def forward(self, x, gate):
        return self.norm(x) * F.silu(gate) * gate


class SiluOfTwice(Norm):
    def forward(self, x, gate):
        return self.norm(x) * F.silu(gate + gate)


class GateOfTheInput(Norm):
    def forward(self, x):
        return self.norm(x) * F.silu(x)


@pytest.mark.parametrize(
    "norm_class",
    [
        GateFirst,
        NormOfTheGate,
        SiluOfTheNorm,
        SumOfBoth,
        AnotherFunction,
        ConstantOfTheTable,
        GateTwice,
        SiluOfTwice,
        GateOfTheInput,
    ],
)
def test_what_only_looks_like_one_is_left(norm_class) -> None:
    assert not [row for row in plan(norm_class()).rows if row.action == "swap"]
