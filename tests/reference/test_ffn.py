"""The reference activations and blocks against torch's in float64, and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastattn.reference import ffn, gated_ffn, linear_act
from fastattn.reference.ffn import ACTIVATIONS, activate, activation_gradient

TORCH = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x) ** 2,
}


@pytest.mark.parametrize("activation", TORCH)
def test_activations_against_torch(activation):
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    torch.testing.assert_close(activate(x, activation), TORCH[activation](x), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_explicit_derivatives_equal_autograd(activation):
    x = torch.cat([torch.linspace(-9, 9, 1000, dtype=torch.float64), torch.tensor([-40.0, 40.0])]).requires_grad_()
    (expected,) = torch.autograd.grad(activate(x, activation).sum(), x)
    torch.testing.assert_close(activation_gradient(x.detach(), activation), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", TORCH)
def test_blocks_against_torch(activation):
    x, w1, b1, w2, b2, w3, b3 = (
        torch.randn(*s, dtype=torch.float64) for s in ((2, 3, 6), (10, 6), (10,), (5, 10), (5,), (10, 6), (10,))
    )
    act = TORCH[activation]
    torch.testing.assert_close(linear_act(x, w1, b1, activation), act(F.linear(x, w1, b1)))
    torch.testing.assert_close(ffn(x, w1, b1, w2, b2, activation), F.linear(act(F.linear(x, w1, b1)), w2, b2))
    hidden = act(F.linear(x, w1, b1)) * F.linear(x, w3, b3)
    torch.testing.assert_close(gated_ffn(x, w1, w3, w2, activation, b1, b3, b2), F.linear(hidden, w2, b2))
    torch.testing.assert_close(gated_ffn(x, w1, w3, w2, activation), F.linear(act(x @ w1.T) * (x @ w3.T), w2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_rounded_once(dtype):
    x, w = torch.randn(4, 64).to(dtype), torch.randn(8, 64).to(dtype)
    expected = F.gelu(x.double() @ w.double().T)
    torch.testing.assert_close(
        linear_act(x, w, None, "gelu").double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5
    )


def test_gradients_by_finite_differences():
    tensors = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (4, 3), (4, 3), (3, 4))]
    assert torch.autograd.gradcheck(gated_ffn, tensors)
