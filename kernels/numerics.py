"""Arithmetic that the Triton kernels share: matrix products, rounding, tanh.

Under TRITON_INTERPRET=1 Triton multiplies bfloat16 tiles as the integers they are stored in and cuts the lower bits off
where it should round; INTERPRETED selects what is right there. A compiled kernel holds none of it.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b in float32; PRECISION is how float32 operands are multiplied."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_add(a, b, total, PRECISION: tl.constexpr):
    """total + a b in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 x in DTYPE, to nearest, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def tanh(x):
    """To a few float32 rounding units, near 0 as well, where 1 - 2 / (e^2x + 1) would cancel."""
    a = tl.abs(x)
    s = x * x
    p = -5.67240936e-03 * s + 2.06031351e-02
    p = p * s - 5.37252275e-02
    p = p * s + 1.33311857e-01
    p = p * s - 3.33332634e-01
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(a, 20.0)) + 1.0)
    magnitude = tl.where(a < 0.625, a + a * (s * p), far)
    return tl.where(x < 0, -magnitude, magnitude)
