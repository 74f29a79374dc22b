"""What autograd and users do around a call: zeros without memory, freed storages, batches of gradients, changed inputs,
tracing, checkpointing inside of compiled graphs, forward-mode derivatives."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fastattn


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


MODULES = {
    "block": lambda: nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)),
    "gated": Gated,
    "norm": lambda: nn.LayerNorm(8),
    "attention": Attention,
    "multi-head": MultiHead,
}
LINEARS = ("block", "gated", "multi-head")


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    original = MODULES[name]()
    swapped = copy.deepcopy(original)
    fastattn.swap(swapped)
    return original, swapped


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODULES)
def test_a_gradient_of_zeros_without_memory(name) -> None:
    """torch.sgn's derivative is one."""
    x = draw(2, 3, 8).requires_grad_()
    torch.sgn(pair(name)[1](x)).sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3, 8))


def test_inputs_of_zeros_without_memory() -> None:
    zeros = torch._efficientzerotensor((2, 3, 8))
    for name in MODULES:
        original, swapped = pair(name)
        with torch.no_grad():
            torch.testing.assert_close(swapped(zeros), original(torch.zeros(2, 3, 8)))


@pytest.mark.parametrize("backward", [False, True])
def test_a_freed_storage_is_an_error(backward) -> None:
    module = pair("block")[1].requires_grad_(backward)
    x = draw(2, 8)
    y = module(x)
    module[0 if not backward else 2].weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"has no memory: its storage was freed"):
        y.sum().backward() if backward else module(x)
    norm, x = nn.LayerNorm(8), draw(2, 8)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"a tensor \(2, 8\) given to norm_forward has no memory"):
        fastattn.layer_norm(x, norm.weight)


@pytest.mark.parametrize("name", MODULES)
def test_batches_of_gradients(name) -> None:
    original, swapped = pair(name)
    x, grads = draw(2, 3, 8).requires_grad_(), draw(4, 2, 3, 8)
    found = torch.autograd.grad(swapped(x), [x, *swapped.parameters()], grads, is_grads_batched=True)
    each = [torch.autograd.grad(original(x), [x, *original.parameters()], grad) for grad in grads]
    for one, expected in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(expected), atol=1e-5, rtol=1e-5)
    jacobian = torch.autograd.functional.jacobian(swapped, x.detach(), vectorize=True)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(original, x.detach()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LINEARS)
def test_a_frozen_block_lets_its_input_be_changed(name) -> None:
    results = []
    for module in pair(name):
        module.requires_grad_(False)
        x = draw(2, 3, 8).requires_grad_()
        h = x * 1.0
        h += module(h)
        results.append(torch.autograd.grad(h.square().sum(), x)[0])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LINEARS)
def test_biases_alone_do_without_the_input(name) -> None:
    results = []
    for module in pair(name):
        for path, parameter in module.named_parameters():
            parameter.requires_grad_(path.endswith("bias") and "in_proj" not in path)
        x = draw(2, 3, 8)
        y = module(x)
        x.zero_()
        wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
        results.append(torch.autograd.grad(y.square().sum(), wanted))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LINEARS)
def test_every_subset_of_parameters(name) -> None:
    count = len(list(MODULES[name]().parameters()))
    for subset in range(1 << count):
        results = []
        for module in pair(name):
            for at, parameter in enumerate(module.parameters()):
                parameter.requires_grad_(bool(subset >> at & 1))
            chosen = [parameter for parameter in module.parameters() if parameter.requires_grad]
            x = draw(3, 2, 8).transpose(0, 1).requires_grad_(bool(subset % 3) or not chosen)
            chosen += [x] if x.requires_grad else []
            results.append(torch.autograd.grad(module(x).square().sum(), chosen))
        torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::fastattn.dispatch.BackendWarning")
@pytest.mark.parametrize("name", LINEARS)
def test_a_gradient_penalty_whatever_is_frozen(name) -> None:
    """Its first gradient must not be taken for a constant, whatever was kept for it."""
    for with_input, checkpointed in itertools.product((True, False), repeat=2):
        results = []
        for module in pair(name):
            module.requires_grad_(not with_input)
            x = draw(2, 3, 8).requires_grad_(with_input)
            wanted = [x] if with_input else list(module.parameters())
            with sdpa_kernel(SDPBackend.MATH):
                y = checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
                first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
                penalty = sum(gradient.square().sum() for gradient in first)
                results.append(torch.autograd.grad(penalty, wanted, allow_unused=True, materialize_grads=True))
        for found, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_weight_that_is_read_may_not_be_changed() -> None:
    module = pair("block")[1]
    x = draw(2, 8).requires_grad_()
    y = module(x)
    with torch.no_grad():
        module[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_frozen_block_does_not_keep_its_input() -> None:
    module = pair("gated")[1].requires_grad_(False)
    shapes: list[tuple[int, ...]] = []

    def noted(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().nbytes() > 64:
            shapes.append(tuple(tensor.shape))
        return tensor

    x = draw(5, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        module(x)
    assert (5, 8) not in shapes
    assert (5, 12) in shapes


@pytest.mark.parametrize("with_gradients", (True, False))
@pytest.mark.parametrize("name", [name for name in MODULES if name != "multi-head"])
def test_a_trace_is_saved_with_its_gradients(name, with_gradients) -> None:
    """However it was recorded; torch's check records it once more, without gradients."""
    module = pair(name)[1]
    x = draw(2, 3, 8)
    with torch.set_grad_enabled(with_gradients):
        traced = torch.jit.trace(module, (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    torch.testing.assert_close(loaded(x), module(x))
    y = draw(2, 3, 8).requires_grad_()
    found, expected = (torch.autograd.grad(each(y).square().sum(), y)[0] for each in (loaded, module))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["attention", "block"])
def test_checkpointing_inside_of_a_compiled_graph(name, use_reentrant) -> None:
    original, swapped = pair(name)
    x = draw(2, 3, 8).requires_grad_()
    call = torch.compile(
        lambda x: checkpoint(swapped, x, use_reentrant=use_reentrant), backend="aot_eager", fullgraph=True
    )
    found, expected = (torch.autograd.grad(each(x).square().sum(), x)[0] for each in (call, original))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["attention", "multi-head", "block"])
def test_forward_mode_derivatives_of_swapped_modules(name) -> None:
    original, swapped = pair(name)
    x, tangent = draw(2, 3, 8), draw(3, 2, 3, 8)[1]
    with sdpa_kernel(SDPBackend.MATH):
        found, expected = (torch.func.jvp(each, (x,), (tangent,))[1] for each in (swapped, original))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("rows", "features"), [(3, 0), (0, 4), (0, 0)])
def test_linears_of_nothing(backend, rows, features) -> None:
    x = draw(rows, 5).requires_grad_()
    weight, back = draw(features, 5).requires_grad_(), draw(6, features).requires_grad_()
    fastattn.linear_act(x, weight, backend=backend).sum().backward()
    fastattn.ffn(x, weight, None, back, None, "relu", backend=backend).sum().backward()
    for tensor in (x, weight, back):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))
