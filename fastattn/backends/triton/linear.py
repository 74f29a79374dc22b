"""linear_act, ffn and gated_ffn: torch's matrix products around the kernels of fastattn.kernels.activation.

Arguments and results: fastattn.backends.protocol. The hidden layer is kept as it was before the activation and
activated again in backward, in the kernel that also makes its gradient and the sums for the bias gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastattn.backends.codes import ACTIVATIONS
from fastattn.backends.plain import plain
from fastattn.backends.triton.launch import launch
from fastattn.backends.views import as_matrix, weight_gradient
from fastattn.problems import LinearProblem
from fastattn.reference.philox import dropout_scale, dropout_threshold

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK_R, _BLOCK_C = 16, 128
_PARTS = 64  # backward programs per block of columns, at most: rows of partial sums
_MAX_COLUMNS = (2**16 - 1) * _BLOCK_C  # blocks of columns are the second grid dimension, of at most 65,535


def linear_reasons(problem: LinearProblem) -> list[str]:
    """Why the kernels refuse a linear problem, whatever its device."""
    reasons = []
    if problem.dtype not in _DTYPES:
        shown = str(problem.dtype).removeprefix("torch.")
        reasons.append(f"the Triton {problem.op} takes float32, bfloat16 and float16, and x is {shown}")
    if problem.weight_dtype != problem.dtype:
        reasons.append(f"the Triton {problem.op} takes one dtype; x is {problem.dtype}, weight {problem.weight_dtype}")
    widest = max(problem.hidden_features, problem.out_features)
    if widest > _MAX_COLUMNS:
        reasons.append(f"the Triton {problem.op} takes up to {_MAX_COLUMNS} features, not {widest}")
    return reasons


@plain
def linear_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor]:
    """See the protocol."""
    if activation == "none":
        return functional.linear(x, weight, bias), x.new_empty(0)
    return _project(x, weight, bias, activation, save_pre)


@plain
def linear_act_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: str,
    x_requires_grad: bool,
    weight_requires_grad: bool,
    bias_requires_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the protocol."""
    if activation == "none":
        grad_pre, dbias = grad_y, _column_sums(grad_y, bias_requires_grad)
    else:
        found = _activation_backward(activation, grad_y, pre, sums=bias_requires_grad)
        grad_pre, dbias = found["grad_pre"], found["pre_sums"]
    dx = grad_pre @ weight if x_requires_grad else x.new_empty(0)
    return dx, _grad_weight(grad_pre, x, weight, weight_requires_grad), dbias


@plain
def ffn_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    dropout_seed: Tensor | None,
    activation: str,
    dropout_p: float,
    save_pre: bool,
) -> tuple[Tensor, Tensor]:
    """See the protocol."""
    hidden, pre = _project(x, w1, b1, activation, save_pre, dropout=_dropout(dropout_seed, dropout_p))
    return functional.linear(hidden, w2, b2), pre


@plain
def ffn_backward(
    grad_y: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    pre: Tensor,
    dropout_seed: Tensor | None,
    activation: str,
    dropout_p: float,
    x_requires_grad: bool,
    w1_requires_grad: bool,
    b1_requires_grad: bool,
    w2_requires_grad: bool,
    b2_requires_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the protocol."""
    found = _activation_backward(
        activation,
        grad_y @ w2,
        pre,
        dropout=_dropout(dropout_seed, dropout_p),
        sums=b1_requires_grad,
        keep_h=w2_requires_grad,
    )
    dx = found["grad_pre"] @ w1 if x_requires_grad else x.new_empty(0)
    dw1 = _grad_weight(found["grad_pre"], x, w1, w1_requires_grad)
    dw2 = _grad_weight(grad_y, found["h"], w2, w2_requires_grad)
    return dx, dw1, found["pre_sums"], dw2, _column_sums(grad_y, b2_requires_grad)


@plain
def gated_ffn_forward(
    x: Tensor,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    dropout_seed: Tensor | None,
    activation: str,
    dropout_p: float,
    save_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the protocol."""
    up = functional.linear(x, w_up, b_up)
    hidden, gate = _project(x, w_gate, b_gate, activation, save_pre, up, _dropout(dropout_seed, dropout_p))
    return functional.linear(hidden, w_down, b_down), gate, up if save_pre else x.new_empty(0)


@plain
def gated_ffn_backward(
    grad_y: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    dropout_seed: Tensor | None,
    activation: str,
    dropout_p: float,
    x_requires_grad: bool,
    w_gate_requires_grad: bool,
    b_gate_requires_grad: bool,
    w_up_requires_grad: bool,
    b_up_requires_grad: bool,
    w_down_requires_grad: bool,
    b_down_requires_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the protocol."""
    found = _activation_backward(
        activation,
        grad_y @ w_down,
        gate,
        up,
        dropout=_dropout(dropout_seed, dropout_p),
        sums=b_gate_requires_grad,
        up_sums=b_up_requires_grad,
        keep_h=w_down_requires_grad,
    )
    grad_gate, grad_up = found["grad_pre"], found["grad_up"]
    dx = (
        torch.addmm(as_matrix(grad_up) @ w_up, as_matrix(grad_gate), w_gate).view(x.shape)
        if x_requires_grad
        else x.new_empty(0)
    )
    return (
        dx,
        _grad_weight(grad_gate, x, w_gate, w_gate_requires_grad),
        found["pre_sums"],
        _grad_weight(grad_up, x, w_up, w_up_requires_grad),
        found["up_sums"],
        _grad_weight(grad_y, found["h"], w_down, w_down_requires_grad),
        _column_sums(grad_y, b_down_requires_grad),
    )


def _dropout(seed: Tensor | None, dropout_p: float) -> dict[str, Any]:
    """Kernel arguments for the dropout of the hidden layer."""
    return {
        "seed_pointer": seed if dropout_p > 0.0 else None,
        "threshold": dropout_threshold(dropout_p),
        "keep_scale": dropout_scale(dropout_p),
    }


_NO_DROPOUT = _dropout(None, 0.0)


def _project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    save_pre: bool,
    up: Tensor | None = None,
    dropout: dict[str, Any] = _NO_DROPOUT,
) -> tuple[Tensor, Tensor]:
    """act(x W^T + b) up, under dropout, and x W^T + b where save_pre, else empty."""
    from fastattn.kernels.activation import activation_forward_kernel

    # A half product is rounded when it is stored, so there the matrix product adds the bias itself, before rounding.
    kernel_bias = bias if x.dtype == torch.float32 else None
    product = functional.linear(x, weight, None if kernel_bias is not None else bias)
    y = torch.empty_like(product) if save_pre else product  # in place: the product becomes pre, or y
    rows, columns = as_matrix(product).shape
    arguments = {
        **dropout,
        "x": product,
        "bias": kernel_bias,
        "up": up,
        "pre": product if save_pre and kernel_bias is not None else None,
        "y": y,
        "rows": rows,
        "columns": columns,
        "ACTIVATION": ACTIVATIONS[activation],
        "BLOCK_R": _BLOCK_R,
        "BLOCK_C": _BLOCK_C,
    }
    grid = (-(-rows // _BLOCK_R), -(-columns // _BLOCK_C))
    launch(activation_forward_kernel, grid, arguments, num_warps=4)
    return y, product if save_pre else x.new_empty(0)


def _activation_backward(
    activation: str,
    grad_h: Tensor,
    pre: Tensor,
    up: Tensor | None = None,
    *,
    dropout: dict[str, Any] = _NO_DROPOUT,
    sums: bool,
    up_sums: bool = False,
    keep_h: bool = False,
) -> dict[str, Tensor]:
    """grad_pre and, with `up`, grad_up like pre; h where kept; pre_sums and up_sums (columns,) in pre's dtype. What is
    not asked for is empty."""
    from fastattn.kernels.activation import activation_backward_kernel

    rows, columns = as_matrix(pre).shape
    parts = max(1, min(_PARTS, -(-rows // _BLOCK_R)))
    none = pre.new_empty(0)

    def partial(wanted: bool) -> Tensor | None:
        shape = (parts, columns)
        return torch.zeros(shape, dtype=torch.float32, device=pre.device) if wanted else None

    arguments: dict[str, Any] = {
        **dropout,
        "grad_h": grad_h.contiguous(),
        "pre": pre,
        "up": up,
        "grad_pre": torch.empty_like(pre),
        "grad_up": None if up is None else torch.empty_like(pre),
        "h": torch.empty_like(pre) if keep_h else None,
        "pre_sums": partial(sums),
        "up_sums": partial(up_sums),
        "rows": rows,
        "columns": columns,
        "ACTIVATION": ACTIVATIONS[activation],
        "BLOCK_R": _BLOCK_R,
        "BLOCK_C": _BLOCK_C,
    }
    grid = (parts if rows else 0, -(-columns // _BLOCK_C))
    launch(activation_backward_kernel, grid, arguments, num_warps=4)
    found = {name: none if arguments[name] is None else arguments[name] for name in ("grad_pre", "grad_up", "h")}
    for name in ("pre_sums", "up_sums"):
        parts_of = arguments[name]
        found[name] = none.clone() if parts_of is None else parts_of.sum(dim=0).to(pre.dtype)
    return found


def _grad_weight(grad: Tensor, x: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    return weight_gradient(as_matrix(grad), as_matrix(x), weight) if wanted else x.new_empty(0)


def _column_sums(grad: Tensor, wanted: bool) -> Tensor:
    return as_matrix(grad).sum(dim=0, dtype=torch.float32).to(grad.dtype) if wanted else grad.new_empty(0)
