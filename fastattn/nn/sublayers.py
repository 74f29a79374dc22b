"""What the layers of a transformer share: dropout, residual add and norm in one kernel, and the feed-forward block.

Each function does the work of some children of a module. Where a check has something against a child, it calls all of
them as the original module does, and counts that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.functional import ffn, layer_norm
from fastattn.nn.activations import activation_function, activation_name, why_not_activation
from fastattn.nn.checks import why_not_dropout, why_not_input, why_not_linear
from fastattn.nn.counting import note_fallback
from fastattn.nn.fused import Fused
from fastattn.nn.norm import why_not_layer_norm


def normalise(module: Fused, x: Tensor, norm: str) -> Tensor:
    """The child `norm` applied to x."""
    child = getattr(module, norm)
    if "norms" in module.fastattn_off:
        return child(x)
    reason = why_not_input(x, module.fastattn_backend) or child_reason(norm, why_not_layer_norm(child))
    if reason is not None:
        note_fallback(module, reason)
        return child(x)
    return layer_norm(x, child.weight, child.bias, child.eps, backend=module.fastattn_backend)


def add_and_normalise(module: Fused, x: Tensor, residual: Tensor, dropout: str, norm: str) -> tuple[Tensor, Tensor]:
    """norm(z) and z, for z = dropout(x) + residual and the children of these names."""
    norm_child, dropout_child = getattr(module, norm), getattr(module, dropout)
    reason = None
    if "norms" not in module.fastattn_off:
        reason = (
            why_not_input(x, module.fastattn_backend)
            or why_not_input(residual, module.fastattn_backend)
            or (None if x.shape == residual.shape else "the residual is broadcast")
            or child_reason(norm, why_not_layer_norm(norm_child))
            or child_reason(dropout, why_not_dropout(dropout_child))
        )
        if reason is None:
            wide = torch.promote_types(x.dtype, residual.dtype)
            if x.dtype != residual.dtype:
                # The sum, and with it the norm's output, has the wider dtype (half activations beside a float32
                # residual stream under autocast); the kernel's output has x's.
                x, residual = x.to(wide), residual.to(wide)
            y, total = layer_norm(
                x,
                norm_child.weight,
                norm_child.bias,
                norm_child.eps,
                residual=residual,
                dropout_p=dropout_child.p if dropout_child.training else 0.0,
                return_residual=True,
                backend=module.fastattn_backend,
            )
            return y, total.to(wide)  # CUDA autocast takes the norm, not the sum, in float32
        note_fallback(module, reason)
    total = dropout_child(x) + residual
    return norm_child(total), total


def feed_forward(module: Fused, x: Tensor) -> Tensor:
    """linear2(dropout(activation(linear1(x)))), attributes of the module: x (..., K) -> (..., N)."""
    children: Any = module
    linear1, linear2, dropout, activation = children.linear1, children.linear2, children.dropout, children.activation
    if "ffns" not in module.fastattn_off:
        reason = why_not_feed_forward(module, x)
        if reason is None:
            return ffn(
                x,
                linear1.weight,
                linear1.bias,
                linear2.weight,
                linear2.bias,
                activation_name(activation),
                dropout_p=dropout.p if dropout.training else 0.0,
                backend=module.fastattn_backend,
            )
        note_fallback(module, reason)
    result: Tensor = linear2(dropout(activation_function(activation)(linear1(x))))
    return result


def why_not_feed_forward(module: Fused, x: Tensor) -> str | None:
    """None where `feed_forward` runs as one kernel."""
    children: Any = module
    return (
        why_not_input(x, module.fastattn_backend)
        or child_reason("linear1", why_not_linear(children.linear1))
        or child_reason("linear2", why_not_linear(children.linear2))
        or child_reason("dropout", why_not_dropout(children.dropout))
        or child_reason("activation", why_not_activation(children.activation))
    )


def child_reason(name: str, reason: str | None) -> str | None:
    """The reason with the child's name before it."""
    return None if reason is None else f"{name} {reason}"
