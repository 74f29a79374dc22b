"""Second, third and forward-mode derivatives: of every function, by plain autograd and by torch.func, of swapped
modules; counted, and refused to a forced backend."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import dispatch, reference
from fastattn.biases import ALiBi, T5Bias
from fastattn.masks import Causal, KeyLengths

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu", "quick_gelu", "relu2")
SEED = torch.tensor([5])
BOUNDS = torch.tensor([0, 2, 5], dtype=torch.int32)

pytestmark = pytest.mark.filterwarnings("ignore::fastattn.dispatch.BackendWarning")


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes)


def no_key_at_all(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = fastattn.attention(q, k, v, sinks=sinks, mask=KeyLengths([6, 0]), return_lse=True)
    return out, lse.masked_fill(lse.isinf(), 0.0)


QKV = ((2, 4, 3, 5), (2, 2, 6, 5), (2, 2, 6, 3))
FFN = ((3, 6), (7, 6), (7,), (5, 7), (5,))
NORM = ((3, 6), (6,), (6,), (3, 6))
CALLS: dict[str, tuple[Callable[..., object], tuple[tuple[int, ...], ...]]] = {
    "attention": (lambda *t: fastattn.attention(*t, return_lse=True), QKV),
    "masked": (lambda *t: fastattn.attention(*t, mask=Causal() & KeyLengths([6, 3])), QKV),
    "capped, with sinks": (
        lambda q, k, v, s: fastattn.attention(q, k, v, sinks=s, softcap=3.0, return_lse=True),
        (*QKV, (4,)),
    ),
    "no key at all": (no_key_at_all, (*QKV, (4,))),
    "dense bias, dropout": (
        lambda q, k, v, b: fastattn.attention(q, k, v, bias=b, dropout_p=0.3, dropout_seed=SEED),
        (*QKV, (1, 4, 3, 6)),
    ),
    "slopes": (lambda q, k, v, s: fastattn.attention(q, k, v, bias=ALiBi(s)), (*QKV, (4,))),
    "buckets": (
        lambda q, k, v, t: fastattn.attention(q, k, v, bias=T5Bias(t, bidirectional=True, max_distance=8)),
        (*QKV, (4, 4)),
    ),
    "packed": (
        lambda q, k: fastattn.attention_varlen(q, k, 2.0 * k, BOUNDS, BOUNDS, mask=Causal()),
        ((5, 2, 4), (5, 2, 4)),
    ),
    "layer norm": (lambda x, w, b, _: fastattn.layer_norm(x, w, b), NORM),
    "layer norm, residual, dropout": (
        lambda x, w, b, r: fastattn.layer_norm(
            x, w, b, residual=r, return_residual=True, dropout_p=0.25, dropout_seed=SEED
        ),
        NORM,
    ),
    "rms norm": (lambda x, w, _, r: fastattn.rms_norm(x, w, 1e-3, offset=1.0, residual=r), NORM),
    "gated": (
        lambda x, wg, bg, wd, bd, wu, bu: fastattn.gated_ffn(
            x, wg, wu, wd, "silu", bg, bu, bd, dropout_p=0.25, dropout_seed=SEED
        ),
        (*FFN, (7, 6), (7,)),
    ),
    **{f"linear, {a}": (lambda x, w, b, a=a: fastattn.linear_act(x, w, b, a), FFN[:3]) for a in ACTIVATIONS},
    **{f"ffn, {a}": (lambda *t, a=a: fastattn.ffn(*t, a), FFN) for a in ACTIVATIONS},
}


@pytest.mark.parametrize("name", CALLS)
def test_derivatives_of_float64(name: str) -> None:
    call, shapes = CALLS[name]
    inputs = draw(*shapes)
    assert gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["attention", "layer norm, residual, dropout", "ffn, gelu", "gated"])
def test_second_derivatives_beside_kernels(name: str) -> None:
    """The forward ran on a kernel of float32; the penalty's gradients are those of float64."""
    call, shapes = CALLS[name]
    inputs = tuple((0.5 * t.detach()).requires_grad_() for t in draw(*shapes, dtype=torch.float32))

    def penalty(*tensors: Tensor) -> tuple[Tensor, ...]:
        results = call(*tensors)
        total = sum(t.square().sum() for t in (results if isinstance(results, tuple) else (results,)))
        first = torch.autograd.grad(total, tensors, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), tensors)

    expected = penalty(*(t.detach().double().requires_grad_() for t in inputs))
    for found, exact in zip(penalty(*inputs), expected, strict=True):
        torch.testing.assert_close(found, exact.float(), atol=1e-4, rtol=1e-4)


def test_third_derivatives() -> None:
    q, k, v = draw(*QKV)

    def third(attention: Callable[..., Tensor]) -> Tensor:
        value = attention(q, k, v).square().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, q, create_graph=True)
            value = gradient.square().sum()
        return gradient

    torch.testing.assert_close(third(fastattn.attention), third(reference.attention))


@pytest.mark.parametrize("name", ["attention", "layer norm, residual, dropout", "ffn, gelu", "gated", "linear, silu"])
def test_third_derivatives_of_torch_func(name: str) -> None:
    call, shapes = CALLS[name]
    inputs = tuple(t.detach() for t in draw(*shapes))

    def total(results: object) -> Tensor:
        return sum((t.square().sum() for t in (results if isinstance(results, tuple) else (results,))), torch.zeros(()))

    def plain(*tensors: Tensor) -> tuple[Tensor, ...]:
        tensors = tuple(t.requires_grad_() for t in tensors)
        value = total(call(*tensors))
        for _ in range(3):
            gradients = torch.autograd.grad(value, tensors, create_graph=True)
            value = total(gradients)
        return gradients

    def gradient(function: Callable[..., object]) -> Callable[..., object]:
        def run(*tensors: Tensor) -> object:
            value, pull = torch.func.vjp(lambda *t: total(function(*t)), *tensors)
            return pull(torch.ones_like(value))

        return run

    for found, expected in zip(gradient(gradient(gradient(call)))(*inputs), plain(*inputs), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("outer", [torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.parametrize("inner", [torch.func.jacrev, torch.func.jacfwd])
def test_hessians_of_torch_func(outer: Callable[..., object], inner: Callable[..., object]) -> None:
    x, w, b = (t.detach() for t in draw((2, 3), (3,), (3,)))

    def ours(x: Tensor) -> Tensor:
        return fastattn.layer_norm(x, w, b, 0.1).square()

    def theirs(x: Tensor) -> Tensor:  # torch's own layer_norm is wrong in reverse over forward mode
        y = reference.norm(x, w, b, eps=0.1)
        assert isinstance(y, Tensor)
        return y.square()

    torch.testing.assert_close(outer(inner(ours))(x), outer(inner(theirs))(x))
    q, k, v = (t.detach() for t in draw((1, 1, 2, 3), (1, 1, 3, 3), (1, 1, 3, 2)))
    found = outer(inner(lambda q: fastattn.attention(q, k, v, mask=Causal())))(q)
    expected = outer(inner(lambda q: reference.attention(q, k, v, mask=Causal())))(q)
    torch.testing.assert_close(found, expected)


def test_hessians_of_every_sample() -> None:
    x, w1, b1, w2, b2 = (t.detach() for t in draw((4, 6), *FFN[1:]))

    def ours(x: Tensor) -> Tensor:
        return fastattn.ffn(x, w1, b1, w2, b2, "gelu").sum()

    def theirs(x: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2).sum()

    for outer, inner in itertools.product((torch.func.jacrev, torch.func.jacfwd), repeat=2):
        found, expected = (torch.vmap(outer(inner(each)))(x) for each in (ours, theirs))
        torch.testing.assert_close(found, expected)


def test_a_tangent_of_a_gradient() -> None:
    """Forward-mode through a backward whose forward knew nothing of it."""
    (x,) = draw((3, 6))
    w = torch.ones(6, dtype=torch.float64)
    y = fastattn.layer_norm(x, w)
    tangent = torch.linspace(-1.0, 1.0, 18, dtype=torch.float64).view(3, 6)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(y), tangent)
        (gradient,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        found = forward_ad.unpack_dual(gradient).tangent
    torch.testing.assert_close(found, torch.autograd.grad(y, x, tangent)[0])


def test_tangents_of_every_sample_beside_two_biases() -> None:
    q, k, v, b = (t.detach() for t in draw(*QKV, (3, 1, 1, 3, 6)))
    b[..., -1] = -torch.inf  # a sum of biases tells what hides from what is too large
    slopes = torch.ones(4, dtype=torch.float64)

    def of(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda b: torch.func.jvp(lambda b: attention(q, k, v, mask=b, bias=ALiBi(slopes)), (b,), (b.cos(),))[1]

    torch.testing.assert_close(
        torch.vmap(of(fastattn.attention))(b), torch.stack([of(reference.attention)(t) for t in b])
    )


@pytest.mark.parametrize("size", [1e-18, 1e15])
@pytest.mark.parametrize("norm", [fastattn.layer_norm, fastattn.rms_norm])
def test_second_derivatives_of_norms_of_any_size(norm: Callable[..., Tensor], size: float) -> None:
    (x,) = draw((3, 6))
    results = []
    for dtype in (torch.float64, torch.float32):
        scaled = (size * x.detach()).to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(norm(scaled, eps=0.0).sin().sum(), scaled, create_graph=True)
        results.append(torch.autograd.grad(gradient[:, 0].sum(), scaled)[0].double() * size**2)
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


def test_a_derivative_of_relu_is_zero_and_not_missing() -> None:
    """As torch's: a Hessian of a piecewise linear function is asked for without allow_unused."""
    x, w = draw((3, 6), (4, 6))
    (gradient,) = torch.autograd.grad(fastattn.linear_act(x, w.detach(), None, "relu").sum(), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(gradient.sum(), x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("causal", [False, True])
def test_forward_mode_of_torchs_function(causal: bool) -> None:
    q, k, v = (t.detach() for t in draw((2, 4, 3, 5), (2, 4, 6, 5), (2, 4, 6, 5)))  # torch's kernel has none
    mask = Causal("top-left") if causal else None

    def ours(q: Tensor) -> Tensor:
        return fastattn.scaled_dot_product_attention(q, k, v, is_causal=causal)

    found = torch.func.jacfwd(torch.func.jacrev(lambda q: ours(q).square().sum()))(q)
    expected = torch.func.hessian(lambda q: reference.attention(q, k, v, mask=mask).square().sum())(q)
    torch.testing.assert_close(found, expected)


class Parts(nn.Module):
    """Every Function there is."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(draw((6, 6))[0].detach())

    def forward(self, x: Tensor) -> Tensor:
        x = fastattn.linear_act(fastattn.layer_norm(x, self.w[0]), self.w, None, "gelu")
        x = fastattn.attention(x[None], x[None], x[None])[0]
        return fastattn.gated_ffn(fastattn.ffn(x, self.w, None, self.w, None, "silu"), self.w, self.w, self.w)


@pytest.mark.filterwarnings("ignore")
def test_a_graph_exported_of_tensors_that_need_no_gradient_passes_one() -> None:
    class Residual(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = fastattn.attention(x, x, x)
            return x + y + fastattn.layer_norm(y)

    x = torch.randn(1, 2, 9, 8)
    graph = torch.export.export(Residual(), (x,)).module()
    found, expected = (
        (each := x.clone().requires_grad_(), run(each).square().sum().backward()) for run in (graph, Residual())
    )
    torch.testing.assert_close(found[0].grad, expected[0].grad)


@pytest.mark.parametrize("kind", ["exported", "traced"])
def test_tangents_through_graphs(kind: str) -> None:
    module, (x, tangent) = Parts(), (t.detach() for t in draw((2, 3, 6), (2, 3, 6)))
    if kind == "exported":
        graph = torch.export.export(module, (x,)).module()
    else:
        graph = torch.jit.trace(module, (x,), check_trace=False)
    found, expected = (torch.func.jvp(each, (x,), (tangent,))[1] for each in (graph, module))
    torch.testing.assert_close(found, expected)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(graph(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, expected)


def test_tensors_without_data() -> None:
    x = torch.randn(3, 6, device="meta", requires_grad=True)
    (gradient,) = torch.autograd.grad(fastattn.layer_norm(x).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), x)[0].shape == (3, 6)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.block = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.block(x)


@pytest.mark.parametrize("outer", [torch.func.jacrev, torch.func.jacfwd])
def test_hessians_of_a_swapped_model(outer: Callable[..., Callable[..., Tensor]]) -> None:
    """By the formulas in forward mode too: torch's attention has none there."""
    torch.manual_seed(0)
    model, x = Attends(), torch.randn(1, 2, 8)
    model.norm = nn.Identity()  # few elements are torch's, whose layer_norm is wrong in reverse over forward mode
    fastattn.swap(model)
    expected = torch.func.jacrev(torch.func.jacrev(model))(x)
    torch.testing.assert_close(outer(torch.func.jacfwd(model))(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_gradient_penalty_of_a_swapped_model(frozen: bool) -> None:
    torch.manual_seed(0)
    original = Attends().requires_grad_(not frozen)
    swapped = copy.deepcopy(original)
    fastattn.swap(swapped)
    results = []
    for model in (original, swapped):
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            (gradient.norm(dim=-1) - 1.0).square().mean().backward()
        results.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_they_are_counted_and_refused_to_a_forced_backend() -> None:
    x, w = draw((3, 6), (6,), dtype=torch.float32)
    key = ("norm", dispatch.ORDER["cpu"][0], "the kernels have no second derivatives")
    before = dispatch.fallbacks[key]
    y = fastattn.layer_norm(x, w).square().sum()
    torch.autograd.grad(y, x, retain_graph=True)
    assert dispatch.fallbacks[key] == before
    torch.autograd.grad(y, x, create_graph=True)
    assert dispatch.fallbacks[key] == before + 1
    y = fastattn.layer_norm(x, w, backend="cpu")
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(fastattn.NotSupported, match="cpu: the kernels have no second derivatives"):
        gradient.sum().backward()
    with pytest.raises(fastattn.NotSupported, match="cpu: the kernels have no forward-mode derivatives"):
        torch.func.jvp(lambda x: fastattn.layer_norm(x, backend="cpu"), (x,), (x,))
    found, _ = torch.func.jvp(lambda x: fastattn.layer_norm(x, backend="reference"), (x,), (x,))
    torch.testing.assert_close(found, fastattn.layer_norm(x))


def test_autocast_does_not_reach_formulas() -> None:
    x, w = draw((3, 6), (7, 6), dtype=torch.float32)
    results = []
    for enabled in (False, True):
        y = fastattn.linear_act(x, w, None, "gelu").sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (gradient,) = torch.autograd.grad(y, x, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), w)[0])
    assert torch.equal(*results)
