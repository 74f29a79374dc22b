"""Linear layers with an activation, and feed-forward blocks, in plain PyTorch.

    linear_act  act(x W^T + b)
    ffn         dropout(act(x w1^T + b1)) w2^T + b2
    gated_ffn   dropout(act(x w_gate^T + b_gate) * (x w_up^T + b_up)) w_down^T + b_down

Half inputs are computed in float32 and rounded once at the end; float64 stays float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.reference.attention import accumulate_dtype
from fastattn.reference.norm import dropout_factor


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """act(x W^T + b): x (..., K), weight (N, K), bias (N,), returned (..., N) in x's dtype."""
    return activate(linear(x, weight, bias), activation).to(x.dtype)


def ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None = "gelu",
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """dropout(act(x w1^T + b1)) w2^T + b2: x (..., K), w1 (H, K), w2 (N, H), returned (..., N) in x's dtype.

    dropout_seed is required with dropout_p > 0.
    """
    hidden = drop_hidden(activate(linear(x, w1, b1), activation), dropout_p, dropout_seed)
    return linear(hidden, w2, b2).to(x.dtype)


def gated_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str | None = "silu",
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """dropout(act(x w_gate^T + b_gate) * (x w_up^T + b_up)) w_down^T + b_down: w_gate, w_up (H, K), w_down (N, H)."""
    hidden = activate(linear(x, w_gate, b_gate), activation) * linear(x, w_up, b_up)
    return linear(drop_hidden(hidden, dropout_p, dropout_seed), w_down, b_down).to(x.dtype)


def drop_hidden(hidden: Tensor, dropout_p: float, dropout_seed: Tensor | None) -> Tensor:
    """Dropout of the hidden features (..., H), rows counted over all leading dimensions."""
    if dropout_p == 0.0:
        return hidden
    assert dropout_seed is not None
    return hidden * dropout_factor(dropout_seed, dropout_p, hidden)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in the compute dtype of x."""
    compute = accumulate_dtype(x.dtype)
    y = torch.matmul(x.to(compute), weight.to(compute).t())
    return y if bias is None else y + bias.to(compute)


def activate(x: Tensor, activation: str | None) -> Tensor:
    """The activation of that name; None and "none" are the identity."""
    return ACTIVATIONS[activation or "none"](x)


def activation_gradient(x: Tensor, activation: str) -> Tensor:
    """d act(x) / dx, elementwise."""
    return GRADIENTS[activation](x)


_SQRT_HALF = math.sqrt(0.5)
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_INV_SQRT_2PI = 1.0 / math.sqrt(2.0 * math.pi)
_CUBIC = 0.044715


def _gelu_gradient(x: Tensor) -> Tensor:
    cdf = 0.5 * torch.erfc(-x * _SQRT_HALF)
    return cdf + x * torch.exp(-0.5 * x * x) * _INV_SQRT_2PI


def _gelu_tanh_gradient(x: Tensor) -> Tensor:
    t = torch.tanh(_SQRT_2_OVER_PI * (x + _CUBIC * x**3))
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * _SQRT_2_OVER_PI * (1.0 + 3.0 * _CUBIC * x * x)


def _sigmoid_product_gradient(x: Tensor, slope: float) -> Tensor:
    s = torch.sigmoid(slope * x)
    return s * (1.0 + slope * x * (1.0 - s))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": lambda x: 0.5 * x * torch.erfc(-x * _SQRT_HALF),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + torch.tanh(_SQRT_2_OVER_PI * (x + _CUBIC * x**3))),
    "silu": lambda x: x * torch.sigmoid(x),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: torch.relu(x).square(),
}

GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "relu": lambda x: torch.relu(x).sign(),  # whose own derivative is 0, as torch's is, and not missing
    "gelu": _gelu_gradient,
    "gelu_tanh": _gelu_tanh_gradient,
    "silu": lambda x: _sigmoid_product_gradient(x, 1.0),
    "quick_gelu": lambda x: _sigmoid_product_gradient(x, 1.702),
    "relu2": lambda x: 2.0 * torch.relu(x),
}
