"""What `layer_norm` and `rms_norm` promise, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import reference

TENSORS = ("x", "weight", "bias", "residual")


def run(kind, tensors, backend, **extras):
    kwargs = {**tensors, **extras, "return_residual": True, "backend": backend}
    if kind == "layer":
        return fastattn.layer_norm(eps=1e-5, **kwargs)
    kwargs.pop("bias", None)
    return fastattn.rms_norm(eps=1e-5, offset=1.0, **kwargs)


def truth(kind, tensors, **extras):
    kwargs = {**tensors, **extras, "kind": kind, "return_residual": True, "eps": 1e-5}
    if kind == "rms":
        kwargs.pop("bias", None)
        kwargs["offset"] = 1.0
    return reference.norm(**kwargs)


def draw(dtype, other, present=TENSORS, shape=(3, 5, 24)):
    width = shape[-1]
    shapes = {"x": shape, "weight": (width,), "bias": (width,), "residual": shape}
    return {
        name: torch.randn(shapes[name]).to(dtype if name == "x" else other).requires_grad_()
        for name in TENSORS
        if name in present
    }


def used(kind, tensors):
    return [name for name in tensors if not (kind == "rms" and name == "bias")]


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("present", [("x",), ("x", "weight"), ("x", "weight", "bias"), ("x", "residual"), TENSORS])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_outputs_and_gradients(backend, kind, present, dropout_p, dtype, other):
    tensors = draw(dtype, other, present)
    extras = {"dropout_p": dropout_p, "dropout_seed": torch.tensor([5])} if dropout_p else {}
    results = run(kind, tensors, backend, **extras)
    grads = [torch.randn(r.shape).to(r.dtype) for r in results]
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    truths = truth(kind, wide, **extras)
    names = used(kind, tensors)
    gradients = torch.autograd.grad(results, [tensors[n] for n in names], grads)
    expected = torch.autograd.grad(truths, [wide[n] for n in names], [g.double() for g in grads])
    eps = torch.finfo(dtype).eps
    for name, result, want in zip(["y", "z", *names], [*results, *gradients], [*truths, *expected], strict=True):
        bound = 8 * eps * want.abs().max().item() + 1e-5
        assert (result.double() - want).abs().max().item() <= bound, name
    for name, gradient in zip(names, gradients, strict=True):
        assert gradient.dtype == tensors[name].dtype


def test_a_float32_residual_stream_gets_its_gradient_unrounded(backend):
    tensors = draw(torch.bfloat16, torch.float32, ("x", "residual"))
    y, z = run("layer", tensors, backend)
    grad = torch.randn_like(z)
    dx, dresidual = torch.autograd.grad((y, z), (tensors["x"], tensors["residual"]), (torch.zeros_like(y), grad))
    assert torch.equal(dresidual, grad) and torch.equal(dx, grad.bfloat16())


def test_without_residual_and_dropout_the_sum_is_the_input(backend):
    x = torch.randn(2, 8)
    y, z = fastattn.layer_norm(x, return_residual=True, backend=backend)
    assert z is x
    torch.testing.assert_close(y, F.layer_norm(x, (8,)))


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8), (1, 1, 1), (3, 1)])
def test_ranks_and_empty_sizes(backend, shape):
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[-1], requires_grad=True)
    y = fastattn.layer_norm(x, weight, backend=backend)
    torch.testing.assert_close(y, F.layer_norm(x, shape[-1:], weight), rtol=1e-5, atol=1e-5)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == x.shape and dweight.shape == weight.shape and dx.isfinite().all()


def test_strided_input_and_gradients(backend):
    x = torch.randn(6, 4, 10).transpose(0, 1)[..., ::2].requires_grad_()
    y = fastattn.rms_norm(x, eps=1e-6, backend=backend)
    torch.testing.assert_close(y, F.rms_norm(x, (5,), eps=1e-6))
    (expanded,) = torch.autograd.grad(y, x, torch.ones(()).expand(y.shape), retain_graph=True)
    (dense,) = torch.autograd.grad(y, x, torch.ones(y.shape))
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_default_eps_is_that_of_torch(dtype):
    x = torch.full((2, 4), 1e-5).to(dtype)
    torch.testing.assert_close(fastattn.rms_norm(x), F.rms_norm(x, (4,)))


def test_only_the_sum_used(backend):
    tensors = draw(torch.float32, torch.float32)
    _, z = run("layer", tensors, backend)
    dx, dresidual = torch.autograd.grad(z.sum(), (tensors["x"], tensors["residual"]))
    assert torch.equal(dx, torch.ones_like(dx)) and torch.equal(dresidual, torch.ones_like(dx))


def test_gradcheck_through_the_operators():
    tensors = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (6,), (6,), (3, 6))]

    def call(x, weight, bias, residual):
        return fastattn.layer_norm(
            x, weight, bias, residual=residual, dropout_p=0.3, dropout_seed=torch.tensor([2]), return_residual=True
        )

    assert torch.autograd.gradcheck(call, tensors)
