"""Plain torch in the dtype under test: the yardstick of the parity rule.

Nothing here is fused or clever. Every function takes the same quantities as its fused counterpart, computes in the
dtype of its inputs and is differentiable by autograd. Run on float64 inputs the same code is a second, independently
written truth that `fastattn.reference` is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: torch.relu(x).square(),
}


def same_heads(tensor: Tensor, heads: int) -> Tensor:
    """Repeats K or V (B, Hkv, S, D) to (B, heads, S, D), each head `heads // Hkv` times in a row."""
    return tensor.repeat_interleave(heads // max(tensor.size(1), 1), dim=1)


def to_dtype_finite(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts a bias; what was finite stays finite (float32's lowest number must not become float16's -inf)."""
    if bias.dtype is dtype:
        return bias
    info = torch.finfo(dtype)
    return torch.where(torch.isinf(bias), bias, bias.clamp(info.min, info.max)).to(dtype)


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor,
    biases: tuple[Tensor, ...] = (),
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(softcap(scale q k^T) + biases, masked, sinks beside it) * keep @ v, and the log-sum-exp of each row.

    q (B,Hq,Sq,D), k (B,Hkv,Skv,D), v (B,Hkv,Skv,Dv); visible bool (B,Hq,Sq,Skv), in which every -inf of `biases` is
    False; keep is the dropout multiplier (0 or 1/(1-p)) or None. Returns out (B,Hq,Sq,Dv) and lse (B,Hq,Sq) in q's
    dtype. A row that sees no key gives 0 and -inf.
    """
    k, v = same_heads(k, q.size(1)), same_heads(v, q.size(1))
    scores = (q @ k.transpose(-1, -2)) * (1 / math.sqrt(q.size(-1)) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    for bias in biases:
        scores = scores + to_dtype_finite(bias, q.dtype)
    dead = ~visible.any(dim=-1, keepdim=True)
    # A dead row is computed with all its keys in sight and erased afterwards: -inf - -inf would be NaN in backward.
    scores = scores.masked_fill(~visible & ~dead, -math.inf)
    scores = torch.where(dead, torch.zeros_like(scores), scores)
    if scores.size(-1) == 0:
        out = (scores @ v) + 0 * q.sum()
        return out, out.new_full(out.shape[:3], -math.inf)
    # Not torch.logsumexp: where all scores are near the lowest float, its backward exp(scores - lse) does not sum to 1.
    top = scores.detach().amax(dim=-1, keepdim=True)
    lse = (top.squeeze(-1) + (scores - top).exp().sum(dim=-1).log()).masked_fill(dead.squeeze(-1), -math.inf)
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        column = sinks.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    weights = weights.masked_fill(dead, 0.0)
    if keep is not None:
        weights = weights * keep.to(q.dtype)
    return weights @ v, lse


def eager_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    kind: str,
    eps: float | None,
    offset: float = 0.0,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """torch's own F.layer_norm or F.rms_norm of z = x * keep + residual, all in x's dtype; returns (y, z).

    x (..., N); z has the dtype to which x and residual promote.
    """
    z = x if keep is None else x * keep.to(x.dtype)
    if residual is not None:
        z = z + residual
    width = (x.size(-1),)
    scale = None if weight is None else weight.to(x.dtype) + offset
    if kind == "rms":
        return F.rms_norm(z.to(x.dtype), width, scale, eps), z
    shift = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(z.to(x.dtype), width, scale, shift, 1e-5 if eps is None else eps), z


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def eager_linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """activation(x W^T + b): x (..., K), weight (N, K), bias (N,)."""
    return ACTIVATIONS[activation or "none"](_linear(x, weight, bias))


def eager_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    keep: Tensor | None = None,
) -> Tensor:
    """(activation(x W1^T + b1) * keep) W2^T + b2: x (..., K), w1 (M, K), w2 (N, M), keep (..., M)."""
    return _linear(_kept(eager_linear_act(x, w1, b1, activation), keep), w2, b2)


def _kept(hidden: Tensor, keep: Tensor | None) -> Tensor:
    return hidden if keep is None else hidden * keep.to(hidden.dtype)


def eager_gated_ffn(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str | None,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """(activation(x Wg^T + bg) * (x Wu^T + bu) * keep) Wd^T + bd: x (..., K), w_gate and w_up (M, K), w_down (N, M)."""
    hidden = eager_linear_act(x, w_gate, b_gate, activation) * _linear(x, w_up, b_up)
    return _linear(_kept(hidden, keep), w_down, b_down)
