"""Bias, activation and dropout after a matrix product, gated pairs, and backward with the sums for bias gradients.

Contract
    forward    pre = x + bias          y = act(pre) up m
    backward   with h the forward's y: dpre = dh m up act'(pre)        dup = dh m act(pre)        h = act(pre) up m
               dbias = sum over rows of dpre, and of dup
    with m the dropout multiplier, 1 without a seed: what fastattn.reference.philox draws, with entry 0
    (rows, columns), contiguous, of one of float32, bfloat16 and float16; bias of any of the three; bias, up and every
    output but y optional. Activations by number: fastattn.backends.codes.

Numerics
    float32 throughout, one rounding per output; the sums add what was not yet rounded.

Algorithm
    Memory bound: every input is read once, every output written once, h is computed again and not kept. A fixed number
    of backward programs per block of columns each write one partial row of the sums, which the host adds: the same bits
    every run.

Measured
    correct on an H100 in random cases, not timed there by itself; compiled for sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.numerics import narrow, tanh
from fastattn.kernels.philox import dropout_tile


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """act(x) and act'(x); the numbers are those of fastattn.backends.codes."""
    value, slope = x, x * 0.0 + 1.0
    if ACTIVATION == 1:  # relu, which keeps NaN
        value = tl.where(x <= 0.0, 0.0, x)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == 2:  # gelu
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == 3:  # gelu_tanh
        bent = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        value = 0.5 * x * (1.0 + bent)
        slope = 0.5 * (1.0 + bent) + 0.5 * x * (1.0 - bent * bent) * (0.7978845608028654 * (1.0 + 0.134145 * x * x))
    elif ACTIVATION == 4:  # silu
        share = tl.sigmoid(x)
        value = x * share
        slope = share * (1.0 + x * (1.0 - share))
    elif ACTIVATION == 5:  # quick_gelu
        share = tl.sigmoid(1.702 * x)
        value = x * share
        slope = share * (1.0 + 1.702 * x * (1.0 - share))
    elif ACTIVATION == 6:  # relu2
        positive = tl.where(x <= 0.0, 0.0, x)
        value = positive * positive
        slope = 2.0 * positive
    return value, slope


@triton.jit(do_not_specialize=["rows", "threshold"])
def activation_forward_kernel(
    x, bias, up, seed_pointer, pre, y, rows, columns, threshold, keep_scale,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, block of columns). y and pre may be x itself."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    active, slope = _activate(value, ACTIVATION)
    if up is not None:
        active *= tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    if seed_pointer is not None:
        active *= dropout_tile(
            tl.load(seed_pointer), row.to(tl.int32), 0, tl.program_id(1) * BLOCK_C, threshold, keep_scale, BLOCK_C
        )  # fmt: skip
    if pre is not None:
        tl.store(pre + at, narrow(value, pre.dtype.element_ty), mask=inside)
    tl.store(y + at, narrow(active, y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "threshold"])
def activation_backward_kernel(
    grad_h, pre, up, seed_pointer, grad_pre, grad_up, h, pre_sums, up_sums, rows, columns, threshold, keep_scale,
    ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Program (part, block of columns) takes row blocks part, part + parts, ... and writes row `part` of the sums."""
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pre_sum = tl.zeros((BLOCK_C,), tl.float32)
    up_sum = tl.zeros((BLOCK_C,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = tl.cast(block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        grad = tl.load(grad_h + at, mask=inside, other=0.0).to(tl.float32)
        active, slope = _activate(tl.load(pre + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
        if seed_pointer is not None:
            factor = dropout_tile(
                tl.load(seed_pointer), row.to(tl.int32), 0, tl.program_id(1) * BLOCK_C, threshold, keep_scale, BLOCK_C
            )  # fmt: skip
            grad *= factor
        grad_value = grad * slope
        if up is not None:
            other = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
            grad_other = grad * active
            grad_value *= other
            active *= other
            tl.store(grad_up + at, narrow(grad_other, grad_up.dtype.element_ty), mask=inside)
            if up_sums is not None:
                up_sum += tl.sum(grad_other, 0)
        tl.store(grad_pre + at, narrow(grad_value, grad_pre.dtype.element_ty), mask=inside)
        if h is not None:
            if seed_pointer is not None:
                active *= factor
            tl.store(h + at, narrow(active, h.dtype.element_ty), mask=inside)
        if pre_sums is not None:
            pre_sum += tl.sum(grad_value, 0)
    part = tl.program_id(0).to(tl.int64) * columns + column
    if pre_sums is not None:
        tl.store(pre_sums + part, pre_sum, mask=column < columns)
    if up_sums is not None:
        tl.store(up_sums + part, up_sum, mask=column < columns)
