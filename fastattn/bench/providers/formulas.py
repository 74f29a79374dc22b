"""Plain torch formulas of the operations, as a model without any fused kernel writes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.bench.cases.attention import AttentionCase
from fastattn.bench.cases.base import OpCase
from fastattn.bench.cases.ffn import FfnCase
from fastattn.bench.cases.norm import NormCase
from fastattn.parity.eager import ACTIVATIONS, eager_ffn, eager_gated_ffn

Forward = Callable[..., "tuple[Tensor, ...]"]


def gathered_bias(table: Tensor, buckets: Tensor) -> Tensor:
    """(1, H, Sq, Skv) from a bias table (buckets, H)."""
    return table[buckets].permute(2, 0, 1).unsqueeze(0)


def formula(case: OpCase, tensors: Mapping[str, Tensor]) -> tuple[Forward, tuple[Tensor, ...]]:
    """A function of tensors and the tensors to call it with; what is no differentiable input is bound already."""
    if isinstance(case, AttentionCase):
        return attention_formula(case), tuple(tensors[n] for n in case.leaves())
    if isinstance(case, NormCase):
        return norm_formula(case), tuple(tensors[n] for n in case.leaves())
    assert isinstance(case, FfnCase)
    return ffn_formula(case), tuple(tensors[n] for n in case.leaves())


def attention_formula(case: AttentionCase) -> Forward:
    """softmax(scale q k^T + bias, masked) v with the matrix of scores written down."""
    scale, group = case.scale, case.heads_q // case.heads_kv
    seen = case.visible.dense(case.batch, case.len_q, case.len_k, case.device)
    hidden = None if seen is None else ~seen
    buckets = case.buckets() if case.t5_bias else None

    def attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> tuple[Tensor, ...]:
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.matmul(q, k.transpose(-1, -2)) * scale
        if table is not None and buckets is not None:
            scores = scores + gathered_bias(table, buckets)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        return (torch.matmul(scores.softmax(dim=-1), v),)

    return attention


def norm_formula(case: NormCase) -> Forward:
    """Statistics in float32 and each step by itself."""
    kind, eps, dtype = case.kind, case.eps, case.dtype
    names = case.leaves()

    def norm(*given: Tensor) -> tuple[Tensor, ...]:
        t = dict(zip(names, given, strict=True))
        z = t["x"] + t["residual"] if "residual" in t else t["x"]
        wide = z.float()
        if kind == "layer":
            wide = wide - wide.mean(dim=-1, keepdim=True)
        y = (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(dtype) * t["weight"]
        if "bias" in t:
            y = y + t["bias"]
        return (y, z) if "residual" in t else (y,)

    return norm


def torch_norm(case: NormCase) -> Forward:
    """torch's own fused norm; the residual is added by a kernel of its own."""
    names, width, eps = case.leaves(), (case.width,), case.eps

    def norm(*given: Tensor) -> tuple[Tensor, ...]:
        t = dict(zip(names, given, strict=True))
        z = t["x"] + t["residual"] if "residual" in t else t["x"]
        if "bias" in t:
            y = F.layer_norm(z, width, t["weight"], t["bias"], eps)
        else:
            y = F.rms_norm(z, width, t["weight"], eps)
        return (y, z) if "residual" in t else (y,)

    return norm


def ffn_formula(case: FfnCase) -> Forward:
    """torch's linear layers with the activation between them."""
    activation, bias = case.activation, case.bias
    assert activation in ACTIVATIONS
    if case.gated:
        return lambda x, w_gate, w_up, w_down: (eager_gated_ffn(x, w_gate, w_up, w_down, activation),)
    if bias:
        return lambda x, w1, b1, w2, b2: (eager_ffn(x, w1, b1, w2, b2, activation),)
    return lambda x, w1, w2: (eager_ffn(x, w1, None, w2, None, activation),)
