"""LayerNorm and RMSNorm on csrc/cuda/norm_forward.cu and norm_backward.cu. Arguments and results are those of
fastattn.backends.protocol."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.backends.codes import DTYPES, dtype_code
from fastattn.backends.cuda.library import device_reasons, dropout_arguments, load, multiprocessors, place
from fastattn.backends.views import address
from fastattn.problems import NormProblem

_MAX_WIDTH = 65536


def norm_reasons(problem: NormProblem) -> list[str]:
    """Why a norm problem is refused; empty when it runs."""
    reasons = device_reasons(problem.device_type)
    named = {
        "x": problem.dtype,
        "weight": problem.weight_dtype,
        "bias": problem.bias_dtype,
        "residual": problem.residual_dtype,
    }
    for name, dtype in named.items():
        if dtype is not None and dtype not in DTYPES:
            reasons.append(f"the CUDA norm takes float32, bfloat16 and float16, and {name} is {dtype}")
    if not 1 <= problem.width <= _MAX_WIDTH:
        reasons.append(f"the CUDA norm takes rows of 1 to {_MAX_WIDTH} elements, not {problem.width}")
    if problem.rows >= 2**31:
        reasons.append(f"the CUDA norm takes fewer than 2**31 rows, not {problem.rows}")
    return reasons


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
    """y (..., N) in x's dtype, z, mean (rows,) and rstd (rows,) float32; z and mean empty where they are not needed."""
    width = x.shape[-1]
    rows = x.numel() // width
    has_z = residual is not None or dropout_p > 0.0
    z_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    z = x.new_empty(x.shape if has_z else (0,), dtype=z_dtype)
    y = x.new_empty(x.shape)
    mean = x.new_empty(rows if kind == "layer" and save_statistics else 0, dtype=torch.float32)
    rstd = x.new_empty(rows if save_statistics else 0, dtype=torch.float32)
    load().norm_forward(
        x=x.data_ptr(),
        residual=address(residual),
        weight=address(weight),
        bias=address(bias),
        z=z.data_ptr(),
        y=y.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        dtypes=(DTYPES[x.dtype], dtype_code(residual), DTYPES[z_dtype], dtype_code(weight), dtype_code(bias)),
        is_rms=kind == "rms",
        rows=rows,
        width=width,
        eps=eps,
        offset=offset,
        dropout=dropout_arguments(dropout_seed, dropout_p),
        **place(x),
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
    """dx (..., N) in x_dtype, dresidual in z's dtype or empty, dweight and dbias (N,) in their dtypes or empty.

    The weight gradients are partial sums over a fixed choice of rows, added in a fixed order: the same bits every run.
    """
    width = z.shape[-1]
    rows = z.numel() // width
    dx = torch.empty_like(z, dtype=x_dtype)
    dresidual = torch.empty_like(z) if dropout_p > 0.0 or x_dtype != z.dtype else z.new_empty(0)
    parts = load().norm_backward_parts(rows, width, multiprocessors(z))
    make = z.new_empty if rows else z.new_zeros  # nothing is launched for no rows
    dweight, dbias = (
        rstd.new_empty(0) if dtype is None else make(width, dtype=dtype) for dtype in (dweight_dtype, dbias_dtype)
    )
    sums = rstd.new_empty((dweight_dtype is not None) + (dbias_dtype is not None), parts, width)
    load().norm_backward(
        grad_y=grad_y.data_ptr(),
        grad_z=address(grad_z),
        z=z.data_ptr(),
        weight=address(weight),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        grad_x=dx.data_ptr(),
        grad_residual=dresidual.data_ptr(),
        grad_weight=dweight.data_ptr(),
        grad_bias=dbias.data_ptr(),
        parts_of_sums=sums.data_ptr(),
        dtypes=(DTYPES[x_dtype], DTYPES[z.dtype], dtype_code(weight), DTYPES[dweight.dtype], DTYPES[dbias.dtype]),
        is_rms=kind == "rms",
        rows=rows,
        width=width,
        parts=parts,
        offset=offset,
        dropout=dropout_arguments(dropout_seed, dropout_p),
        **place(z),
    )
    return dx, dresidual, dweight, dbias
