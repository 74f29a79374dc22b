"""`layer_norm` and `rms_norm`, with the dropout and residual add in front of them."""

from __future__ import annotations

from typing import Literal, TypeVar, overload

import torch
from torch import Tensor

from fastattn.functional import direct
from fastattn.functional.checks import (
    check_beside,
    check_dropout,
    check_eps,
    check_number,
    check_shape,
    check_tensor,
    resolve_backend,
)
from fastattn.ops.library import apply, invoke, tracks_gradients
from fastattn.ops.norm import Norm, norm_forward
from fastattn.reference.attention import accumulate_dtype

_T = TypeVar("_T", Tensor, "Tensor | None")


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    return_residual: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    return_residual: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_residual: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimension, of the sum of a residual stream and a dropped-out input in one pass.

        z = dropout(x) + residual;    y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias

    Args:
        x: (..., N), float32, bfloat16, float16 (float64 on the reference backend), any strides.
        weight, bias: (N,) in x's dtype or float32.
        eps: added to the variance, not negative.
        residual: of x's shape, in x's dtype or float32.
        dropout_p: share of x's elements to drop before the sum, in [0, 1). Kept elements are scaled up.
        dropout_seed: int64 tensor of one element on x's device that fixes the dropout mask; drawn by torch.randint if
            None.
        return_residual: also return z.
        backend: the backend's name; None takes that of `use_backend`, or the first that supports the call.

    Returns:
        y of x's shape and dtype, contiguous; with return_residual also z, in the promoted dtype of x and residual (x
        itself where there is neither residual nor dropout). Statistics are float32, y is rounded once. All tensors get
        gradients. Under CUDA autocast inputs are cast to float32 first, as torch's layer_norm does; CPU autocast casts
        nothing.

    Raises:
        TypeError, ValueError: a wrong argument; the text names it, its value and the remedy.
        NotSupported: the backend asked for does not run this call.
    """
    if type(eps) is not float:
        _check_order(weight)
    eps = check_number("eps", eps)
    y, z = _norm(x, weight, bias, "layer", eps, 0.0, residual, dropout_p, dropout_seed, backend)
    return (y, z) if return_residual else y


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    eps: float | None = ...,
    *,
    offset: float = ...,
    residual: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    return_residual: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = ...,
    eps: float | None = ...,
    *,
    offset: float = ...,
    residual: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    return_residual: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_residual: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension, of the sum of a residual stream and a dropped-out input in one pass.

        z = dropout(x) + residual;    y = z / sqrt(mean(z^2) + eps) * (offset + weight)

    Args:
        eps: added to the mean square, not negative. None is the machine epsilon of float32 (of float64 for float64
            inputs): of the dtype that torch's rms_norm computes in.
        offset: added to the weight, 1 for models that store weight - 1. It has no effect without a weight.

    The other arguments, the results and the errors are those of `layer_norm`.
    """
    if eps is not None:
        if type(eps) is not float:
            _check_order(weight)
        eps = check_number("eps", eps)
    offset = check_number("offset", offset)
    y, z = _norm(x, weight, None, "rms", eps, offset, residual, dropout_p, dropout_seed, backend)
    return (y, z) if return_residual else y


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    eps: float | None,
    offset: float,
    residual: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """y and z of either norm."""
    calls = direct.calls(backend, dropout_p, dropout_seed)
    if calls is not None:
        found = calls.direct_norm(x, weight, bias, residual, kind == "rms", eps, offset)
        if found is not None:
            return (found, x) if residual is None else found
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x has no dimensions: pass (..., N), the norm runs over the last one")
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x, weight, bias, residual = _to_float32(x), _to_float32(weight), _to_float32(bias), _to_float32(residual)
    eps = torch.finfo(accumulate_dtype(x.dtype)).eps if eps is None else check_eps("eps", eps)
    if weight is not None:
        _check_order(weight)
        check_beside("weight", weight, "x", x)
        check_shape("weight", weight, x.shape[-1:], "one element per feature of x")
    if bias is not None:
        check_beside("bias", bias, "x", x)
        check_shape("bias", bias, x.shape[-1:], "one element per feature of x")
    if residual is not None:
        check_beside("residual", residual, "x", x)
        check_shape("residual", residual, x.shape, "the shape of x")
    seed = None
    if dropout_p != 0.0 or dropout_seed is not None:
        seed = check_dropout(dropout_p, dropout_seed, "x", x)
    tracked = tracks_gradients(x, weight, bias, residual)
    args = (x, weight, bias, residual, seed, kind, eps, offset, dropout_p, tracked, resolve_backend(backend))
    y, z, _, _ = apply(Norm, *args) if tracked else invoke(norm_forward, *args)
    return y, x if residual is None and seed is None else z


def _check_order(weight: object) -> None:
    """TypeError for a call in the order of torch's functions, whose second argument is the normalised shape."""
    if isinstance(weight, (tuple, list, int)):
        raise TypeError(
            f"weight={weight!r} is a {type(weight).__name__}: the norm runs over the last dimension and takes no "
            "normalized_shape, pass (x, weight, ...)"
        )


def _to_float32(tensor: _T) -> _T:
    """The cast of torch's norms under CUDA autocast: all but float64 to float32."""
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(torch.float32)
