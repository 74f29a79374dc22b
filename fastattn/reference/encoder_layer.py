"""A transformer encoder layer in plain PyTorch, composed of the reference functions.

    norm last    h = norm1(x + out(attend(x)))     y = norm2(h + ffn(h))
    norm first   h = x + out(attend(norm1(x)))     y = h + ffn(norm2(h))

attend is multi-head attention over the projections of its argument, ffn is w2 act(w1 h + b1) + b2. Half inputs are
rounded where the functions it is composed of round; float64 stays float64. Autograd differentiates it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastattn.reference.attention import DenseMask, attention
from fastattn.reference.ffn import ffn, linear_act
from fastattn.reference.norm import norm


def encoder_layer(
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
    *,
    heads: int,
    activation: str | None = "gelu",
    norm_first: bool = False,
    eps1: float = 1e-5,
    eps2: float = 1e-5,
    mask: Tensor | DenseMask | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The layer of `fastattn.encoder_layer`, with its arguments: x (B, S, E), or packed (T, E) with cu_seqlens."""

    def attend(z: Tensor) -> Tensor:
        q, k, v = (
            linear_act(z, weight, bias).unflatten(-1, (heads, -1)) for weight, bias in ((wq, bq), (wk, bk), (wv, bv))
        )
        if cu_seqlens is None:
            return _attention(q, k, v, mask, scale)
        bounds = cu_seqlens.tolist()
        parts = [_attention(q[None, a:b], k[None, a:b], v[None, a:b], None, scale)[0] for a, b in pairwise(bounds)]
        return torch.cat(parts) if parts else z

    if norm_first:
        normal = _norm(x, norm1_weight, norm1_bias, eps1)
        h = x + linear_act(attend(normal), wo, bo)
        return h + ffn(_norm(h, norm2_weight, norm2_bias, eps2), w1, b1, w2, b2, activation)
    h = _norm(linear_act(attend(x), wo, bo), norm1_weight, norm1_bias, eps1, x)
    return _norm(ffn(h, w1, b1, w2, b2, activation), norm2_weight, norm2_bias, eps2, h)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | DenseMask | None, scale: float | None) -> Tensor:
    """(B, S, H, D) each to (B, S, H * D)."""
    out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask=mask, scale=scale)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).flatten(2)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None) -> Tensor:
    y = norm(x, weight, bias, eps=eps, residual=residual)
    assert isinstance(y, Tensor)
    return y
