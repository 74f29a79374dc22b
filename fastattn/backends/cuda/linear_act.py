"""linear_act forward: torch's matrix product, then bias and activation in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastattn.backends.codes import ACTIVATIONS, DTYPES
from fastattn.backends.cuda.library import load
from fastattn.problems import LinearProblem


def linear_act_reasons(problem: LinearProblem) -> list[str]:
    """Why a linear_act problem is refused; empty when it runs."""
    reasons = []
    if problem.device_type != "cuda":
        reasons.append(f"the CUDA backend does not run on {problem.device_type} tensors")
    if problem.requires_grad:
        reasons.append("the CUDA linear_act has no backward")
    if problem.dtype not in DTYPES:
        reasons.append(f"the CUDA linear_act takes float32, bfloat16 and float16, and x is {problem.dtype}")
    if problem.weight_dtype != problem.dtype:
        reasons.append(f"the CUDA linear_act takes one dtype; x is {problem.dtype} and weight {problem.weight_dtype}")
    return reasons


def linear_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor]:
    """y = act(x W^T + b) (..., N), and pre = x W^T + b in x's dtype: empty unless save_pre and activation is not none.

    RuntimeError with the call, the CUDA error and the shape where a launch fails.
    """
    # A half product is rounded when it is stored, so there the matrix product adds the bias itself, before rounding.
    kernel_bias = bias if activation != "none" and x.dtype == torch.float32 else None
    with torch.autocast("cuda", enabled=False):
        product = functional.linear(x, weight, None if kernel_bias is not None else bias)
    if activation == "none":
        return product, x.new_empty(0)
    # In place: where pre is kept the product becomes pre, otherwise it becomes y.
    y = torch.empty_like(product) if save_pre else product
    _bias_act(product, kernel_bias, y, product if save_pre else None, activation)
    return y, product if save_pre else x.new_empty(0)


def _bias_act(x: Tensor, bias: Tensor | None, y: Tensor, pre: Tensor | None, activation: str) -> None:
    """y = act(x + bias), pre = x + bias over contiguous (..., N) tensors; y and pre may be x."""
    columns = x.shape[-1]
    load().linear_act(
        x=x.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        pre=0 if pre is None or bias is None else pre.data_ptr(),
        dtype=DTYPES[x.dtype],
        activation=ACTIVATIONS[activation],
        rows=x.numel() // max(columns, 1),
        cols=columns,
        device=x.device.index,
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )
