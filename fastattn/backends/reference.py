"""The reference backend: the formulas of `fastattn.reference` and their explicit gradients, for any problem on any
device.

It keeps Sq x Skv matrices and is slow. Half inputs are computed in float32 and rounded once at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.backends.plain import plain
from fastattn.backends.views import as_matrix
from fastattn.biases.lowered import LoweredBias, expand, gradients
from fastattn.masks.lowered import LoweredMask, visible
from fastattn.packed import Packed, pad, places, unpad
from fastattn.problems import Problem
from fastattn.reference.attention import (
    Softmax,
    accumulate_dtype,
    attention,
    hide_unseen,
    keep_scale,
    repeat_heads,
    softmax,
)
from fastattn.reference.decode import gather_pages
from fastattn.reference.encoder_layer import encoder_layer
from fastattn.reference.ffn import activate, activation_gradient, drop_hidden, linear
from fastattn.reference.norm import add_residual, dropout_factor, normalise

NAME = "reference"


def unavailable_reason() -> str | None:
    """Always None: plain PyTorch runs everywhere."""
    return None


def not_supported_reasons(problem: Problem) -> list[str]:
    """Always empty: the reference runs every problem."""
    return []


@plain
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LoweredMask,
    bias: LoweredBias,
    packed: Packed | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """See the protocol."""
    if packed is not None:
        padded = _Padded(packed, q.shape[2], k.shape[2])
        result, lse = _forward(
            padded.queries(q),
            padded.keys(k),
            padded.keys(v),
            padded.mask(mask),
            padded.bias(bias),
            sinks,
            dropout_seed,
            scale,
            softcap,
            dropout_p,
        )
        result, lse = padded.pack_queries(result), padded.pack_queries(lse, -math.inf).contiguous()
    else:
        full = (*q.shape[:3], k.shape[2])
        seen = _seen(mask, q, k)
        result, lse = _forward(q, k, v, seen, expand(bias, full), sinks, dropout_seed, scale, softcap, dropout_p)
    return result.transpose(1, 2).contiguous().transpose(1, 2), lse


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    result, lse = attention(
        q,
        k,
        v,
        mask=seen,
        bias=bias,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        return_lse=True,
    )
    return result, lse


@plain
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: LoweredMask,
    bias: LoweredBias,
    packed: Packed | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    bias_requires_grad: bool,
    table_requires_grad: bool,
    slopes_requires_grad: bool,
    sinks_requires_grad: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the protocol. With P the softmax, M the dropout factors and W = P * M:

    dv = W^T dout;  dP = (dout v^T) * M;  ds = P * (dP - sum_j P dP) + dlse * P without sinks
    dsink = -P_sink * sum_j P dP;  dq = scale * ds k;  dk = scale * ds^T q;  dbias = ds through the bias' expansion
    """
    padded = None
    if packed is not None:
        padded = _Padded(packed, q.shape[2], k.shape[2])
        queries, keys, values = padded.queries(q), padded.keys(k), padded.keys(v)
        grad_out = padded.queries(grad_out)
        grad_lse = None if grad_lse is None else padded.queries(grad_lse)
        seen, position = padded.mask(mask), padded.position(bias)
    else:
        queries, keys, values, seen, position = q, k, v, _seen(mask, q, k), None
    compute = accumulate_dtype(q.dtype)
    full = (*queries.shape[:3], keys.shape[2])
    added = expand(bias, full, position)
    if added is not None:
        seen = seen & (added != -torch.inf)
    queries = queries.to(compute)
    keys, values = hide_unseen(seen, keys.to(compute), values.to(compute))
    keys, values = repeat_heads(keys, full[1]), repeat_heads(values, full[1])
    grads = grad_out.to(compute)
    soft = softmax(queries, keys, seen, None if added is None else added.expand(full), scale, softcap, sinks)
    weights, dweights = soft.probabilities, grads @ values.transpose(-1, -2)
    if dropout_p > 0.0:
        assert dropout_seed is not None
        factor = keep_scale(dropout_seed, dropout_p, full, compute)
        weights, dweights = weights * factor, dweights * factor
    dvalues = weights.transpose(-1, -2) @ grads
    row = (soft.probabilities * dweights).sum(dim=-1, keepdim=True)
    dscores = soft.probabilities * (dweights - row)
    if grad_lse is not None:
        dscores = dscores + grad_lse.to(compute)[..., None] * _without_sinks(soft, sinks)
    wanted = (bias_requires_grad, table_requires_grad, slopes_requires_grad)
    of_bias = gradients(bias, dscores, wanted, position)
    dsinks = queries.new_empty(0)
    if sinks is not None and sinks_requires_grad:
        unseen = soft.lse == -math.inf  # where a sink of -inf would give NaN
        probability = torch.sigmoid(sinks.to(compute).view(1, -1, 1) - soft.lse.masked_fill(unseen, 0.0))
        probability = probability.masked_fill(unseen, 0.0)
        dsinks = -(probability * row.squeeze(-1)).sum(dim=(0, 2))
    if soft.tanh is not None:
        dscores = dscores * (1.0 - soft.tanh.square())
    dqueries = (dscores @ keys) * scale
    dkeys = _sum_groups((dscores.transpose(-1, -2) @ queries) * scale, k.shape[1])
    dvalues = _sum_groups(dvalues, v.shape[1])
    if padded is not None:
        dqueries, dkeys, dvalues = padded.pack_queries(dqueries), padded.pack_keys(dkeys), padded.pack_keys(dvalues)
    return dqueries.to(q.dtype), dkeys.to(k.dtype), dvalues.to(v.dtype), *of_bias, dsinks


class _Padded:
    """A packed batch as a padded one, and back."""

    def __init__(self, packed: Packed, rows_q: int, rows_k: int) -> None:
        self.packed = packed
        self.rows_q, self.rows_k = rows_q, rows_k
        self.at_q = places(packed.cu_seqlens_q, packed.max_len_q, rows_q)
        self.at_k = places(packed.cu_seqlens_k, packed.max_len_k, rows_k)
        self.offset = packed.cu_seqlens_k.diff() - packed.cu_seqlens_q.diff()

    def queries(self, tensor: Tensor) -> Tensor:
        return pad(tensor, self.at_q)

    def keys(self, tensor: Tensor) -> Tensor:
        return pad(tensor, self.at_k)

    def pack_queries(self, tensor: Tensor, fill: float = 0.0) -> Tensor:
        return unpad(tensor, self.at_q, self.rows_q, fill)

    def pack_keys(self, tensor: Tensor) -> Tensor:
        return unpad(tensor, self.at_k, self.rows_k)

    def mask(self, mask: LoweredMask) -> Tensor:
        """What is visible, bool (B, 1|Hq, Sq, Skv): queries and keys that are there, and the mask."""
        device = self.offset.device
        len_q, len_k = self.packed.max_len_q, self.packed.max_len_k
        there = self.at_q.valid[:, None, :, None] & self.at_k.valid[:, None, None, :]
        seen = visible(mask, len_q, len_k, device, self.offset)
        return there if seen is None else there & seen

    def position(self, bias: LoweredBias) -> Tensor:
        """Where the queries sit for biases by distance, int64 (1|B, Sq)."""
        query = torch.arange(self.packed.max_len_q, device=self.offset.device)[None]
        return query + (0 if bias.top_left else self.offset[:, None].long())

    def bias(self, bias: LoweredBias) -> Tensor | None:
        len_q, len_k = self.packed.max_len_q, self.packed.max_len_k
        return expand(bias, (self.packed.batch, 0, len_q, len_k), self.position(bias))


@plain
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    mask: LoweredMask,
    bias: LoweredBias,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """See the protocol."""
    keys, values = gather_pages(k_cache, block_table), gather_pages(v_cache, block_table)
    len_q, room = q.shape[2], keys.shape[2]
    key = torch.arange(room, device=q.device)
    end = cache_lengths.view(-1, 1, 1, 1)
    position = end - len_q + torch.arange(len_q, device=q.device).view(-1, 1)
    seen = key < end
    if mask.band_left is not None:
        seen = seen & (key >= position - mask.band_left)
    if mask.band_right is not None:
        seen = seen & (key <= position + mask.band_right)
    among = visible(LoweredMask(intervals=mask.intervals), len_q, room, q.device)
    seen = seen if among is None else seen & among
    result, lse = attention(
        q,
        keys,
        values,
        mask=seen.expand(q.shape[0], q.shape[1], len_q, room),
        bias=expand(bias, (*q.shape[:3], room), position.view(q.shape[0], len_q)),
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        return_lse=True,
    )
    return result.transpose(1, 2).contiguous().transpose(1, 2), lse


@plain
def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_seed: Tensor | None,
    kind: str,
    eps: float,
    offset: float,
    dropout_p: float,
    save_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the protocol."""
    z = add_residual(x, residual, dropout_p, dropout_seed)
    y, mean, rstd = normalise(z, weight, bias, kind, eps, offset)
    mean = mean.flatten() if kind == "layer" and save_statistics else rstd.new_empty(0)
    rstd = rstd.flatten() if save_statistics else rstd.new_empty(0)
    return y.to(x.dtype), (x.new_empty(0) if z is x else z), mean, rstd


@plain
def norm_backward(
    grad_y: Tensor,
    grad_z: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_seed: Tensor | None,
    kind: str,
    offset: float,
    dropout_p: float,
    x_dtype: torch.dtype,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the protocol. With n = (z - mean) * rstd and g = grad_y * (offset + weight):
    dz = rstd * (g - mean(g) - n * mean(g * n)) + grad_z, without mean(g) for "rms"."""
    wide = z.to(rstd.dtype).reshape(rstd.shape[0], z.shape[-1])
    grads = grad_y.to(rstd.dtype).reshape(wide.shape)
    normal = (wide - mean[:, None] if kind == "layer" else wide) * rstd[:, None]
    g = grads if weight is None else grads * (offset + weight.to(rstd.dtype))
    centred = g - g.mean(dim=-1, keepdim=True) if kind == "layer" else g
    dz = rstd[:, None] * (centred - normal * (g * normal).mean(dim=-1, keepdim=True))
    dz = dz.reshape(z.shape)
    if grad_z is not None:
        dz = dz + grad_z.to(dz.dtype)
    dx = dz
    if dropout_p > 0.0:
        assert dropout_seed is not None
        dx = dz * dropout_factor(dropout_seed, dropout_p, dz)
    separate = dropout_p > 0.0 or x_dtype != z.dtype
    none = rstd.new_empty(0)
    return (
        dx.to(x_dtype),
        dz.to(z.dtype) if separate else z.new_empty(0),
        none if dweight_dtype is None else (grads * normal).sum(dim=0).to(dweight_dtype),
        none.clone() if dbias_dtype is None else grads.sum(dim=0).to(dbias_dtype),
    )


@plain
def linear_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, save_pre: bool
) -> tuple[Tensor, Tensor]:
    """See the protocol."""
    pre = linear(x, weight, bias)
    y = activate(pre, activation).to(x.dtype)
    return y, pre.to(x.dtype) if save_pre and activation != "none" else x.new_empty(0)


@plain
def linear_act_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: str,
    x_requires_grad: bool,
    weight_requires_grad: bool,
    bias_requires_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the protocol."""
    dpre = grad_y.to(accumulate_dtype(x.dtype))
    if activation != "none":
        dpre = dpre * activation_gradient(pre.to(dpre.dtype), activation)
    return _linear_gradients(dpre, x, weight, x_requires_grad, weight_requires_grad, bias_requires_grad, x.dtype)


@plain
def ffn_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    dropout_seed: Tensor | None,
    activation: str,
    dropout_p: float,
    save_pre: bool,
) -> tuple[Tensor, Tensor]:
    """See the protocol."""
    pre = linear(x, w1, b1)
    y = linear(drop_hidden(activate(pre, activation), dropout_p, dropout_seed), w2, b2).to(x.dtype)
    return y, pre.to(x.dtype) if save_pre else x.new_empty(0)


@plain
def ffn_backward(
    grad_y: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    pre: Tensor,
    dropout_seed: Tensor | None,
    activation: str,
    dropout_p: float,
    x_requires_grad: bool,
    w1_requires_grad: bool,
    b1_requires_grad: bool,
    w2_requires_grad: bool,
    b2_requires_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the protocol."""
    wide = pre.to(accumulate_dtype(x.dtype))
    grads = grad_y.to(wide.dtype)
    hidden = drop_hidden(activate(wide, activation), dropout_p, dropout_seed)
    dhidden, dw2, db2 = _linear_gradients(grads, hidden, w2, True, w2_requires_grad, b2_requires_grad, x.dtype)
    dpre = drop_hidden(dhidden, dropout_p, dropout_seed) * activation_gradient(wide, activation)
    dx, dw1, db1 = _linear_gradients(dpre, x, w1, x_requires_grad, w1_requires_grad, b1_requires_grad, x.dtype)
    return dx, dw1, db1, dw2, db2


@plain
def gated_ffn_forward(
    x: Tensor,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    dropout_seed: Tensor | None,
    activation: str,
    dropout_p: float,
    save_pre: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See the protocol."""
    gate, up = linear(x, w_gate, b_gate), linear(x, w_up, b_up)
    y = linear(drop_hidden(activate(gate, activation) * up, dropout_p, dropout_seed), w_down, b_down).to(x.dtype)
    if not save_pre:
        return y, x.new_empty(0), x.new_empty(0)
    return y, gate.to(x.dtype), up.to(x.dtype)


@plain
def gated_ffn_backward(
    grad_y: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    dropout_seed: Tensor | None,
    activation: str,
    dropout_p: float,
    x_requires_grad: bool,
    w_gate_requires_grad: bool,
    b_gate_requires_grad: bool,
    w_up_requires_grad: bool,
    b_up_requires_grad: bool,
    w_down_requires_grad: bool,
    b_down_requires_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the protocol."""
    dtype, compute = x.dtype, accumulate_dtype(x.dtype)
    wide_gate, wide_up = gate.to(compute), up.to(compute)
    active = activate(wide_gate, activation)
    hidden = drop_hidden(active * wide_up, dropout_p, dropout_seed)
    dhidden, dwd, dbd = _linear_gradients(
        grad_y.to(compute), hidden, w_down, True, w_down_requires_grad, b_down_requires_grad, dtype
    )
    dhidden = drop_hidden(dhidden, dropout_p, dropout_seed)
    dgate = dhidden * wide_up * activation_gradient(wide_gate, activation)
    dx_gate, dwg, dbg = _linear_gradients(
        dgate, x.to(compute), w_gate, x_requires_grad, w_gate_requires_grad, b_gate_requires_grad, dtype
    )
    dx_up, dwu, dbu = _linear_gradients(
        dhidden * active, x.to(compute), w_up, x_requires_grad, w_up_requires_grad, b_up_requires_grad, dtype
    )
    dx = (dx_gate + dx_up).to(dtype)
    return dx, dwg, dbg, dwu, dbu, dwd, dbd


@plain
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
    """See the protocol."""
    seen = None if cu_seqlens is not None else _seen_by((x.shape[0], heads, x.shape[1], x.shape[1]), mask, x.device)
    return encoder_layer(
        x,
        wq,
        bq,
        wk,
        bk,
        wv,
        bv,
        wo,
        bo,
        norm1_weight,
        norm1_bias,
        w1,
        b1,
        w2,
        b2,
        norm2_weight,
        norm2_bias,
        heads=heads,
        activation=activation,
        norm_first=norm_first,
        eps1=eps1,
        eps2=eps2,
        mask=seen,
        cu_seqlens=cu_seqlens,
        scale=scale,
    )


def _seen(mask: LoweredMask, q: Tensor, k: Tensor) -> Tensor:
    return _seen_by((*q.shape[:3], k.shape[2]), mask, q.device)


def _seen_by(full: tuple[int, int, int, int], mask: LoweredMask, device: torch.device) -> Tensor:
    """The lowered mask as a bool tensor (B, Hq, Sq, Skv)."""
    seen = visible(mask, full[2], full[3], device)
    return torch.ones(full, dtype=torch.bool, device=device) if seen is None else seen.expand(full)


def _without_sinks(soft: Softmax, sinks: Tensor | None) -> Tensor:
    """The softmax over the keys alone, d lse / d s; that of the attention itself also has the sinks in its
    denominator."""
    if sinks is None:
        return soft.probabilities
    unseen = (soft.lse == -math.inf)[..., None]  # filled before as well: a derivative of NaN times 0 is NaN
    return torch.softmax(soft.scores.masked_fill(unseen, 0.0), dim=-1).masked_fill(unseen, 0.0)


def _sum_groups(gradient: Tensor, heads_kv: int) -> Tensor:
    """(B, Hq, S, D) to (B, Hkv, S, D): the sum over the query heads that share a key head."""
    batch, heads, length, dim = gradient.shape
    if heads == heads_kv:
        return gradient
    return gradient.view(batch, heads_kv, heads // heads_kv, length, dim).sum(dim=2)


def _linear_gradients(
    dpre: Tensor,
    x: Tensor,
    weight: Tensor,
    x_requires_grad: bool,
    weight_requires_grad: bool,
    bias_requires_grad: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dbias of x W^T + b from the gradient of its result. dx keeps x's dtype, the others get `dtype`."""
    compute = dpre.dtype
    rows = as_matrix(dpre)
    dx, dweight, dbias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if x_requires_grad:
        dx = (dpre @ weight.to(compute)).to(x.dtype)
    if weight_requires_grad:
        dweight = (rows.t() @ as_matrix(x.to(compute))).to(dtype)
    if bias_requires_grad:
        dbias = rows.sum(dim=0).to(dtype)
    return dx, dweight, dbias
