"""Attention in plain PyTorch: the definition of what every backend computes.

    s = scale * q k^T;  s = softcap * tanh(s / softcap);  s = s + bias;  s = -inf where not visible
    out = dropout(exp(s) / (sum_j exp(s) + exp(sink))) v          lse = log(sum_j exp(s)), -inf for an unseen row

Half inputs are computed in float32 and rounded once at the end; float64 stays float64. Autograd differentiates it.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastattn.reference.philox import dropout_scale, keep_mask


class DenseMask(Protocol):
    """What this module needs of a mask object: its dense form, True where visible."""

    def to_dense(
        self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device | str | None = None
    ) -> Tensor: ...


class DenseBias(Protocol):
    """What this module needs of a bias object: its dense form."""

    def to_dense(self, batch: int, heads: int, len_q: int, len_k: int) -> Tensor: ...


class Softmax(NamedTuple):
    """One call's softmax, the scores it is taken of (-inf where unseen) and the tanh inside the softcap, (B, Hq, Sq,
    Skv); lse (B, Hq, Sq). All in the compute dtype."""

    probabilities: Tensor
    lse: Tensor
    scores: Tensor
    tanh: Tensor | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | DenseMask | None = None,
    bias: Tensor | DenseBias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention of `fastattn.attention`, with its arguments, by dense matrices of size Sq x Skv.

    q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv), any float dtype; Hq % Hkv == 0. dropout_seed is required
    with dropout_p > 0. Returns out (B, Hq, Sq, Dv) in q's dtype and, with return_lse, the natural-log lse (B, Hq, Sq)
    in float32 (float64 for float64 inputs).
    """
    batch, heads, len_q, _ = q.shape
    full = (batch, heads, len_q, k.shape[2])
    if isinstance(mask, Tensor) and mask.is_floating_point():
        bias = mask if bias is None else mask + dense_bias(bias, full)
        mask = None
    seen = dense_mask(mask, full, q.device)
    added = None if bias is None else dense_bias(bias, full)
    if added is not None:
        seen = seen & (added != -math.inf)
    compute = accumulate_dtype(q.dtype)
    queries, keys, values = q.to(compute), k.to(compute), v.to(compute)
    keys, values = hide_unseen(seen, keys, values)
    soft = softmax(queries, keys, seen, added, scale_of(scale, q), softcap, sinks)
    weights = soft.probabilities
    if dropout_p > 0.0:
        if dropout_seed is None:
            raise ValueError(f"dropout_seed is None beside dropout_p={dropout_p}: pass an int64 tensor of one element")
        weights = weights * keep_scale(dropout_seed, dropout_p, full, compute)
    out = torch.matmul(weights, repeat_heads(values, heads)).to(q.dtype)
    return (out, soft.lse) if return_lse else out


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scale_of(scale: float | None, q: Tensor) -> float:
    """The factor of the scores; 1 / sqrt(D) when None."""
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale


def dense_mask(mask: Tensor | DenseMask | None, full: tuple[int, int, int, int], device: torch.device) -> Tensor:
    """Bool of shape `full`, True where visible. int32 masks are half-open key ranges (1|B, 1|Hq, Sq, 2)."""
    if mask is None:
        return torch.ones(full, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor):
        return mask.to_dense(*full, device=device)
    if mask.dtype == torch.bool:
        return mask.expand(full)
    key = torch.arange(full[3], device=device)
    return ((mask[..., 0:1] <= key) & (key < mask[..., 1:2])).expand(full)


def dense_bias(bias: Tensor | DenseBias, full: tuple[int, int, int, int]) -> Tensor:
    """The additive bias expanded to `full`."""
    return bias.expand(full) if isinstance(bias, Tensor) else bias.to_dense(*full)


def repeat_heads(keys: Tensor, heads: int) -> Tensor:
    """(B, Hkv, S, D) to (B, heads, S, D): head h reads h // (heads // Hkv)."""
    return keys if keys.shape[1] == heads else keys.repeat_interleave(heads // keys.shape[1], dim=1)


def hide_unseen(seen: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with zeros where no query of their heads sees them, so that nothing stored there matters."""
    visible = seen.any(dim=2)  # (B, 1|Hq, Skv)
    if visible.shape[1] > 1:
        visible = visible.unflatten(1, (keys.shape[1], -1)).any(dim=2)
    unseen = ~visible[..., None]
    return keys.masked_fill(unseen, 0.0), values.masked_fill(unseen, 0.0)


def keep_scale(seed: Tensor, dropout_p: float, full: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """The factor of every weight under dropout: 0, or the scale of kept elements. Shape `full`."""
    batch, heads, len_q, len_k = full
    keep = keep_mask(seed, dropout_p, batch * heads, len_q, len_k).view(full)
    return keep.to(dtype) * dropout_scale(dropout_p)


def softmax(
    q: Tensor,
    k: Tensor,
    seen: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Softmax:
    """Scores and their softmax, zero where a row sees nothing. q and k in the compute dtype; softcap None or 0 is
    off."""
    scores = torch.matmul(q, repeat_heads(k, q.shape[1]).transpose(-1, -2)) * scale
    tanh = None
    if softcap:
        tanh = torch.tanh(scores / softcap)
        scores = softcap * tanh
    if bias is not None:
        # only -inf hides: a finite bias, finfo.min too, must not overflow into -inf
        seen = seen & (bias != -math.inf)
        finite = bias.to(scores.dtype).masked_fill(~seen, 0.0)
        scores = (scores + finite).clamp(min=torch.finfo(scores.dtype).min)
    scores = scores.masked_fill(~seen, -math.inf)
    if scores.shape[-1] == 0:
        return Softmax(scores, scores.new_full(scores.shape[:-1], -math.inf), scores, tanh)
    lse = _log_sum_exp(scores)
    top = scores.detach().amax(dim=-1, keepdim=True)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1)
        top = torch.maximum(top, sink.detach())
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    return Softmax(weights / total.masked_fill(total == 0.0, 1.0), lse, scores, tanh)


def _log_sum_exp(scores: Tensor) -> Tensor:
    """log sum exp over the last dimension, -inf where all scores are.

    torch.logsumexp differentiates through the rounded result: where every score is finfo.min, the result has absorbed
    log(n) and its gradient sums to n instead of 1.
    """
    top = scores.detach().amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    total = torch.exp(scores - top).sum(dim=-1)
    unseen = total == 0.0
    lse = top.squeeze(-1) + total.masked_fill(unseen, 1.0).log()
    return lse.masked_fill(unseen, -math.inf)
