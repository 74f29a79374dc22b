"""`linear_act`, `ffn` and `gated_ffn`: linear layers with their activation and feed-forward blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.functional import direct
from fastattn.functional.checks import (
    check_activation,
    check_beside,
    check_dropout,
    check_shape,
    check_tensor,
    is_autocast,
    resolve_backend,
)
from fastattn.ops.ffn import Ffn, GatedFfn, LinearAct, ffn_forward, gated_ffn_forward, linear_act_forward
from fastattn.ops.library import apply, invoke, tracks_gradients


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """act(x W^T + b): a linear layer with its activation applied before the result is stored.

    Args:
        x: (..., K), float32, bfloat16, float16 (float64 on the reference backend), any strides.
        weight, bias: (N, K) and (N,), in x's dtype. The weight's rows or columns are contiguous, else it is copied.
        activation: relu, gelu (by erf), gelu_tanh, silu, quick_gelu, relu2 (the square of relu), or None.
        backend: the backend's name; None takes that of `use_backend`, or the first that supports the call.

    Returns:
        (..., N) in x's dtype, contiguous. Products accumulate in float32. All tensors get gradients; the values before
        the activation are kept for them. Under autocast x, weight and bias are cast as torch's linear casts them.

    Raises:
        TypeError, ValueError: a wrong argument; the text names it, its value and the remedy.
        NotSupported: the backend asked for does not run this call.
    """
    calls = direct.calls(backend)
    if calls is not None and (y := calls.direct_linear_act(x, weight, bias, activation)) is not None:
        return y
    name = check_activation(activation)
    x, weight, bias = _prepare(x, ("weight", weight), ("bias", bias))
    _check_linear("weight", weight, "bias", bias, x.shape[-1], None)
    tracked = tracks_gradients(x, weight, bias)
    args = (x, weight, bias, name, tracked, resolve_backend(backend))
    y = (apply(LinearAct, *args) if tracked else invoke(linear_act_forward, *args))[0]
    return y


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
    backend: str | None = None,
) -> Tensor:
    """dropout(act(x w1^T + b1)) w2^T + b2: a feed-forward block.

    Args:
        x: (..., K). w1, b1: (H, K) and (H,). w2, b2: (N, H) and (N,). All in one dtype; the biases may be None.
        dropout_p: share of the hidden features to drop, in [0, 1). Kept ones are scaled up.
        dropout_seed: int64 tensor of one element on x's device that fixes the dropout mask; drawn by torch.randint if
            None.

    The dtypes, activations, autocast and errors are those of `linear_act`. Returns (..., N) in x's dtype.
    """
    calls = direct.calls(backend, dropout_p, dropout_seed)
    if calls is not None and (y := calls.direct_ffn(x, w1, b1, w2, b2, activation)) is not None:
        return y
    name = check_activation(activation)
    x, w1, b1, w2, b2 = _prepare(x, ("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2))
    _check_linear("w1", w1, "b1", b1, x.shape[-1], None)
    _check_linear("w2", w2, "b2", b2, w1.shape[0], None, of_x=False)
    tracked = tracks_gradients(x, w1, b1, w2, b2)
    seed = _seed(dropout_p, dropout_seed, x)
    args = (x, w1, b1, w2, b2, seed, name, dropout_p, tracked, resolve_backend(backend))
    y = (apply(Ffn, *args) if tracked else invoke(ffn_forward, *args))[0]
    return y


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
    backend: str | None = None,
) -> Tensor:
    """dropout(act(x w_gate^T + b_gate) * (x w_up^T + b_up)) w_down^T + b_down: a gated block, SwiGLU by default.

    Args:
        x: (..., K). w_gate, w_up: (H, K). w_down: (N, H). b_gate, b_up: (H,). b_down: (N,). All in one dtype.

    The dtypes, activations, autocast and errors are those of `linear_act`, dropout is that of `ffn`. Returns (..., N)
    in x's dtype.
    """
    calls = direct.calls(backend, dropout_p, dropout_seed)
    if calls is not None:
        y = calls.direct_gated_ffn(x, w_gate, b_gate, w_up, b_up, w_down, b_down, activation)
        if y is not None:
            return y
    name = check_activation(activation)
    x, w_gate, b_gate, w_up, b_up, w_down, b_down = _prepare(
        x,
        ("w_gate", w_gate),
        ("b_gate", b_gate),
        ("w_up", w_up),
        ("b_up", b_up),
        ("w_down", w_down),
        ("b_down", b_down),
    )
    _check_linear("w_gate", w_gate, "b_gate", b_gate, x.shape[-1], None)
    _check_linear("w_up", w_up, "b_up", b_up, x.shape[-1], w_gate.shape[0])
    _check_linear("w_down", w_down, "b_down", b_down, w_gate.shape[0], None, of_x=False)
    tracked = tracks_gradients(x, w_gate, b_gate, w_up, b_up, w_down, b_down)
    weights = (w_gate, b_gate, w_up, b_up, w_down, b_down)
    seed = _seed(dropout_p, dropout_seed, x)
    args = (x, *weights, seed, name, dropout_p, tracked, resolve_backend(backend))
    y = (apply(GatedFfn, *args) if tracked else invoke(gated_ffn_forward, *args))[0]
    return y


def _prepare(x: Tensor, *parameters: tuple[str, Tensor | None]) -> list[Any]:
    """x and its parameters, cast as autocast asks, once their types, devices and dtypes agree."""
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x has no dimensions: pass (..., K), the features last")
    autocast = is_autocast(x)
    if autocast:
        x = _autocast(x)
    tensors: list[Tensor | None] = [x]
    for name, value in parameters:
        if value is not None:
            if autocast:
                check_tensor(name, value)
                value = _autocast(value)
            check_beside(name, value, "x", x, float32_too=False)
        tensors.append(value)
    return tensors


def _seed(dropout_p: float, dropout_seed: Tensor | None, x: Tensor) -> Tensor | None:
    if dropout_p == 0.0 and dropout_seed is None:
        return None
    return check_dropout(dropout_p, dropout_seed, "x", x)


def _autocast(tensor: Tensor) -> Tensor:
    """The cast of torch's linear under autocast: all but float64 to the autocast dtype."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _check_linear(
    name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
    in_features: int,
    out_features: int | None,
    of_x: bool = True,
) -> None:
    """A weight (out_features, in_features), any number of rows for None, and its bias. of_x: in_features are x's."""
    if weight is None:
        check_tensor(name, weight)
    shape = weight.shape
    if len(shape) != 2 or shape[1] != in_features or (out_features is not None and shape[0] != out_features):
        rows = "N" if out_features is None else out_features
        misfits_x = of_x and len(shape) == 2 and shape[1] != in_features
        otherwise = f"; or pass x with {shape[1]} features instead of {in_features}" if misfits_x else ""
        raise ValueError(
            f"{name} has shape {tuple(shape)}: pass ({rows}, {in_features}), out features by in features as nn.Linear "
            f"stores it{otherwise}"
        )
    if bias is not None:
        check_shape(bias_name, bias, shape[:1], f"one element per row of {name}")
