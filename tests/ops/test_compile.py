"""torch.compile(fullgraph=True), forward and backward, static and dynamic shapes, with and without gradients."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn.masks import Causal, Document, KeyLengths, Longformer, PrefixLM, Strided, lowering
from fastattn.masks.blocks import build_blocks


def flat(results):
    return results if isinstance(results, tuple) else (results,)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_forward_and_backward(case, dynamic):
    tensors = case.draw()
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results, expected = flat(compiled(*tensors)), flat(case.function(*tensors))
    grads = [torch.randn_like(r) for r in expected]
    for result, truth in zip(results, expected, strict=True):
        assert torch.equal(result, truth) and result.stride() == truth.stride()
    for a, b in zip(
        torch.autograd.grad(results, tensors, grads), torch.autograd.grad(expected, tensors, grads), strict=True
    ):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_without_gradients(case):
    tensors = [t.detach() for t in case.draw()]
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for result, truth in zip(flat(compiled(*tensors)), flat(case.function(*tensors)), strict=True):
            assert torch.equal(result, truth)


def test_one_graph_serves_all_lengths():
    counter = CompileCounterWithBackend("aot_eager")

    def call(q, k, v, lengths):
        return fastattn.attention(q, k, v, mask=Causal() & KeyLengths(lengths))

    compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
    for len_q, len_k in [(3, 5), (4, 9), (6, 6), (17, 40)]:
        q, k, v = torch.randn(2, 4, len_q, 8), torch.randn(2, 2, len_k, 8), torch.randn(2, 2, len_k, 8)
        lengths = torch.tensor([2, len_k])
        assert torch.equal(compiled(q, k, v, lengths), call(q, k, v, lengths))
    assert counter.frame_count <= 2  # (6, 6) may be a graph of its own


def test_intervals_are_lowered_in_the_graph_and_blocks_outside_of_it():
    q, ids = torch.randn(2, 2, 70, 8), torch.arange(70) // 20

    def call(q, ids, mask):
        return fastattn.attention(q, q, q, mask=mask if mask is not None else Document(ids) | Longformer(4, 2))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, ids, None), call(q, ids, None))
    blocks = Strided(9) & Causal()
    expected = call(q, ids, blocks)
    assert torch.equal(compiled(q, ids, blocks.lower(2, 2, 70, 70, q.device)), expected)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(call, backend="aot_eager")(q, ids, blocks), expected)  # a graph may break there


def test_blocks_are_built_once_for_all_calls_of_a_graph(monkeypatch):
    built = []
    monkeypatch.setattr(lowering, "build_blocks", lambda *args: built.append(args) or build_blocks(*args))
    q, blocks = torch.randn(1, 1, 71, 8), Strided(11) & Causal()
    compiled = torch.compile(lambda q: fastattn.attention(q, q, q, mask=blocks), backend="aot_eager")
    found = [compiled(q) for _ in range(3)]
    assert len(built) == 1 and all(torch.equal(y, found[0]) for y in found)


def test_under_autocast():
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)

    def call(x, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = fastattn.linear_act(fastattn.layer_norm(x), w, None, "relu").view(1, 1, 3, 6)
            return fastattn.attention(y, y, y)

    result, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(x, w), call(x, w)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, expected)
    for a, b in zip(
        torch.autograd.grad(result.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)  # three bfloat16 gradients, added in another order


def test_one_tensor_in_several_places():
    x, w = torch.randn(1, 2, 5, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)

    def call(x, w):
        y = fastattn.attention(x, x, x)
        return fastattn.layer_norm(y, residual=y) + fastattn.gated_ffn(y, w, w, w)

    result, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(x, w), call(x, w)
    assert torch.equal(result, expected)
    for a, b in zip(
        torch.autograd.grad(result.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_dropout_draws_its_seed_inside_the_graph():
    q, k, v = (torch.randn(2, 2, 8, 8, requires_grad=True) for _ in range(3))
    compiled = torch.compile(
        lambda q, k, v: fastattn.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    first, second = compiled(q, k, v), compiled(q, k, v)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert q.grad.isfinite().all()


def test_use_backend_reaches_a_compiled_function():
    x = torch.randn(2, 8)
    compiled = torch.compile(fastattn.layer_norm, fullgraph=True, backend="aot_eager")
    compiled(x)
    with pytest.raises(fastattn.NotSupported), fastattn.use_backend("cuda"):
        compiled(x)
    compiled(x)


@pytest.mark.skipif(torch.__version__ < "2.8", reason="torch 2.7 traces no such context whole")
def test_a_use_backend_block_may_stand_in_a_compiled_function():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(x, name):
        with fastattn.use_backend(name):
            return fastattn.layer_norm(x)

    x = torch.randn(2, 8)
    assert torch.equal(call(x, "reference"), fastattn.layer_norm(x, backend="reference"))
    with pytest.raises(fastattn.NotSupported):
        call(x, "cuda")
    assert fastattn.dispatch.forced == ""


@pytest.mark.parametrize("strict", [False, True])
def test_a_mask_of_blocks_lowered_before_is_exported(strict):
    if strict and torch.__version__ < "2.8":
        pytest.skip("torch 2.7 exports no tensors that a forward closes over")

    class Attend(torch.nn.Module):
        def forward(self, q):
            return fastattn.attention(q, q, q, mask=lowered)

    q = torch.randn(1, 2, 70, 8)
    mask = fastattn.masks.BigBird(8, 3, 1, 1)
    lowered = mask.lower(1, 2, 70, 70, q.device)
    exported = torch.export.export(Attend(), (q,), strict=strict)
    assert torch.equal(exported.module()(q), fastattn.attention(q, q, q, mask=mask))


def test_wrong_arguments_keep_their_error():
    with pytest.raises(Exception, match="q has 3 dimensions"):
        torch.compile(fastattn.attention, backend="aot_eager")(*(torch.randn(2, 3, 8) for _ in range(3)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_encoder_layer(dynamic):
    square, up, down, row, wide = (
        torch.randn(8, 8),
        torch.randn(12, 8),
        torch.randn(8, 12),
        torch.randn(8),
        torch.randn(12),
    )
    weights = [square, row] * 4 + [row, row, up, wide, down, row, row, row]
    keep = torch.ones(2, 1, 1, 5, dtype=torch.bool)

    def call(x, keep):
        return fastattn.encoder_layer(x, *weights, heads=2, mask=keep) + 1.0

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (5, 9):
        x, keep = torch.randn(2, length, 8), torch.rand(2, 1, 1, length) < 0.7
        assert torch.equal(compiled(x, keep), call(x, keep))

    def packed(x, bounds):
        return fastattn.encoder_layer(x, *weights, heads=2, cu_seqlens=bounds, norm_first=True)

    x, bounds = torch.randn(9, 8), torch.tensor([0, 4, 9], dtype=torch.int32)
    assert torch.equal(
        torch.compile(packed, fullgraph=True, backend="aot_eager", dynamic=dynamic)(x, bounds), packed(x, bounds)
    )


@pytest.mark.slow
def test_inductor(case):
    tensors = case.draw()
    compiled = torch.compile(case.function, fullgraph=True)
    results, expected = flat(compiled(*tensors)), flat(case.function(*tensors))
    grads = [torch.randn_like(r) for r in expected]
    for result, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(result, truth)
    for a, b in zip(
        torch.autograd.grad(results, tensors, grads), torch.autograd.grad(expected, tensors, grads), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_derivatives_of_torch_func_inside_of_a_graph_are_refused_not_zero() -> None:
    """Dynamo would trace the operator without its derivative."""
    x, weight = torch.randn(3, 4, 8), torch.ones(8)

    def norm(t: torch.Tensor) -> torch.Tensor:
        return fastattn.layer_norm(t, weight)

    for function in (
        torch.func.grad(lambda t: norm(t).pow(3).sum()),
        torch.func.grad(lambda t: torch.vmap(norm)(t).pow(3).sum()),
        torch.vmap(torch.func.grad(lambda t: norm(t).pow(3).sum())),
    ):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(function, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    batched = torch.compile(torch.vmap(norm), fullgraph=True, backend="eager")
    torch.testing.assert_close(batched(x), norm(x), atol=1e-6, rtol=1e-6)


class _Attends(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, q):
        return fastattn.attention(q, q, q, mask=self.mask)


@pytest.mark.skipif(not hasattr(torch.compiler, "_is_exporting_flag"), reason="torch 2.7 does not tell an export")
@pytest.mark.parametrize("mask", [PrefixLM(4), Longformer(8, 2)])
def test_a_graph_of_intervals_is_exported_for_any_length(mask):
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(_Attends(mask), (torch.randn(1, 2, 100, 8),), dynamic_shapes={"q": {2: length}})
    for n in (5, 64, 65, 130):
        q = torch.randn(1, 2, n, 8)
        assert torch.equal(exported.module()(q), fastattn.attention(q, q, q, mask=mask)), n


def test_a_mask_of_blocks_that_a_graph_cannot_build_says_what_to_do():
    q = torch.randn(1, 2, 100, 8)
    with pytest.raises(NotImplementedError, match=r"needs blocks.* pass what its lower\(...\) gave"):
        fastattn.attention(*[q.to("meta")] * 3, mask=Strided(3))
    if not hasattr(torch.compiler, "_is_exporting_flag"):  # torch 2.7, which takes no reason for a break either
        return
    with pytest.raises(NotImplementedError, match=r"needs blocks.* pass what its lower\(...\) gave"):
        torch.export.export(_Attends(Strided(3)), (q,), strict=False)
    compiled = torch.compile(_Attends(Strided(3)), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"pass mask.lower\(...\)"):
        compiled(q)
