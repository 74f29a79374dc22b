"""What `linear_act`, `ffn` and `gated_ffn` promise, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import reference
from fastattn.reference import philox

ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "relu2"]
SHAPES = {
    "linear_act": ((2, 3, 12), (20, 12), (20,)),
    "ffn": ((2, 3, 12), (20, 12), (20,), (10, 20), (10,)),
    "gated_ffn": ((2, 3, 12), (20, 12), (20, 12), (10, 20), (20,), (20,), (10,)),
}
BIASES = {"linear_act": (2,), "ffn": (2, 4), "gated_ffn": (4, 5, 6)}


def arrange(op, tensors, activation):
    """The positional arguments of an op, whose activation stands in the middle of gated_ffn's."""
    if op == "gated_ffn":
        return (*tensors[:4], activation, *tensors[4:])
    return (*tensors, activation)


@pytest.mark.parametrize("op", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_biases", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_and_gradients(backend, op, activation, with_biases, dtype):
    tensors = [(torch.randn(s) / 2).to(dtype).requires_grad_() for s in SHAPES[op]]
    if not with_biases:
        tensors = [None if i in BIASES[op] else t for i, t in enumerate(tensors)]
    y = getattr(fastattn, op)(*arrange(op, tensors, activation), backend=backend)
    assert y.dtype == dtype and y.is_contiguous()
    wide = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    truth = getattr(reference, op)(*arrange(op, wide, activation))
    grad = torch.randn(y.shape).to(dtype)
    inputs = [t for t in tensors if t is not None]
    gradients = torch.autograd.grad(y, inputs, grad)
    expected = torch.autograd.grad(truth, [t for t in wide if t is not None], grad.double())
    eps = torch.finfo(dtype).eps
    for result, want in zip((y, *gradients), (truth, *expected), strict=True):
        assert result.dtype == dtype
        assert (result.double() - want).abs().max().item() <= 16 * eps * want.abs().max().item() + 1e-5


@pytest.mark.parametrize("op", SHAPES)
def test_each_gradient_alone_equals_all_together(backend, op):
    tensors = [torch.randn(s, requires_grad=True) for s in SHAPES[op]]

    def call(tensors):
        return getattr(fastattn, op)(*arrange(op, tensors, "gelu"), backend=backend).square().sum()

    together = torch.autograd.grad(call(tensors), tensors)
    for i, expected in enumerate(together):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        call(alone).backward()
        torch.testing.assert_close(alone[i].grad, expected)
        assert all(t.grad is None for j, t in enumerate(alone) if j != i)


@pytest.mark.parametrize("op", SHAPES)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (4,), (2, 0), (2, 1, 3)])
def test_ranks_and_empty_sizes(backend, op, lead):
    tensors = [
        torch.randn(*lead, 12, requires_grad=True),
        *(torch.randn(s, requires_grad=True) for s in SHAPES[op][1:]),
    ]
    y = getattr(fastattn, op)(*arrange(op, tensors, "silu"), backend=backend)
    torch.testing.assert_close(y, getattr(reference, op)(*arrange(op, tensors, "silu")), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(y.sum(), tensors)
    assert [g.shape for g in gradients] == [t.shape for t in tensors]


def test_strided_inputs_weights_and_gradients(backend):
    x = torch.randn(12, 6, 4).permute(2, 1, 0).requires_grad_()
    weight = torch.randn(12, 20).t().requires_grad_()
    y = fastattn.linear_act(x, weight, None, "relu", backend=backend)
    torch.testing.assert_close(y, F.relu(F.linear(x, weight)), rtol=1e-5, atol=1e-5)
    grad = torch.randn(20, 6, 4).permute(2, 1, 0)
    gradients = torch.autograd.grad(y, (x, weight), grad, retain_graph=True)
    for a, b in zip(gradients, torch.autograd.grad(y, (x, weight), grad.contiguous()), strict=True):
        assert torch.equal(a, b)
    assert gradients[1].stride() == weight.stride()


LAYOUTS = {
    "transposed": lambda w: w.t().contiguous().t(),
    "transposed and padded": lambda w: F.pad(w.t(), (0, 5))[:, : w.shape[0]].t(),
    "padded": lambda w: F.pad(w, (0, 5))[:, : w.shape[1]],
    "every second": lambda w: w.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda w: w[:1].expand_as(w),
}


@pytest.mark.parametrize("op", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_any_strides(backend, op, layout):
    x, *rest = [torch.randn(s) for s in SHAPES[op]]
    odd = [x.requires_grad_(), *((LAYOUTS[layout](t) if t.dim() == 2 else t).requires_grad_() for t in rest)]
    plain = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in odd]
    results = []
    for tensors in (odd, plain):
        y = getattr(fastattn, op)(*arrange(op, tensors, "silu"), backend=backend)
        results.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("op", SHAPES)
def test_gradcheck_through_the_operators(op):
    tensors = [torch.randn([n // 4 + 1 for n in s], dtype=torch.float64, requires_grad=True) for s in SHAPES[op]]
    assert torch.autograd.gradcheck(lambda *t: getattr(fastattn, op)(*arrange(op, t, "gelu")), tensors)


@pytest.mark.parametrize("op", ["ffn", "gated_ffn"])
@pytest.mark.parametrize(
    "hidden", [7, 20, 70, 200]
)  # below, across and beyond the groups of 32 that share Philox calls
def test_dropout_keeps_what_the_reference_keeps(backend, op, hidden):
    """With an identity for the last weight the hidden layer itself comes out: dropped elements are exactly 0."""
    rows, p, seed = 37, 0.3, torch.tensor([-123456789123])
    x, w = torch.rand(rows, 6) + 1, torch.rand(hidden, 6) + 1
    eye = torch.eye(hidden)
    weights = (w, None, eye, None) if op == "ffn" else (w, w, eye)
    y = getattr(fastattn, op)(x, *weights, "relu", dropout_p=p, dropout_seed=seed, backend=backend)
    plain = getattr(fastattn, op)(x, *weights, "relu", backend=backend)
    keep = philox.keep_mask(seed, p, 1, rows, hidden)[0]
    assert torch.equal(y != 0, keep)
    torch.testing.assert_close(y, plain * keep * philox.dropout_scale(p))


def test_dropout_is_random_unless_seeded_and_off_at_zero(backend):
    x, w1, w2 = torch.randn(5, 8), torch.randn(40, 8), torch.randn(3, 40)
    draws = [fastattn.ffn(x, w1, None, w2, None, dropout_p=0.5, backend=backend) for _ in range(2)]
    assert not torch.equal(*draws)
    none = fastattn.ffn(x, w1, None, w2, None, dropout_seed=torch.tensor([1]), backend=backend)
    assert torch.equal(none, fastattn.ffn(x, w1, None, w2, None, backend=backend))


@pytest.mark.slow
@pytest.mark.parametrize("op", ["ffn", "gated_ffn"])
def test_dropout_gradcheck_through_the_operators(op):
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in SHAPES[op]]

    def call(*tensors):
        return getattr(fastattn, op)(*arrange(op, tensors, "gelu"), dropout_p=0.4, dropout_seed=torch.tensor([9]))

    assert torch.autograd.gradcheck(call, tensors)
