"""The norm operators, their fake tensors and vmap rules, and the autograd.Function over them.

fastattn::norm_forward and norm_backward; shapes and results: `fastattn.backends.protocol`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.backends import reference
from fastattn.ops.formulas import Results, differentiable, of_reference, register_formulas
from fastattn.ops.library import (
    InDims,
    VmapResult,
    dense,
    fold_dim,
    invoke,
    is_mapped,
    lift,
    register,
    register_exported,
)
from fastattn.problems import NormProblem
from fastattn.reference.attention import accumulate_dtype


def problem_fields(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual_dtype: torch.dtype | None,
    kind: str,
    dropout_p: float,
    dtype: torch.dtype,
    requires_grad: bool,
) -> tuple[Any, ...]:
    """The fields of this call's NormProblem, in order; x gives the shape."""
    *lead, width = x.shape
    return (
        x.device.type,
        dtype,
        kind,
        math.prod(lead),
        width,
        None if weight is None else weight.dtype,
        None if bias is None else bias.dtype,
        residual_dtype,
        dropout_p != 0.0,
        requires_grad,
    )


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_seed: Tensor | None,
    kind: str,
    eps: float,
    offset: float,
    dropout_p: float,
    requires_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual_dtype = None if residual is None else residual.dtype
    fields = problem_fields(x, weight, bias, residual_dtype, kind, dropout_p, x.dtype, requires_grad)
    y, z, mean, rstd = dispatch.choose(NormProblem, fields, backend).norm_forward(
        dense(x), dense(weight), dense(bias), dense(residual), dropout_seed, kind, eps, offset, dropout_p, requires_grad
    )
    return y, z, mean, rstd


def _backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual_dtype = None if x_dtype == z.dtype else z.dtype
    fields = problem_fields(z, weight, None, residual_dtype, kind, dropout_p, x_dtype, True)
    results: tuple[Tensor, Tensor, Tensor, Tensor] = dispatch.choose(NormProblem, fields, backend).norm_backward(
        dense(grad_y),
        dense(grad_z),
        dense(z),
        dense(weight),
        dense(mean),
        dense(rstd),
        dropout_seed,
        kind,
        offset,
        dropout_p,
        x_dtype,
        dweight_dtype,
        dbias_dtype,
    )
    return results


def _fake_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_seed: Tensor | None,
    kind: str,
    eps: float,
    offset: float,
    dropout_p: float,
    requires_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    z_shape = (0,) if residual is None and dropout_p == 0.0 else x.shape
    rstd = x.new_empty(math.prod(x.shape[:-1]) if requires_grad else 0, dtype=accumulate_dtype(z_dtype))
    mean = rstd.new_empty(rstd.shape if kind == "layer" else (0,))
    return x.new_empty(x.shape), x.new_empty(z_shape, dtype=z_dtype), mean, rstd


def _fake_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    separate = dropout_p != 0.0 or x_dtype != z.dtype
    width = z.shape[-1:]
    return (
        z.new_empty(z.shape, dtype=x_dtype),
        z.new_empty(z.shape if separate else (0,)),
        rstd.new_empty((0,)) if dweight_dtype is None else rstd.new_empty(width, dtype=dweight_dtype),
        rstd.new_empty((0,)) if dbias_dtype is None else rstd.new_empty(width, dtype=dbias_dtype),
    )


def _fold_forward(size: int, dims: InDims, args: tuple[Any, ...]) -> VmapResult | None:
    if args[8] != 0.0 or is_mapped(dims, 1, 2, 4):  # dropout counts rows; weights and seeds have no batch
        return None
    x, residual = (None if args[i] is None else lift(args[i], dims[i], size) for i in (0, 3))
    y, z, mean, rstd = norm_forward(x, args[1], args[2], residual, *args[4:])
    z_dim = None if residual is None else 0
    if not args[9]:
        return (y, z, mean, rstd), (0, z_dim, None, None)
    mean_dim = 0 if args[5] == "layer" else None
    mean = mean if mean_dim is None else mean.unflatten(0, (size, -1))
    return (y, z, mean, rstd.unflatten(0, (size, -1))), (0, z_dim, mean_dim, 0)


def _fold_backward(size: int, dims: InDims, args: tuple[Any, ...]) -> VmapResult | None:
    sums_over_rows = args[11] is not None or args[12] is not None
    if args[9] != 0.0 or is_mapped(dims, 3, 6) or sums_over_rows:
        return None
    grad_y, grad_z, z = (None if args[i] is None else lift(args[i], dims[i], size) for i in range(3))
    mean = fold_dim(args[4], dims[4], size) if args[7] == "layer" else args[4]
    rstd = fold_dim(args[5], dims[5], size)
    results = norm_backward(grad_y, grad_z, z, args[3], mean, rstd, *args[6:])
    residual_dim = None if args[10] == args[2].dtype else 0
    return results, (0, residual_dim, None, None)


norm_forward = register(
    "norm_forward",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? dropout_seed, str kind, float eps, "
    "float offset, float dropout_p, bool requires_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _fold_forward,
)
norm_backward = register(
    "norm_backward",
    "(Tensor grad_y, Tensor? grad_z, Tensor z, Tensor? weight, Tensor mean, Tensor rstd, Tensor? dropout_seed, "
    "str kind, float offset, float dropout_p, ScalarType x_dtype, ScalarType? dweight_dtype, "
    "ScalarType? dbias_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    _fold_backward,
)


class Norm(torch.autograd.Function):
    """norm_forward with gradients; the arguments are the operator's, in its order."""

    generate_vmap_rule = True  # the operators have vmap rules of their own

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, z, mean, rstd = invoke(norm_forward, *args)
        return y, z, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, residual, seed, kind, _, offset, dropout_p, _, backend = inputs
        _, z, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.has_z = residual is not None or dropout_p != 0.0
        ctx.save_for_backward(z if ctx.has_z else x, weight, mean, rstd, seed)
        ctx.x_dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.numbers = (kind, offset, dropout_p)
        ctx.backend = backend

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None, *_: Any) -> tuple[Any, ...]:
        z, weight, mean, rstd, seed = ctx.saved_tensors
        if grad_y is None:
            grad_y = torch.zeros_like(z, dtype=ctx.x_dtype)
        weight_requires_grad, bias_requires_grad, residual_requires_grad = ctx.needs_input_grad[1:4]
        dx, dresidual, dweight, dbias = differentiable(
            norm_backward,
            grad_y,
            grad_z if ctx.has_z else None,
            z,
            weight,
            mean,
            rstd,
            seed,
            *ctx.numbers,
            ctx.x_dtype,
            weight.dtype if weight_requires_grad else None,
            ctx.bias_dtype if bias_requires_grad else None,
            ctx.backend,
        )
        separate = ctx.numbers[2] != 0.0 or ctx.x_dtype != z.dtype
        return (
            dx,
            dweight if weight_requires_grad else None,
            dbias if bias_requires_grad else None,
            (dresidual if separate else dx) if residual_requires_grad else None,
            *(None,) * 7,
        )


def _backward_formula(*args: Any) -> Results:
    """The backward with the statistics as functions of z."""
    grad_y, grad_z, z, weight, mean, rstd, dropout_seed, kind, *rest = args
    centred = z.to(rstd.dtype).reshape(rstd.shape[0], z.shape[-1])
    if kind == "layer":
        mean = centred.mean(dim=-1)
        centred = centred - mean[:, None]
    rstd = rstd.detach()
    spread = (centred * rstd[:, None]).square().mean(dim=-1)
    # eps is no argument of the backward: the value is the one saved, the derivative that of (variance + eps) ** -0.5,
    # in units of that, so that no power of a large or a small rstd leaves the range of floats
    rstd = rstd * torch.rsqrt(1.0 + (spread - spread.detach()))
    return of_reference(reference.norm_backward)(grad_y, grad_z, z, weight, mean, rstd, dropout_seed, kind, *rest)


register_exported(Norm, norm_forward, visible=2)
register_formulas(
    Norm,
    forward=(norm_forward, of_reference(reference.norm_forward)),
    backward=(norm_backward, _backward_formula),
    recomputed=(4, 5),  # mean, rstd
)
