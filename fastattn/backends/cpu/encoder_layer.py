"""The encoder layer on csrc/cpu/encoder_layer.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.backends.codes import ACTIVATIONS, DTYPES, dtype_code
from fastattn.backends.cpu.library import native, rounds_float32
from fastattn.backends.views import address, mask_arguments
from fastattn.masks.lowered import LoweredMask


def encoder_layer_forward(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    wv: Tensor,
    bv: Tensor | None,
    wo: Tensor,
    bo: Tensor | None,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    norm2_weight: Tensor | None,
    norm2_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: LoweredMask,
    heads: int,
    scale: float,
    activation: str,
    norm_first: bool,
    eps1: float,
    eps2: float,
) -> Tensor:
    features = x.shape[-1]
    if cu_seqlens is None:
        batch, length = x.shape[:2]
        rows = batch * length
    else:
        batch, rows = cu_seqlens.shape[0] - 1, x.shape[0]
        length = max((cu_seqlens[1:] - cu_seqlens[:-1]).tolist(), default=0)
    y = x.new_empty(x.shape)  # whose strides are those of its shape, as x's need not be in dimensions of one element
    native().encoder_layer_forward(
        DTYPES[x.dtype],
        torch.get_num_threads(),
        ACTIVATIONS[activation],
        norm_first,
        (batch, length, rows, heads, features, w1.shape[0]),
        address(cu_seqlens),
        x.data_ptr(),
        y.data_ptr(),
        (
            (wq.data_ptr(), address(bq)),
            (wk.data_ptr(), address(bk)),
            (wv.data_ptr(), address(bv)),
            (wo.data_ptr(), address(bo)),
            (w1.data_ptr(), address(b1)),
            (w2.data_ptr(), address(b2)),
        ),
        _norm(norm1_weight, norm1_bias, eps1),
        _norm(norm2_weight, norm2_bias, eps2),
        scale,
        mask_arguments(LoweredMask() if cu_seqlens is not None else mask, batch, heads),
        rounds_float32(),
    )
    return y


def _norm(weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[int, int, int, int, float]:
    return address(weight), address(bias), dtype_code(weight), dtype_code(bias), eps
