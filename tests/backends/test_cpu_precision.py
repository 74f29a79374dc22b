"""Products of float32 where the user lets torch round them: to bfloat16 where that is faster, exact elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))
ISAS = [] if cpu.unavailable_reason() else cpu.available_isas()
ROWS = [20, 40, 130, 450]  # by weights where they lie; packed; blocks; three parts where it is exact


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.use_isa(request.param):
        yield request.param


@pytest.fixture
def medium() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_who_rounds(isa: str) -> None:
    assert cpu.multiplies_rounded() or isa != "amx"
    assert not cpu.multiplies_rounded() or isa in ("amx", "avx512bf16")


def rounded(tensor: Tensor) -> Tensor:
    """An operand as it is multiplied, in float64."""
    return (tensor.bfloat16() if cpu.multiplies_rounded() else tensor).double()


def assert_product(y: Tensor, x: Tensor, w: Tensor) -> None:
    """That y is x w^T of rounded operands, but for the sums' own error."""
    exact = (rounded(x) @ rounded(w).T).detach()
    torch.testing.assert_close(y.detach().double(), exact, rtol=2e-5, atol=2e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("by_rows", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("features", [200, 77])
def test_a_product_and_its_gradients(isa: str, medium: None, rows: int, by_rows: bool, features: int) -> None:
    x = torch.randn(rows, features, requires_grad=True)
    w = torch.randn(features, 136).T.requires_grad_() if by_rows else torch.randn(136, features, requires_grad=True)
    y = fastattn.linear_act(x, w, None, activation=None, backend="cpu")
    grad = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), grad)
    assert_product(y, x, w)
    assert_product(dx, grad, w.T)
    assert_product(dw, grad.T, x.T)


def test_the_newer_question_is_heard(fresh_process) -> None:
    """In a process of its own: once set so, torch refuses to be asked in the older way."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("torch before 2.9")
    script = """
import torch
import fastattn
from fastattn.backends import cpu

x, w = torch.randn(100, 64), torch.randn(64, 64)
exact = fastattn.linear_act(x, w, None, activation=None)
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
rounded = fastattn.linear_act(x, w, None, activation=None)
trained = fastattn.linear_act(x, w.requires_grad_(), None, activation=None).detach()
torch.backends.mkldnn.matmul.fp32_precision = "ieee"
again = fastattn.linear_act(x, w.detach(), None, activation=None)
differ = [not rounded.equal(exact), not trained.equal(exact)]
print(cpu.multiplies_rounded(), *differ, trained.equal(rounded), again.equal(exact))
"""
    rounds, *differ, equal, restored = fresh_process(script).stdout.split()
    assert differ == [rounds, rounds] and equal == restored == "True"


class Calls:
    """One call of each kernel that multiplies float32, without gradients."""

    def __init__(self) -> None:
        self.up, self.gate, self.down = nn.Linear(128, 256), nn.Linear(128, 256), nn.Linear(256, 128)
        self.layer = nn.TransformerEncoderLayer(128, 4, 256, activation="gelu", batch_first=True).eval()
        fastattn.swap(self.layer)

    def linear_act(self, x: Tensor) -> Tensor:
        return fastattn.linear_act(x, self.up.weight, self.up.bias, activation="gelu")

    def ffn(self, x: Tensor) -> Tensor:
        return fastattn.ffn(x, self.up.weight, self.up.bias, self.down.weight, self.down.bias, activation="gelu")

    def gated_ffn(self, x: Tensor) -> Tensor:
        return fastattn.gated_ffn(x, self.gate.weight, self.up.weight, self.down.weight)

    def encoder_layer(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def prepacked(self, x: Tensor) -> Tensor:
        fastattn.prepack(self.layer)
        self.layer(x)  # packs
        return self.layer(x)


@pytest.mark.parametrize("call", ["linear_act", "ffn", "gated_ffn", "encoder_layer", "prepacked"])
@pytest.mark.parametrize("way", ["short", "long"])
def test_every_kernel_rounds(isa: str, medium: None, call: str, way: str, request: pytest.FixtureRequest) -> None:
    """Within bfloat16's rounding of what it answers otherwise, and as before once that is not allowed any more."""
    if way == "long":
        request.getfixturevalue("long_way")
    x = torch.randn(2, 120, 128) * 0.5
    run = getattr(Calls(), call)
    with torch.inference_mode():
        y = run(x)
        torch.set_float32_matmul_precision("highest")
        exact = run(x)
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(run(x), y)
    assert float((y - exact).abs().max()) <= 2e-2 * float(exact.abs().max())
    assert torch.equal(y, exact) != cpu.multiplies_rounded()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38])
def test_what_bfloat16_does_not_hold(isa: str, medium: None, value: float) -> None:
    """Infinity and NaN reach the sums they belong to, and no other; beyond bfloat16's largest number is infinity."""
    x, w = torch.randn(100, 64), torch.randn(64, 64)
    x[7, 3] = value
    y = fastattn.linear_act(x, w, None, activation=None, backend="cpu")
    expected = F.linear(rounded(x), rounded(w)).float()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    assert y[torch.arange(100) != 7].isfinite().all()
