"""What the CPU kernels read by blocks, of AMX above all: memory beyond rows and columns, small and large rests, and the
base of the online softmax, which follows the maximum late."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.backends import cpu
from fastattn.masks import Causal, SlidingWindow
from fastattn.parity.attention import check_attention
from fastattn.parity.rule import check_linear_act, failures

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))
ISAS = [] if cpu.unavailable_reason() else cpu.available_isas()
HALVES = [torch.bfloat16, torch.float16]


def amid_nan(tensor: Tensor, columns: int = 2) -> Tensor:
    """The same numbers with NaN before and after them and behind every row."""
    wide = torch.full((tensor.shape[0] + 2, *tensor.shape[1:-1], tensor.shape[-1] + columns), torch.nan).to(tensor)
    wide[1:-1, ..., : tensor.shape[-1]] = tensor
    return wide[1:-1, ..., : tensor.shape[-1]]


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("lies", ["by rows", "by columns"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("isa", ISAS)
def test_products_read_nothing_beyond_their_operands(isa: str, dtype: torch.dtype, lies: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, inner, columns in (
            *((rows, 64, 47) for rows in (1, 4, 5, 16, 17, 33, 97, 128, 129)),
            *((9, 544, columns) for columns in (16, 17, 31, 50, 131)),
            *((40, inner, 70) for inner in (1, 31, 66, 96)),
            *((150, 1060, columns) for columns in (33, 260)),
            (40, 5504, 300),
        ):
            x, bias = torch.randn(rows, inner).to(dtype), torch.randn(columns).to(dtype)
            weight = (torch.randn(columns, inner) * inner**-0.5).to(dtype)
            place = amid_nan(weight) if lies == "by rows" else amid_nan(weight.t()).t()
            with cpu.use_isa(isa):
                checked = check_linear_act(amid_nan(x), place, bias, "silu", backend="cpu")
            assert not failures(checked), (rows, inner, columns, failures(checked))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dim", [16, 32, 40, 64, 80, 96])
@pytest.mark.parametrize("isa", ISAS)
def test_attention_reads_nothing_beyond_its_rows(isa: str, dim: int) -> None:
    for len_q, len_k in ((1, 64), (64, 64), (70, 63), (17, 129), (130, 200)):
        inputs = [torch.randn(2, 2, length, dim).bfloat16() for length in (len_q, len_k, len_k)]
        grad = torch.randn(2, 2, len_q, dim).bfloat16()
        for mask in (None, Causal(), SlidingWindow(30, 5)):
            found = []
            for place in (lambda tensor: tensor, amid_nan):
                leaves = [place(tensor).detach().requires_grad_() for tensor in inputs]
                with cpu.use_isa(isa):
                    out = fastattn.attention(*leaves, mask=mask, backend="cpu")
                    found.append((out, *torch.autograd.grad(out, leaves, place(grad))))
            for name, one, other in zip(("out", "dq", "dk", "dv"), *found, strict=True):
                assert torch.equal(one, other), (name, len_q, len_k, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [0.02, 0.3, -0.3, 30.0])
@pytest.mark.parametrize("isa", ISAS)
def test_the_base_of_the_softmax_follows_its_maximum(isa: str, step: float, dtype: torch.dtype) -> None:
    """Scores that rise from key to key: by little in all, past the slack every few keys, by more than exp can hold."""
    q = torch.ones(1, 2, 70, 32, dtype=dtype)
    k = (torch.arange(300.0) * step / 32).view(1, 1, 300, 1).expand(1, 2, 300, 32).to(dtype).contiguous()
    v = torch.randn(1, 2, 300, 32).to(dtype)
    sinks = torch.tensor([0.0, 4.0])
    for mask in (None, SlidingWindow(100, 100)):
        with cpu.use_isa(isa):
            checked = check_attention(q, k, v, mask=mask, sinks=sinks, scale=1.0, backend="cpu")
        assert not failures(checked), (mask, failures(checked))


@pytest.mark.parametrize(("size", "scale"), [(3e4, None), (1e5, None), (1.0, 1e-40), (1.0, 1e30)])
@pytest.mark.parametrize("isa", ISAS)
def test_scores_of_any_size(isa: str, size: float, scale: float | None) -> None:
    """Beyond 2^24 neighbouring scores of float32 are more than e apart; a scale may be no normal number."""
    q, k, v = (torch.randn(1, 2, 200, 64).bfloat16() for _ in range(3))
    with cpu.use_isa(isa):
        out, lse = fastattn.attention(q * size, k * size, v, scale=scale, return_lse=True, backend="cpu")
    truth, true_lse = fastattn.reference.attention(
        *((tensor * size).double() for tensor in (q, k)), v.double(), scale=scale, return_lse=True
    )
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(out.double(), truth, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("isa", ISAS)
def test_gradients_do_not_depend_on_the_threads(isa: str) -> None:
    """One head is shared by the threads, which cut its keys between and within blocks."""
    before = torch.get_num_threads()
    try:
        for length, mask in ((1032, None), (1100, Causal()), (1161, SlidingWindow(70, 0))):
            leaves = [torch.randn(1, 1, length, 64).bfloat16().requires_grad_() for _ in range(3)]
            grad, found = torch.randn(1, 1, length, 64).bfloat16(), []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with cpu.use_isa(isa):
                    out = fastattn.attention(*leaves, mask=mask, backend="cpu")
                    found.append((out, *torch.autograd.grad(out, leaves, grad)))
            for name, one, other in zip(("out", "dq", "dk", "dv"), *found, strict=True):
                assert torch.equal(one, other), (name, length, mask)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 65504.0])
@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("isa", ISAS)
def test_float16_that_does_not_split(isa: str, where: str, value: float) -> None:
    """AMX multiplies float16 as two bfloat16 parts, which infinity and NaN do not have."""
    x, weight = (torch.rand(60, 90) + 0.5).half(), (torch.rand(100, 90) / 90).half()
    (x if where == "x" else weight)[33, 44] = value
    with cpu.use_isa(isa):
        y, _ = cpu.linear_act_forward(x, weight, None, "none", False)
    expected = torch.nn.functional.linear(x.float(), weight.float()).half()
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=2e-3, atol=1e-3)
