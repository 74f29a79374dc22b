"""linear_act, ffn and gated_ffn: torch's matrix products, with csrc/cuda/activation.cu for all that lies between."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastattn.backends.codes import ACTIVATIONS, DTYPES
from fastattn.backends.cuda.library import NO_DROPOUT, device_reasons, device_type, dropout_arguments, load, place
from fastattn.backends.views import address, as_matrix, weight_gradient
from fastattn.problems import LinearProblem


def linear_reasons(problem: LinearProblem) -> list[str]:
    """Why a linear problem is refused; empty when it runs."""
    reasons = device_reasons(problem.device_type)
    if problem.dtype not in DTYPES:
        reasons.append(f"the CUDA {problem.op} takes float32, bfloat16 and float16, and x is {problem.dtype}")
    if problem.weight_dtype != problem.dtype:
        reasons.append(
            f"the CUDA {problem.op} takes one dtype; x is {problem.dtype} and the weights are {problem.weight_dtype}"
        )
    return reasons


def linear_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor]:
    """y = act(x W^T + b) (..., N), and pre = x W^T + b in x's dtype: empty unless save_pre and activation is not none.

    RuntimeError with the call, the CUDA error and the shape where a launch fails.
    """
    if activation == "none":
        return _project(x, weight, bias), x.new_empty(0)
    return _activated(x, weight, bias, activation, save_pre)


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
    """dx, dweight, dbias in x's dtype; empty where not asked for."""
    grad_pre, sums = grad_y, x.new_empty(0)
    if activation != "none":
        grad_pre = torch.empty_like(grad_y)
        sums, _ = _backward(activation, grad_y, pre, None, grad_pre, None, None, (bias_requires_grad, False))
    elif bias_requires_grad:
        sums = _column_sums(grad_y)
    dx = _product(grad_pre, weight) if x_requires_grad else x.new_empty(0)
    return dx, _grad_weight(grad_pre, x, weight, weight_requires_grad), sums.to(x.dtype)


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
    """y = act(x w1^T + b1) w2^T + b2 (..., N), and pre (..., H), empty unless save_pre."""
    hidden, pre = _activated(x, w1, b1, activation, save_pre, dropout_arguments(dropout_seed, dropout_p))
    return _project(hidden, w2, b2), pre


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
    """dx, dw1, db1, dw2, db2 in x's dtype; empty where not asked for."""
    hidden = torch.empty_like(pre)
    grad_pre = _product(grad_y, w2)
    dropout, wanted = dropout_arguments(dropout_seed, dropout_p), (b1_requires_grad, False)
    db1, _ = _backward(activation, grad_pre, pre, None, grad_pre, None, hidden, wanted, dropout)
    return (
        _product(grad_pre, w1) if x_requires_grad else x.new_empty(0),
        _grad_weight(grad_pre, x, w1, w1_requires_grad),
        db1.to(x.dtype),
        _grad_weight(grad_y, hidden, w2, w2_requires_grad),
        _grad_bias(grad_y, b2_requires_grad),
    )


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
    """y = (act(gate) * up) w_down^T + b_down (..., N); gate and up (..., H), empty unless save_pre."""
    gate, gate_bias = _unbiased(x, w_gate, b_gate)
    up, up_bias = _unbiased(x, w_up, b_up)
    hidden = torch.empty_like(gate) if save_pre else gate
    dropout = dropout_arguments(dropout_seed, dropout_p)
    _forward(gate, gate_bias, up, up_bias, hidden, save_pre, activation, dropout)
    none = x.new_empty(0)
    return _project(hidden, w_down, b_down), gate if save_pre else none, up if save_pre else none.clone()


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
    """dx, dw_gate, db_gate, dw_up, db_up, dw_down, db_down in x's dtype; empty where not asked for."""
    grad_gate, grad_up, hidden = (torch.empty_like(gate) for _ in range(3))
    dropout, wanted = dropout_arguments(dropout_seed, dropout_p), (b_gate_requires_grad, b_up_requires_grad)
    db_gate, db_up = _backward(
        activation, _product(grad_y, w_down), gate, up, grad_gate, grad_up, hidden, wanted, dropout
    )
    dx = x.new_empty(0)
    if x_requires_grad:
        dx = _product(grad_gate, w_gate).add_(_product(grad_up, w_up))
    return (
        dx,
        _grad_weight(grad_gate, x, w_gate, w_gate_requires_grad),
        db_gate.to(x.dtype),
        _grad_weight(grad_up, x, w_up, w_up_requires_grad),
        db_up.to(x.dtype),
        _grad_weight(grad_y, hidden, w_down, w_down_requires_grad),
        _grad_bias(grad_y, b_down_requires_grad),
    )


# --- Matrix products ------------------------------------------------------------------------------------------


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(device_type(), enabled=False):
        return functional.linear(x, weight, bias)


def _unbiased(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x W^T and the bias that is still to be added.

    A half product is rounded when it is stored, so there the product adds its bias itself, before rounding.
    """
    if x.dtype == torch.float32:
        return _project(x, weight, None), bias
    return _project(x, weight, bias), None


def _product(grad: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(device_type(), enabled=False):
        return grad @ weight


def _grad_weight(grad: Tensor, x: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    if not wanted:
        return x.new_empty(0)
    with torch.autocast(device_type(), enabled=False):
        return weight_gradient(as_matrix(grad), as_matrix(x), weight)


def _grad_bias(grad: Tensor, wanted: bool) -> Tensor:
    return _column_sums(grad).to(grad.dtype) if wanted else grad.new_empty(0)


# --- Kernels --------------------------------------------------------------------------------------------------


def _activated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    save_pre: bool,
    dropout: tuple[int, int, float] = NO_DROPOUT,
) -> tuple[Tensor, Tensor]:
    """dropout(act(x W^T + b)) and what it was before the activation, or an empty tensor."""
    product, left = _unbiased(x, weight, bias)
    # In place: where pre is kept the product becomes pre, otherwise it becomes the activated layer.
    hidden = torch.empty_like(product) if save_pre else product
    _forward(product, left, None, None, hidden, save_pre, activation, dropout)
    return hidden, product if save_pre else x.new_empty(0)


def _forward(
    gate: Tensor,
    gate_bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    hidden: Tensor,
    save_pre: bool,
    activation: str,
    dropout: tuple[int, int, float],
) -> None:
    """hidden = dropout(act(gate + gate_bias) * (up + up_bias)), all (..., N) contiguous; with save_pre the sums replace
    gate and up."""
    columns = gate.shape[-1]
    load().activation_forward(
        gate=gate.data_ptr(),
        gate_bias=address(gate_bias),
        up=address(up),
        up_bias=address(up_bias),
        h=hidden.data_ptr(),
        gate_out=address(gate if save_pre and gate_bias is not None else None),
        up_out=address(up if save_pre and up_bias is not None else None),
        dtype=DTYPES[gate.dtype],
        activation=ACTIVATIONS[activation],
        rows=gate.numel() // max(columns, 1),
        cols=columns,
        dropout=dropout,
        **place(gate),
    )


def _backward(
    activation: str,
    grad_hidden: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    grad_gate: Tensor | None,
    grad_up: Tensor | None,
    hidden: Tensor | None,
    sums_wanted: tuple[bool, bool],
    dropout: tuple[int, int, float] = NO_DROPOUT,
) -> tuple[Tensor, Tensor]:
    """Fills grad_gate, grad_up and hidden; returns the float32 sums of grad_gate and grad_up over the rows, or empty
    ones. grad_gate may be grad_hidden."""
    columns = grad_hidden.shape[-1]
    rows = grad_hidden.numel() // max(columns, 1)
    parts = load().activation_backward_parts(rows, columns)
    sums = [grad_hidden.new_empty(parts if wanted else 0, columns, dtype=torch.float32) for wanted in sums_wanted]
    load().activation_backward(
        grad_h=grad_hidden.data_ptr(),
        gate=address(gate),
        up=address(up),
        grad_gate=address(grad_gate),
        grad_up=address(grad_up),
        h=address(hidden),
        grad_gate_parts=sums[0].data_ptr(),
        grad_up_parts=sums[1].data_ptr(),
        dtype=DTYPES[grad_hidden.dtype],
        activation=ACTIVATIONS[activation],
        rows=rows,
        cols=columns,
        dropout=dropout,
        **place(grad_hidden),
    )
    gate_sum, up_sum = (
        part.sum(dim=0) if wanted else part.new_empty(0) for part, wanted in zip(sums, sums_wanted, strict=True)
    )
    return gate_sum, up_sum


def _column_sums(grad: Tensor) -> Tensor:
    """The float32 sum of grad over all but its last dimension."""
    sums, _ = _backward("none", grad, None, None, None, None, None, (True, False))
    return sums
