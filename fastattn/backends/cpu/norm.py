"""LayerNorm and RMSNorm on csrc/cpu/norm.cpp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.backends.codes import DTYPES, dtype_code
from fastattn.backends.cpu.library import dropout_arguments, native, nothing
from fastattn.backends.views import address


def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_seed: Tensor | None,
    kind: str,
    eps: float,
    offset: float,
    dropout_p: float,
    save_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *lead, width = x.shape
    rows = math.prod(lead)
    y = x.new_empty(x.shape)  # whose strides are those of its shape, as x's need not be in dimensions of one element
    has_z = residual is not None or dropout_p > 0.0
    z_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    z, mean, rstd = nothing(z_dtype), nothing(torch.float32), nothing(torch.float32)
    if has_z or save_statistics:  # autograd hangs its graph on results, empty ones too
        z = torch.empty(x.shape if has_z else (0,), dtype=z_dtype)
    if save_statistics:
        mean = torch.empty(rows if kind == "layer" else 0, dtype=torch.float32)
        rstd = torch.empty(rows, dtype=torch.float32)
    native().norm_forward(
        kind == "rms",
        torch.get_num_threads(),
        rows,
        width,
        (DTYPES[x.dtype], dtype_code(residual), DTYPES[z_dtype], dtype_code(weight), dtype_code(bias)),
        z.data_ptr(),
        address(weight),
        mean.data_ptr(),
        rstd.data_ptr(),
        offset,
        dropout_arguments(dropout_seed, dropout_p),
        x.data_ptr(),
        address(residual),
        address(bias),
        y.data_ptr(),
        eps,
    )
    return y, z, mean, rstd


def norm_backward(
    grad_y: Tensor,
    grad_z: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_seed: Tensor | None,
    kind: str,
    offset: float,
    dropout_p: float,
    x_dtype: torch.dtype,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = z.shape[-1]
    dx = torch.empty(z.shape, dtype=x_dtype)
    has_dresidual = dropout_p > 0.0 or x_dtype != z.dtype
    dresidual = torch.empty(z.shape if has_dresidual else (0,), dtype=z.dtype)
    dweight = torch.empty(0 if dweight_dtype is None else width, dtype=torch.float32)
    dbias = torch.empty(0 if dbias_dtype is None else width, dtype=torch.float32)
    native().norm_backward(
        kind == "rms",
        torch.get_num_threads(),
        z.numel() // max(width, 1),
        width,
        (DTYPES[x_dtype], DTYPES[z.dtype], DTYPES[z.dtype], dtype_code(weight), 0),
        z.data_ptr(),
        address(weight),
        mean.data_ptr(),
        rstd.data_ptr(),
        offset,
        dropout_arguments(dropout_seed, dropout_p),
        grad_y.data_ptr(),
        address(grad_z),
        dx.data_ptr(),
        dresidual.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
    )
    return dx, dresidual, dweight.to(dweight_dtype or dweight.dtype), dbias.to(dbias_dtype or dbias.dtype)
