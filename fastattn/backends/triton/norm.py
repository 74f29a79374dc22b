"""Launches the norm kernels of fastattn.kernels.norm. Arguments and results are those of fastattn.backends.protocol."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.backends.triton.launch import launch, multiprocessors
from fastattn.problems import NormProblem
from fastattn.reference.philox import dropout_scale, dropout_threshold

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_WIDTH = 65536
_SINGLE_WIDTH = 8192
_COLUMNS_PER_SUM = 512
_ROWS_PER_SUM = 64


def norm_reasons(problem: NormProblem) -> list[str]:
    """Why the kernels refuse a norm problem, whatever its device."""
    reasons = []
    named = {
        "x": problem.dtype,
        "weight": problem.weight_dtype,
        "bias": problem.bias_dtype,
        "residual": problem.residual_dtype,
    }
    for name, dtype in named.items():
        if dtype is not None and dtype not in _DTYPES:
            reasons.append(f"the Triton norm takes float32, bfloat16 and float16, and {name} is {_name(dtype)}")
    if not 1 <= problem.width <= _MAX_WIDTH:
        reasons.append(f"the Triton norm takes rows of 1 to {_MAX_WIDTH} elements, not {problem.width}")
    if problem.rows >= 2**31:
        reasons.append(f"the Triton norm takes fewer than 2**31 rows, not {problem.rows}")
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
    from fastattn.kernels.norm import norm_forward_kernel

    rows, width = _rows(x)
    z = x.new_empty(0)
    if residual is not None or dropout_p > 0.0:
        z = x.new_empty(x.shape, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    y = x.new_empty(x.shape)
    mean = x.new_empty(0 if kind == "rms" else rows, dtype=torch.float32)
    rstd = x.new_empty(rows, dtype=torch.float32)
    threshold, scale = dropout_threshold(dropout_p), dropout_scale(dropout_p)
    block, warps = _block(width)
    arguments = {
        "x": x,
        "residual": residual,
        "weight": weight,
        "bias": bias,
        "seed_pointer": dropout_seed,
        "z_out": z if z.numel() else x,
        "y": y,
        "mean_out": mean,
        "rstd_out": rstd,
        "width": width,
        "eps": eps,
        "offset": offset,
        "threshold": threshold,
        "scale": scale,
        "IS_RMS": kind == "rms",
        "HAS_RESIDUAL": residual is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "HAS_DROPOUT": dropout_p > 0.0,
        "ONE_BLOCK": width <= block,
        "BLOCK": block,
    }
    launch(norm_forward_kernel, (rows,), arguments, num_warps=warps)
    return (y, z, mean, rstd) if save_statistics else (y, z, mean.new_empty(0), rstd.new_empty(0))


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

    The weight gradients are partial sums of a fixed number of programs, added by torch: the same bits every run.
    """
    from fastattn.kernels.norm import norm_backward_kernel

    rows, width = _rows(z)
    dx = torch.empty_like(z, dtype=x_dtype)
    separate = dropout_p > 0.0 or x_dtype != z.dtype
    dresidual = torch.empty_like(z) if separate else z.new_empty(0)
    threshold, scale = dropout_threshold(dropout_p), dropout_scale(dropout_p)
    block, warps = _block(width)
    fused = width <= block
    programs = min(rows, _program_count(z.device)) if fused else -(-rows // _ROWS_PER_SUM)
    sums_weight, sums_bias = dweight_dtype is not None, dbias_dtype is not None
    weight_parts = rstd.new_empty(programs if sums_weight else 0, width)
    bias_parts = rstd.new_empty(programs if sums_bias else 0, width)
    arguments = {
        "grad_y": grad_y,
        "grad_z": grad_z,
        "z": z,
        "weight": weight,
        "mean_in": mean,
        "rstd_in": rstd,
        "seed_pointer": dropout_seed,
        "dx": dx,
        "dresidual": dresidual,
        "weight_parts": weight_parts,
        "bias_parts": bias_parts,
        "rows": rows,
        "width": width,
        "offset": offset,
        "threshold": threshold,
        "scale": scale,
        "IS_RMS": kind == "rms",
        "HAS_GRAD_Z": grad_z is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_DROPOUT": dropout_p > 0.0,
        "STORES_RESIDUAL": separate,
        "SUMS_WEIGHT": fused and sums_weight,
        "SUMS_BIAS": fused and sums_bias,
        "ONE_BLOCK": fused,
        "BLOCK": block,
    }
    launch(norm_backward_kernel, (min(rows, _program_count(z.device)),), arguments, num_warps=warps)
    if not fused and (sums_weight or sums_bias):
        _column_sums(grad_y, z, mean, rstd, kind, weight_parts, bias_parts)
    none = rstd.new_empty(0)
    dweight = none if dweight_dtype is None else weight_parts.sum(dim=0).to(dweight_dtype)
    dbias = none.clone() if dbias_dtype is None else bias_parts.sum(dim=0).to(dbias_dtype)
    return dx, dresidual, dweight, dbias


def _column_sums(
    grad_y: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, kind: str, weight_parts: Tensor, bias_parts: Tensor
) -> None:
    """The partial sums of weight and bias gradients for rows wider than one block; a part with 0 rows is not wanted."""
    from fastattn.kernels.norm import norm_column_sums_kernel

    rows, width = _rows(z)
    parts = max(weight_parts.shape[0], bias_parts.shape[0])
    arguments = {
        "grad_y": grad_y,
        "z": z,
        "mean_in": mean,
        "rstd_in": rstd,
        "weight_parts": weight_parts,
        "bias_parts": bias_parts,
        "rows": rows,
        "width": width,
        "IS_RMS": kind == "rms",
        "SUMS_WEIGHT": weight_parts.shape[0] > 0,
        "SUMS_BIAS": bias_parts.shape[0] > 0,
        "BLOCK": _COLUMNS_PER_SUM,
    }
    launch(norm_column_sums_kernel, (-(-width // _COLUMNS_PER_SUM), parts), arguments, num_warps=4)


def _rows(x: Tensor) -> tuple[int, int]:
    width = x.shape[-1]
    return x.numel() // width, width


def _block(width: int) -> tuple[int, int]:
    """The columns that one program holds at a time, and its warps. 32 is the least that a dropout block can be."""
    block = min(max(32, 1 << (width - 1).bit_length()), _SINGLE_WIDTH)
    return block, min(max(block // 256, 1), 16)


def _program_count(device: torch.device) -> int:
    """Backward programs that walk the rows: two for each multiprocessor, a handful in the interpreter."""
    return 2 * multiprocessors(device) or 4


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
