"""Layer and RMS norm in plain PyTorch, with the dropout and residual add in front of them.

    z = dropout(x) + residual        y = (z - mean) * rstd * (offset + weight) + bias

The mean is 0 for kind "rms"; rstd = 1 / sqrt(mean((z - mean)^2) + eps). Everything is computed in
float32 (float64 for float64) with one rounding at the end; but z is an output of its own, rounded to the promoted dtype
of x and residual before it is normalised.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastattn.reference.attention import accumulate_dtype
from fastattn.reference.philox import dropout_scale, keep_mask


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: Literal["layer", "rms"] = "layer",
    eps: float = 1e-5,
    offset: float = 0.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_residual: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The norms of `fastattn.layer_norm` and `fastattn.rms_norm`.

    x (..., N), weight and bias (N,), residual of x's shape; any float dtype. dropout_seed is required with
    dropout_p > 0. Returns y in x's dtype and, with return_residual, z.
    """
    z = add_residual(x, residual, dropout_p, dropout_seed)
    y = normalise(z, weight, bias, kind, eps, offset)[0].to(x.dtype)
    return (y, z) if return_residual else y


def add_residual(x: Tensor, residual: Tensor | None, dropout_p: float, dropout_seed: Tensor | None) -> Tensor:
    """dropout(x) + residual in their promoted dtype; x itself where there is neither."""
    if residual is None and dropout_p == 0.0:
        return x
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    z = x.to(accumulate_dtype(dtype))
    if dropout_p > 0.0:
        assert dropout_seed is not None
        z = z * dropout_factor(dropout_seed, dropout_p, z)
    if residual is not None:
        z = z + residual.to(z.dtype)
    return z.to(dtype)


def dropout_factor(seed: Tensor, dropout_p: float, x: Tensor) -> Tensor:
    """0 or the scale of kept elements, shaped like x (..., N): rows counted over all leading dimensions."""
    columns = x.shape[-1]
    rows = x.numel() // max(columns, 1)
    keep = keep_mask(seed, dropout_p, 1, rows, columns).view(x.shape)
    return keep.to(x.dtype) * dropout_scale(dropout_p)


def normalise(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y (..., N), mean (..., 1), which is 0 for "rms", and rstd (..., 1), all in the compute dtype of z."""
    wide = z.to(accumulate_dtype(z.dtype))
    mean = wide.mean(dim=-1, keepdim=True) if kind == "layer" else wide.new_zeros(())
    centred = wide - mean
    rstd = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    y = centred * rstd
    if weight is not None:
        y = y * (offset + weight.to(y.dtype))
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y, mean, rstd
