"""linear_act, ffn and gated_ffn on csrc/cpu/gemm.cpp and activation.cpp.

Everything is one primitive, C = dropout(act(A B + bias) * multiplier), with transposed operands read in place, and one
elementwise backward that also sums over the rows. The hidden layer is kept as it was before the activation and
activated again in backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.backends.codes import ACTIVATIONS, DTYPES
from fastattn.backends.cpu.library import NO_DROPOUT, dropout_arguments, native, nothing, rounds_float32
from fastattn.backends.views import address, as_matrix, is_transposed, view


def linear_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor]:
    pre = x.new_empty(0) if save_pre else nothing(x.dtype)
    if save_pre and activation != "none":
        pre = _wide(x, weight.shape[0])
    return _project(x, weight, bias, activation, pre=pre), pre


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
    grad_pre, dbias = grad_y, _sums(grad_y, bias_requires_grad)
    if activation != "none":
        grad_pre = torch.empty_like(grad_y)
        _activation_backward(activation, grad_y, pre, grad_gate=grad_pre, grad_gate_sum=dbias)
    elif bias_requires_grad:
        _activation_backward("none", grad_y, None, grad_gate_sum=dbias)
    dx = _grad_input(grad_pre, weight) if x_requires_grad else x.new_empty(0)
    return dx, _grad_weight(grad_pre, x, weight, weight_requires_grad), dbias.to(x.dtype)


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
    pre = _wide(x, w1.shape[0]) if save_pre else nothing(x.dtype)
    hidden = _project(x, w1, b1, activation, pre=pre, dropout=dropout_arguments(dropout_seed, dropout_p))
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
    grad_pre, hidden = torch.empty_like(pre), torch.empty_like(pre)
    db1 = _sums(pre, b1_requires_grad)
    _activation_backward(
        activation,
        _grad_input(grad_y, w2),
        pre,
        grad_gate=grad_pre,
        h=hidden,
        grad_gate_sum=db1,
        dropout=dropout_arguments(dropout_seed, dropout_p),
    )
    dx = _grad_input(grad_pre, w1) if x_requires_grad else x.new_empty(0)
    dw1 = _grad_weight(grad_pre, x, w1, w1_requires_grad)
    dw2 = _grad_weight(grad_y, hidden, w2, w2_requires_grad)
    return dx, dw1, db1.to(x.dtype), dw2, _grad_bias(grad_y, b2_requires_grad)


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
    up = _project(x, w_up, b_up)
    gate = _wide(x, w_gate.shape[0]) if save_pre else nothing(x.dtype)
    dropout = dropout_arguments(dropout_seed, dropout_p)
    hidden = _project(x, w_gate, b_gate, activation, pre=gate, multiplier=up, dropout=dropout)
    return _project(hidden, w_down, b_down), gate, up if save_pre else nothing(x.dtype)


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
    grad_gate, grad_up, hidden = (torch.empty_like(gate) for _ in range(3))
    db_gate, db_up = _sums(gate, b_gate_requires_grad), _sums(up, b_up_requires_grad)
    _activation_backward(
        activation,
        _grad_input(grad_y, w_down),
        gate,
        up=up,
        grad_gate=grad_gate,
        grad_up=grad_up,
        h=hidden,
        grad_gate_sum=db_gate,
        grad_up_sum=db_up,
        dropout=dropout_arguments(dropout_seed, dropout_p),
    )
    dx = x.new_empty(0)
    if x_requires_grad:
        dx = _grad_input(grad_gate, w_gate).add_(_grad_input(grad_up, w_up))
    return (
        dx,
        _grad_weight(grad_gate, x, w_gate, w_gate_requires_grad),
        db_gate.to(x.dtype),
        _grad_weight(grad_up, x, w_up, w_up_requires_grad),
        db_up.to(x.dtype),
        _grad_weight(grad_y, hidden, w_down, w_down_requires_grad),
        _grad_bias(grad_y, b_down_requires_grad),
    )


def _project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    pre: Tensor | None = None,
    multiplier: Tensor | None = None,
    dropout: tuple[int, int, float] = NO_DROPOUT,
) -> Tensor:
    """dropout(act(x W^T + b) * multiplier); x (..., K), weight (N, K)."""
    out_features, in_features = weight.shape
    down, across = weight.stride()
    y = _wide(x, out_features)
    rows = y.numel() // max(out_features, 1)
    native().gemm(
        DTYPES[x.dtype],
        torch.get_num_threads(),
        rows,
        out_features,
        in_features,
        (x.data_ptr(), in_features, 1),
        (weight.data_ptr(), across, down),
        (y.data_ptr(), out_features),
        address(bias),
        0 if bias is None else DTYPES[bias.dtype],
        ACTIVATIONS[activation],
        None if pre is None or pre.numel() == 0 else (pre.data_ptr(), out_features),
        None if multiplier is None else (multiplier.data_ptr(), out_features),
        dropout,
        rounds_float32(),
        True,
    )
    return y


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a b for matrices of any strides with one stride 1."""
    native().gemm(
        DTYPES[out.dtype],
        torch.get_num_threads(),
        *out.shape,
        a.shape[1],
        view(a),
        view(b),
        view(out),
        0,
        0,
        0,
        None,
        None,
        NO_DROPOUT,
        rounds_float32(),
        False,
    )
    return out


def _grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    dx = grad.new_empty(*grad.shape[:-1], weight.shape[1])
    _product(as_matrix(grad), weight, as_matrix(dx))
    return dx


def _grad_weight(grad: Tensor, x: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    """grad^T x, lying in memory as the weight does."""
    if not wanted:
        return x.new_empty(0)
    rows, columns = weight.shape
    if is_transposed(weight):
        return _product(as_matrix(x).t(), as_matrix(grad), x.new_empty(columns, rows)).t()
    return _product(as_matrix(grad).t(), as_matrix(x), x.new_empty(rows, columns))


def _grad_bias(grad: Tensor, wanted: bool) -> Tensor:
    sums = _sums(grad, wanted)
    if wanted:
        _activation_backward("none", grad, None, grad_gate_sum=sums)
    return sums.to(grad.dtype)


def _activation_backward(
    activation: str,
    grad_h: Tensor,
    gate: Tensor | None,
    *,
    up: Tensor | None = None,
    grad_gate: Tensor | None = None,
    grad_up: Tensor | None = None,
    h: Tensor | None = None,
    grad_gate_sum: Tensor | None = None,
    grad_up_sum: Tensor | None = None,
    dropout: tuple[int, int, float] = NO_DROPOUT,
) -> None:
    columns = grad_h.shape[-1]
    outputs = (gate, up, grad_gate, grad_up, h, grad_gate_sum, grad_up_sum)
    native().activation_backward(
        DTYPES[grad_h.dtype],
        torch.get_num_threads(),
        ACTIVATIONS[activation],
        grad_h.numel() // max(columns, 1),
        columns,
        grad_h.data_ptr(),
        *map(address, outputs),
        dropout,
    )


def _wide(x: Tensor, features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], features)


def _sums(x: Tensor, wanted: bool) -> Tensor:
    return torch.empty(x.shape[-1] if wanted else 0, dtype=torch.float32)
