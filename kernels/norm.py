"""LayerNorm and RMSNorm, forward and backward, with residual add and dropout in front.

Contract
    z = dropout(x) + residual          y = (z - mean) * rstd * (offset + weight) + bias          mean = 0 for RMS
    x, y (rows, width); residual and z (rows, width), z of promote(x, residual); weight and bias (width,) of any of the
    three dtypes, or absent; mean and rstd float32 (rows,). All contiguous, width from 1 to 65,536.
    With n = (z - mean) rstd and g = grad_y (offset + weight), and without mean(g) for RMS:
    dz = rstd (g - mean(g) - n mean(g n)) + grad_z          dx = dropout'(dz)          dresidual = dz
    dweight = sum over rows of grad_y n          dbias = sum over rows of grad_y

Numerics
    float32 throughout, one rounding per output; z is rounded to its dtype before its statistics are taken. The variance
    is that of the centred values. Dropout draws what fastattn.reference.philox draws, with entry 0.

Algorithm
    Up to one block of columns one program holds a row in registers; wider rows are walked block by block, three times
    forward and twice backward. A fixed number of backward programs each add up the weight gradients of their rows in
    registers and write one partial row; for wide rows a second kernel makes those partial rows by columns. The host
    adds the partial rows, so nothing is atomic and every run gives the same bits.

Measured
    H100 80GB HBM3, Triton 3.6, bfloat16, share of a large copy's 2.43 TB/s at 4,096 x 4,096, LayerNorm / RMSNorm:
    forward 0.91 / 0.97, backward 0.49 / 0.78 with what adds up the partial sums; at 8,192 x 1,024 forward 0.79 / 0.81,
    backward 0.36 / 0.43 (bench/results/nvidia-h100-80gb-hbm3-2026-11-26/kernels.json).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastattn.kernels.philox import dropout_factor


@triton.jit
def _summed_row(
    x, residual, seed, row, width, start, threshold, scale,
    Z_TYPE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dropout(x) + residual for columns [start, start + BLOCK) of a row in float32, rounded as z; 0 outside."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < width
    z = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        z *= dropout_factor(seed, row.to(tl.int32), 0, start, threshold, scale, BLOCK)
    if HAS_RESIDUAL:
        z += tl.load(residual + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    return z.to(Z_TYPE).to(tl.float32)


@triton.jit
def _store_normalised(
    y, weight, bias, z, mean, rstd, row, width, start, offset,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = start + tl.arange(0, BLOCK)
    inside = columns < width
    out = (z - mean) * rstd
    if HAS_WEIGHT:
        out *= offset + tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        out += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + columns, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _squared_distance(z, mean, start, width, BLOCK: tl.constexpr):
    inside = start + tl.arange(0, BLOCK) < width
    return tl.where(inside, (z - mean) * (z - mean), 0.0)


@triton.jit
def norm_forward_kernel(
    x, residual, weight, bias, seed_pointer, z_out, y, mean_out, rstd_out, width, eps, offset, threshold, scale,
    IS_RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row. z_out is written where there is a residual or dropout; otherwise it is x."""
    row = tl.program_id(0).to(tl.int64)
    STORES_Z: tl.constexpr = HAS_RESIDUAL or HAS_DROPOUT
    Z_TYPE: tl.constexpr = z_out.dtype.element_ty
    seed = tl.load(seed_pointer) if HAS_DROPOUT else 0
    mean = 0.0
    if ONE_BLOCK:
        columns = tl.arange(0, BLOCK)
        z = _summed_row(
            x, residual, seed, row, width, 0, threshold, scale, Z_TYPE, HAS_RESIDUAL, HAS_DROPOUT, BLOCK
        )  # fmt: skip
        if STORES_Z:
            tl.store(z_out + row * width + columns, z.to(Z_TYPE), mask=columns < width)
        if not IS_RMS:
            mean = tl.sum(z, 0) / width
        rstd = tl.rsqrt(tl.sum(_squared_distance(z, mean, 0, width, BLOCK), 0) / width + eps)
        _store_normalised(y, weight, bias, z, mean, rstd, row, width, 0, offset, HAS_WEIGHT, HAS_BIAS, BLOCK)
    else:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = _summed_row(
                x, residual, seed, row, width, start, threshold, scale, Z_TYPE, HAS_RESIDUAL, HAS_DROPOUT, BLOCK
            )  # fmt: skip
            if STORES_Z:
                tl.store(z_out + row * width + columns, z.to(Z_TYPE), mask=columns < width)
            total += z
        if not IS_RMS:
            mean = tl.sum(total, 0) / width
        tl.debug_barrier()  # the rows of z_out that other threads of this program wrote are read below
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(z_out + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
            squares += _squared_distance(z, mean, start, width, BLOCK)
        rstd = tl.rsqrt(tl.sum(squares, 0) / width + eps)
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(z_out + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
            _store_normalised(y, weight, bias, z, mean, rstd, row, width, start, offset, HAS_WEIGHT, HAS_BIAS, BLOCK)
    if not IS_RMS:
        tl.store(mean_out + row, mean)
    tl.store(rstd_out + row, rstd)


@triton.jit
def _gradient_terms(
    grad_y, z, weight, mean, rstd, row, width, start, offset, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """grad_y, n = (z - mean) rstd and g = grad_y (offset + weight) of one block of a row; 0 outside."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < width
    dy = tl.load(grad_y + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(z + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    normalised = tl.where(inside, (values - mean) * rstd, 0.0)
    g = dy
    if HAS_WEIGHT:
        g = dy * (offset + tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32))
    return dy, normalised, g


@triton.jit
def _store_input_gradients(
    dx, dresidual, grad_z, seed, g, normalised, mean_g, mean_gn, rstd, row, width, start, threshold, scale,
    HAS_GRAD_Z: tl.constexpr, HAS_DROPOUT: tl.constexpr, STORES_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = start + tl.arange(0, BLOCK)
    inside = columns < width
    dz = rstd * (g - mean_g - normalised * mean_gn)
    if HAS_GRAD_Z:
        dz += tl.load(grad_z + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if STORES_RESIDUAL:
        tl.store(dresidual + row * width + columns, dz.to(dresidual.dtype.element_ty), mask=inside)
    if HAS_DROPOUT:
        dz *= dropout_factor(seed, row.to(tl.int32), 0, start, threshold, scale, BLOCK)
    tl.store(dx + row * width + columns, dz.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    grad_y, grad_z, z, weight, mean_in, rstd_in, seed_pointer, dx, dresidual, weight_parts, bias_parts,
    rows, width, offset, threshold, scale,
    IS_RMS: tl.constexpr, HAS_GRAD_Z: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    STORES_RESIDUAL: tl.constexpr, SUMS_WEIGHT: tl.constexpr, SUMS_BIAS: tl.constexpr,
    ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p takes rows p, p + programs, ... and, with ONE_BLOCK, writes row p of the partial sums."""
    program = tl.program_id(0)
    seed = tl.load(seed_pointer) if HAS_DROPOUT else 0
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for index in range(program, rows, tl.num_programs(0)):
        row = tl.cast(index, tl.int64)
        rstd = tl.load(rstd_in + row)
        mean = 0.0
        if not IS_RMS:
            mean = tl.load(mean_in + row)
        mean_g = 0.0
        if ONE_BLOCK:
            dy, normalised, g = _gradient_terms(
                grad_y, z, weight, mean, rstd, row, width, 0, offset, HAS_WEIGHT, BLOCK
            )  # fmt: skip
            if not IS_RMS:
                mean_g = tl.sum(g, 0) / width
            mean_gn = tl.sum(g * normalised, 0) / width
            _store_input_gradients(
                dx, dresidual, grad_z, seed, g, normalised, mean_g, mean_gn, rstd, row, width, 0, threshold, scale,
                HAS_GRAD_Z, HAS_DROPOUT, STORES_RESIDUAL, BLOCK,
            )  # fmt: skip
            if SUMS_WEIGHT:
                weight_sum += dy * normalised
            if SUMS_BIAS:
                bias_sum += dy
        else:
            g_sum = tl.zeros((BLOCK,), tl.float32)
            gn_sum = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, width, BLOCK):
                dy, normalised, g = _gradient_terms(
                    grad_y, z, weight, mean, rstd, row, width, start, offset, HAS_WEIGHT, BLOCK
                )  # fmt: skip
                g_sum += g
                gn_sum += g * normalised
            if not IS_RMS:
                mean_g = tl.sum(g_sum, 0) / width
            mean_gn = tl.sum(gn_sum, 0) / width
            for start in range(0, width, BLOCK):
                dy, normalised, g = _gradient_terms(
                    grad_y, z, weight, mean, rstd, row, width, start, offset, HAS_WEIGHT, BLOCK
                )  # fmt: skip
                _store_input_gradients(
                    dx, dresidual, grad_z, seed, g, normalised, mean_g, mean_gn, rstd, row, width, start,
                    threshold, scale, HAS_GRAD_Z, HAS_DROPOUT, STORES_RESIDUAL, BLOCK,
                )  # fmt: skip
    if ONE_BLOCK:
        columns = tl.arange(0, BLOCK)
        part = program.to(tl.int64) * width + columns
        if SUMS_WEIGHT:
            tl.store(weight_parts + part, weight_sum, mask=columns < width)
        if SUMS_BIAS:
            tl.store(bias_parts + part, bias_sum, mask=columns < width)


@triton.jit
def norm_column_sums_kernel(
    grad_y, z, mean_in, rstd_in, weight_parts, bias_parts, rows, width,
    IS_RMS: tl.constexpr, SUMS_WEIGHT: tl.constexpr, SUMS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (c, p) sums block c of the columns over rows p, p + programs, ... into row p of the partial sums."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    weight_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)
    for index in range(tl.program_id(1), rows, tl.num_programs(1)):
        row = tl.cast(index, tl.int64)
        dy = tl.load(grad_y + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        if SUMS_WEIGHT:
            values = tl.load(z + row * width + columns, mask=inside, other=0.0).to(tl.float32)
            if not IS_RMS:
                values -= tl.load(mean_in + row)
            weight_sum += dy * (values * tl.load(rstd_in + row))
        if SUMS_BIAS:
            bias_sum += dy
    part = tl.program_id(1).to(tl.int64) * width + columns
    if SUMS_WEIGHT:
        tl.store(weight_parts + part, weight_sum, mask=inside)
    if SUMS_BIAS:
        tl.store(bias_parts + part, bias_sum, mask=inside)
