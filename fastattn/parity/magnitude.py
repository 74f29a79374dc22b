"""T of the parity rule: each quantity in float64 with every factor replaced by its absolute value.

A sum of products x = sum a b c is computed in floating point with an error of the order of u sum |a||b||c|, however
much of the sum cancels. T is that sum. Where a formula subtracts, T adds; where a factor is bounded by one and may
cross zero by rounding alone (the gate of an activation), T takes the bound. A small multiple of T is the error that
no float32 kernel can avoid, so the rule grants it even where plain torch happened to round luckily.

Attention, with w = softmax weights (sinks in the denominator), p = exp(s - lse), m = dropout multiplier:
    T_s    = |scale| |q| |k| + |biases|            c     = 1 + tanh^2 with a softcap, else 1
    T_out  = (w m) |v|                             T_lse = sum p T_s + entropy(p)    as lse = sum p s + entropy(p)
    T_dP   = m |dout| |v|                          T_rho = sum_k w T_dP
    T_dS   = w (T_dP + T_rho) + p |dlse|           T_dsink = sum_q w_sink T_rho
    T_dq   = |scale| c T_dS |k|                    T_dk = |scale| (c T_dS)^T |q|
    T_dv   = (w m)^T |dout|                        T_dbias = T_dS summed over the broadcast dimensions
Norms, with r = rstd, g = |offset| + |weight|, T_x^ = (|z| + mean|z|) r for layer norm and |z| r for rms:
    T_y    = T_x^ g + |bias|                       T_z   = |x| m + |residual|
    T_dz   = r (T_h + mean T_h + T_x^ mean(T_h T_x^)) + |dz|    with T_h = |dy| g (rms has no mean T_h)
    T_dx   = T_dz m      T_dweight = sum |dy| T_x^      T_dbias = sum |dy|
Linears, with pre-activation a and D(a) the activation's derivative with its terms made positive:
    T_a    = |x| |W|^T + |b|                       T_h   = T_a (relu2: T_a^2, D(a) = 2 T_a where a > 0)
    T_da   = T_dh D(a) (a hidden layer: T_h m, T_dh m)    T_dx  = T_da |W|    T_dW = T_da^T |x|    T_db = sum T_da
Encoder layers: T of the last product, residual sum and norm, with everything before them as it is. Composed over the
    whole layer T would outgrow every error; what the first half does to the result, plain torch does too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn.parity.eager import ACTIVATIONS, eager_encoder_half, eager_linear_act, same_heads


def _sum_groups(per_query_head: Tensor, heads_kv: int) -> Tensor:
    """(B,Hq,S,D) -> (B,Hkv,S,D): the gradient of `same_heads`."""
    batch, _, length, dim = per_query_head.shape
    group = per_query_head.size(1) // max(heads_kv, 1)
    return per_query_head.reshape(batch, heads_kv, group, length, dim).sum(dim=2)


def attention_magnitudes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    *,
    visible: Tensor,
    biases: Mapping[str, Tensor],
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
) -> dict[str, Tensor]:
    """T of out, lse, dq, dk, dv, dsinks and of the gradient of every named bias.

    Shapes as in `eager_attention`; everything is computed in float64. grad_out (B,Hq,Sq,Dv) and grad_lse (B,Hq,Sq)
    may be None: gradients that were not given are zero.
    """
    heads_kv = k.size(1)
    q, k, v = q.double(), same_heads(k.double(), q.size(1)), same_heads(v.double(), q.size(1))
    factor = 1 / math.sqrt(q.size(-1)) if scale is None else scale
    scores, t_scores = (q @ k.transpose(-1, -2)) * factor, (q.abs() @ k.abs().transpose(-1, -2)) * abs(factor)
    chain = torch.ones((), dtype=torch.float64, device=q.device)
    if softcap:
        capped = torch.tanh(scores / softcap)
        scores, chain = softcap * capped, 1 + capped.square()
    for bias in biases.values():
        scores, t_scores = scores + bias.double(), t_scores + bias.double().abs()
    scores, t_scores = scores.masked_fill(~visible, -math.inf), t_scores.masked_fill(~visible, 0.0)

    dead = ~visible.any(dim=-1)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(dead, 0.0)
    p = (scores - lse.unsqueeze(-1)).exp()
    denominator = lse if sinks is None else torch.logaddexp(lse, sinks.double().view(1, -1, 1)).masked_fill(dead, 0.0)
    w = (scores - denominator.unsqueeze(-1)).exp()
    multiplier = torch.ones((), dtype=torch.float64, device=q.device) if keep is None else keep.double()
    entropy = lse - torch.where(p > 0, p * scores, 0.0).sum(dim=-1)
    found = {"out": (w * multiplier) @ v.abs(), "lse": (p * t_scores).sum(dim=-1) + entropy.abs()}

    t_out = q.new_zeros(q.shape[:3] + v.shape[-1:]) if grad_out is None else grad_out.double().abs()
    t_dp = multiplier * (t_out @ v.abs().transpose(-1, -2))
    t_rho = (w * t_dp).sum(dim=-1, keepdim=True)
    t_ds = w * (t_dp + t_rho)
    if grad_lse is not None:
        t_ds = t_ds + p * grad_lse.double().abs().masked_fill(dead, 0.0).unsqueeze(-1)
    found["dq"] = abs(factor) * ((chain * t_ds) @ k.abs())
    found["dk"] = _sum_groups(abs(factor) * ((chain * t_ds).transpose(-1, -2) @ q.abs()), heads_kv)
    found["dv"] = _sum_groups((w * multiplier).transpose(-1, -2) @ t_out, heads_kv)
    for name, bias in biases.items():
        found["d" + name] = t_ds.sum_to_size(bias.shape)
    if sinks is not None:
        w_sink = (sinks.double().view(1, -1, 1) - denominator).exp().masked_fill(dead, 0.0)
        found["dsinks"] = (w_sink * t_rho.squeeze(-1)).sum(dim=(0, 2))
    return found


def norm_magnitudes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_y: Tensor,
    grad_z: Tensor | None,
    *,
    kind: str,
    eps: float,
    offset: float = 0.0,
    residual: Tensor | None = None,
    keep: Tensor | None = None,
) -> dict[str, Tensor]:
    """T of y, z and of the gradients of x, residual, weight and bias; x (..., N), everything in float64."""
    multiplier = 1.0 if keep is None else keep.double()
    z, t_z = x.double() * multiplier, x.double().abs() * multiplier
    if residual is not None:
        z, t_z = z + residual.double(), t_z + residual.double().abs()
    g = 1.0 if weight is None else weight.double().abs() + abs(offset)
    if kind == "layer":
        rstd = ((z - z.mean(dim=-1, keepdim=True)).square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        t_xhat = (z.abs() + z.abs().mean(dim=-1, keepdim=True)) * rstd
    else:
        rstd = (z.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        t_xhat = z.abs() * rstd
    t_dy = grad_y.double().abs()
    t_h = t_dy * g
    t_dz = t_h + t_xhat * (t_h * t_xhat).mean(dim=-1, keepdim=True)
    if kind == "layer":
        t_dz = t_dz + t_h.mean(dim=-1, keepdim=True)
    t_dz = rstd * t_dz + (0.0 if grad_z is None else grad_z.double().abs())
    t_dweight, t_dbias = (t.reshape(-1, x.size(-1)).sum(dim=0) for t in (t_dy * t_xhat, t_dy))
    return {
        "y": t_xhat * g + (0.0 if bias is None else bias.double().abs()),
        "z": t_z,
        "dx": t_dz * multiplier,
        "dresidual": t_dz,
        "dweight": t_dweight,
        "dbias": t_dbias,
    }


_ROUNDING = 2.0**-20  # of T: what float32 sums may be off by
_SQRT2, _GELU_K, _TANH_CUBE = math.sqrt(2.0), math.sqrt(2.0 / math.pi), 0.044715


def _positive_gelu(x: Tensor) -> Tensor:
    return 0.5 * torch.special.erfc(-x / _SQRT2) + x.abs() * torch.exp(-0.5 * x * x) * (0.5 * _GELU_K)


def _positive_gelu_tanh(x: Tensor) -> Tensor:
    tanh = torch.tanh(_GELU_K * (x + _TANH_CUBE * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x.abs() * (1 - tanh * tanh) * _GELU_K * (1 + 3 * _TANH_CUBE * x * x)


def _positive_swish(x: Tensor, beta: float) -> Tensor:
    gate = torch.sigmoid(beta * x)
    return gate * (1 + beta * x.abs() * (1 - gate))


_POSITIVE_DERIVATIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "relu": lambda x: (x > 0).to(x.dtype),
    "gelu": _positive_gelu,
    "gelu_tanh": _positive_gelu_tanh,
    "silu": lambda x: _positive_swish(x, 1.0),
    "quick_gelu": lambda x: _positive_swish(x, 1.702),
}


class _Linear:
    """One affine map in float64: its value `a`, its T, and the T of its gradients."""

    def __init__(self, x: Tensor, t_x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.t_x, self.t_weight = t_x, weight.double().abs()
        shift = 0.0 if bias is None else bias.double()
        self.a = x @ weight.double().T + shift
        self.t = t_x @ self.t_weight.T + (0.0 if bias is None else bias.double().abs())

    def gradients(self, t_da: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """T of (dx, dW, db)."""
        rows = t_da.reshape(-1, t_da.size(-1))
        t_x = self.t_x.reshape(rows.size(0), self.t_weight.size(1))
        return t_da @ self.t_weight, rows.T @ t_x, rows.sum(dim=0)


def _hidden(layer: _Linear, activation: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Value and T of act(a), and D(a)."""
    name = activation or "none"
    h = ACTIVATIONS[name](layer.a)
    if name == "relu2":  # its derivative, 2 a, is the sum itself, which may round across zero
        return h, layer.t.square(), 2 * layer.t * (layer.a > -_ROUNDING * layer.t)
    return h, layer.t, _POSITIVE_DERIVATIVE[name](layer.a)


def linear_act_magnitudes(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, grad_y: Tensor
) -> dict[str, Tensor]:
    """T of y and of the gradients of x, weight and bias; shapes as in `eager_linear_act`."""
    layer = _Linear(x.double(), x.double().abs(), weight, bias)
    _, t_y, derivative = _hidden(layer, activation)
    dx, dweight, dbias = layer.gradients(grad_y.double().abs() * derivative)
    return {"y": t_y, "dx": dx, "dweight": dweight, "dbias": dbias}


def ffn_magnitudes(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | None,
    grad_y: Tensor,
    keep: Tensor | None = None,
) -> dict[str, Tensor]:
    """T of y and of the gradients of x, w1, b1, w2, b2; shapes as in `eager_ffn`."""
    multiplier = 1.0 if keep is None else keep.double()
    first = _Linear(x.double(), x.double().abs(), w1, b1)
    h, t_h, derivative = _hidden(first, activation)
    second = _Linear(h * multiplier, t_h * multiplier, w2, b2)
    dh, dw2, db2 = second.gradients(grad_y.double().abs())
    dx, dw1, db1 = first.gradients(dh * multiplier * derivative)
    return {"y": second.t, "dx": dx, "dw1": dw1, "db1": db1, "dw2": dw2, "db2": db2}


def gated_ffn_magnitudes(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str | None,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    grad_y: Tensor,
    keep: Tensor | None = None,
) -> dict[str, Tensor]:
    """T of y and of the gradients of all seven inputs; shapes as in `eager_gated_ffn`."""
    multiplier = 1.0 if keep is None else keep.double()
    gate = _Linear(x.double(), x.double().abs(), w_gate, b_gate)
    up = _Linear(x.double(), x.double().abs(), w_up, b_up)
    h, t_h, derivative = _hidden(gate, activation)
    down = _Linear(h * up.a * multiplier, t_h * up.t * multiplier, w_down, b_down)
    dh, dw_down, db_down = down.gradients(grad_y.double().abs())
    dh = dh * multiplier
    dx_gate, dw_gate, db_gate = gate.gradients(dh * derivative * up.t)
    dx_up, dw_up, db_up = up.gradients(dh * t_h)
    return {
        "y": down.t,
        "dx": dx_gate + dx_up,
        "dw_gate": dw_gate,
        "db_gate": db_gate,
        "dw_up": dw_up,
        "db_up": db_up,
        "dw_down": dw_down,
        "db_down": db_down,
    }


def near_kink(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Rows (...,) of x in which some pre-activation is so near relu's kink that rounding alone decides its derivative.

    No implementation can be held to a gradient there; the checks set the incoming gradient of such rows to zero.
    """
    if activation != "relu":
        return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    layer = _Linear(x.double(), x.double().abs(), weight, bias)
    return (layer.a.abs() <= _ROUNDING * layer.t).any(dim=-1)


def encoder_layer_magnitudes(
    t: Mapping[str, Tensor], *, activation: str | None, norm_first: bool, eps2: float, **options: Any
) -> Tensor:
    """T of the result of `eager_encoder_layer`, with its arguments."""
    wide = {name: value.double() if value.is_floating_point() else value for name, value in t.items()}
    h, inner = eager_encoder_half(wide, norm_first=norm_first, eps2=eps2, **options)
    hidden = eager_linear_act(inner, wide["w1"], wide.get("b1"), activation)
    last = _Linear(hidden, hidden.abs(), wide["w2"], wide.get("b2"))
    z, t_z = h + last.a, h.abs() + last.t
    if norm_first:
        return t_z
    rstd = ((z - z.mean(dim=-1, keepdim=True)).square().mean(dim=-1, keepdim=True) + eps2).rsqrt()
    weight, bias = wide.get("norm2_weight"), wide.get("norm2_bias")
    t_y = (t_z + t_z.mean(dim=-1, keepdim=True)) * rstd * (1.0 if weight is None else weight.abs())
    return t_y + (0.0 if bias is None else bias.abs())
