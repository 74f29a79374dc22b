"""`attention`: what a user calls. Arguments are checked, masks and biases lowered, defaults filled in."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from fastattn import biases, dispatch
from fastattn.biases.lowered import NO_BIAS, LoweredBias
from fastattn.functional import direct
from fastattn.functional.checks import (
    HALVES,
    check_beside,
    check_device,
    check_dropout,
    check_number,
    check_shape,
    check_tensor,
    is_autocast,
    resolve_backend,
)
from fastattn.masks import LoweredMask, Mask, lowering
from fastattn.masks.arguments import as_4d
from fastattn.masks.lowered import NOTHING_HIDDEN, PackedSize, Size, check_lowered, replaced
from fastattn.masks.packed import lower_packed
from fastattn.ops.attention import Extras, attend, problem_fields
from fastattn.ops.library import needs_gradient, tracks_gradients
from fastattn.packed import Packed
from fastattn.problems import AttentionProblem

MAX_HEAD_DIM = 256

Prepared = tuple[Tensor, Tensor, Tensor, Extras, tuple[bool, ...], str]
"""The arguments of `ops.attention.attend`."""


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | LoweredMask | Tensor | None = ...,
    bias: biases.Bias | Tensor | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | LoweredMask | Tensor | None = ...,
    bias: biases.Bias | Tensor | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    return_lse: Literal[True],
    deterministic: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | LoweredMask | Tensor | None = None,
    bias: biases.Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention without a Sq x Skv matrix in memory (the reference backend excepted).

        s = scale * q k^T;  s = softcap * tanh(s / softcap);  s = s + bias;  s = -inf where masked
        out = dropout(exp(s) / (sum_j exp(s) + exp(sink))) v;    lse = log(sum_j exp(s))

    Args:
        q, k, v: (B, Hq, Sq, D), (B, Hkv, Skv, D) and (B, Hkv, Skv, Dv) of one dtype (float32, bfloat16, float16;
            float64 on the reference backend) on one device; Hq % Hkv == 0, D and Dv from 1 to 256, any strides.
            Lengths may be 0.
        mask: which keys a query sees. A mask object of `fastattn.masks`, or what its `lower` gave for these shapes;
            a bool tensor, True is visible, that broadcasts to (B, Hq, Sq, Skv); an int32 tensor (1|B, 1|Hq, Sq, 2) of
            one half-open key range per query; or a float tensor, which is added to the scores as a bias is.
        bias: a float tensor that broadcasts to (B, Hq, Sq, Skv), of q's dtype or float32, or an object of
            `fastattn.biases`: ALiBi, RelativeBias, T5Bias, Dense. -inf hides a key; every finite value stays finite.
        scale: factor of the scores, 1 / sqrt(D) by default.
        softcap: bound of the scores, positive; None is off.
        sinks: (Hq,) float: one extra logit per head, in the denominator only.
        dropout_p: share of the weights to drop, in [0, 1). Kept weights are scaled up.
        dropout_seed: int64 tensor of one element on q's device that fixes the dropout mask; drawn by torch.randint if
            None.
        return_lse: also return lse.
        deterministic: a bitwise repeatable backward; also set by torch.use_deterministic_algorithms.
        backend: the backend's name; None takes that of `use_backend`, or the first that supports the call.

    Returns:
        out (B, Hq, Sq, Dv) in q's dtype, (B, Sq, Hq, Dv) in memory; with return_lse also lse (B, Hq, Sq), natural log,
        float32 (float64 for float64 inputs), before dropout and without the sink. A query that sees no key gets output
        0, lse -inf and gradient 0. Gradients reach q, k, v, bias (an object's tensor), sinks and a float mask,
        through out and lse; second and forward-mode derivatives run on plain torch operations, a fallback.

    Raises:
        TypeError, ValueError: a wrong argument; the text names it, its value and the remedy.
        NotSupported: the backend asked for does not run this call; the text says why.
    """
    if bias is softcap is sinks is None and not return_lse:
        out = direct.attention(q, k, v, mask, scale, backend, dropout_p, dropout_seed)
        if out is not None:
            return out
    out, lse = attend(
        *prepare(q, k, v, mask, bias, scale, softcap, sinks, dropout_p, dropout_seed, deterministic, backend)
    )
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | LoweredMask | Tensor | None = None,
    bias: biases.Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> dispatch.Explanation:
    """Which backend `attention` with these arguments runs on, and why each other does not. Computes nothing.

    Raises what `attention` raises for a wrong argument.
    """
    if dropout_p and dropout_seed is None and isinstance(q, Tensor):
        dropout_seed = torch.zeros(1, dtype=torch.int64, device=q.device)  # none is drawn: nothing is computed
    q, k, v, call, flags, forced = prepare(
        q, k, v, mask, bias, scale, softcap, sinks, dropout_p, dropout_seed, deterministic, backend
    )
    return dispatch.explain_problem(AttentionProblem(*problem_fields(q, k, v, call, flags)), forced)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | LoweredMask | Tensor | None,
    bias: biases.Bias | Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    deterministic: bool,
    backend: str | None,
) -> Prepared:
    """Checks and lowers a call."""
    q, k, v = check_qkv(q, k, v)
    size = _check_shapes(q, k, v)
    lowered, added = NOTHING_HIDDEN, NO_BIAS
    if mask is not None or bias is not None:
        lowered, added = lower_mask_and_bias(mask, bias, size, q)
    return complete(
        q, k, v, lowered, added, None, scale, softcap, sinks, dropout_p, dropout_seed, deterministic, backend
    )


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """q, k and v, once they are float tensors, as autocast casts them."""
    check_tensor("q", q)
    check_tensor("k", k)
    check_tensor("v", v)
    return _autocast(q, k, v) if is_autocast(q) else (q, k, v)


def complete(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: LoweredMask,
    bias: LoweredBias,
    packed: Packed | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout_p: float,
    dropout_seed: Tensor | None,
    deterministic: bool,
    backend: str | None,
) -> Prepared:
    """Checks what is not lowered and fills in defaults; q, k, v, packed or not, as the operator takes them."""
    scale, softcap = check_scores(q, scale, softcap)
    if sinks is not None:
        check_sinks(sinks, q)
    seed = None
    if dropout_p != 0.0 or dropout_seed is not None:
        seed = check_dropout(dropout_p, dropout_seed, "q", q)
    learned = (bias.dense, bias.table, bias.slopes)
    tracked = tracks_gradients(q, k, v, *learned, sinks)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    flags = (tracked, *(tracked and t is not None and needs_gradient(t) for t in learned), deterministic)
    call = Extras(mask, bias, packed, sinks, seed, scale, softcap, dropout_p)
    return q, k, v, call, flags, resolve_backend(backend)


def check_scores(q: Tensor, scale: float | None, softcap: float | None) -> tuple[float, float]:
    """The factor of the scores, and their bound; 0 is none."""
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else check_number("scale", scale)
    if softcap is None:
        return scale, 0.0
    softcap = check_number("softcap", softcap)
    if not softcap >= torch.finfo(torch.float32).tiny:
        raise ValueError(f"softcap={softcap} is not positive: pass a bound of the scores such as 30.0, or None")
    return scale, softcap


def check_sinks(sinks: Tensor, q: Tensor) -> None:
    """One logit per query head, on q's device."""
    check_tensor("sinks", sinks)
    check_device("sinks", sinks, "q", q)
    check_shape("sinks", sinks, (q.shape[1],), "one logit per query head")


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The casts of torch's own attention under autocast: all but float64 to the autocast dtype.

    Biases keep their dtype, so that a finite float32 bias does not round to -inf.
    """
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> Size:
    """B, Hq, Sq, Skv, once q, k and v agree."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        name, tensor = next((n, t) for n, t in (("q", q), ("k", k), ("v", v)) if t.dim() != 4)
        raise ValueError(
            f"{name} has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}: pass "
            "(batch, heads, length, head_dim), for example by unsqueeze(0) for a batch of one"
        )
    check_agreement(q, k, v)
    batch, heads_q, len_q, dim = q.shape
    batch_k, heads_kv, len_k, dim_k = k.shape
    batch_v, heads_v, len_v, dim_v = v.shape
    if batch_k != batch or batch_v != batch:
        name, value = ("k", batch_k) if batch_k != batch else ("v", batch_v)
        raise ValueError(f"{name} has a batch of {value} but q of {batch}: expand {name} to q's batch")
    if dim_k != dim:
        raise ValueError(f"k has head dim {dim_k} but q {dim}: pass k of shape (B, Hkv, Skv, {dim})")
    if heads_v != heads_kv or len_v != len_k:
        raise ValueError(
            f"v has {heads_v} heads and length {len_v} but k {heads_kv} and {len_k}: pass v of shape "
            f"({batch}, {heads_kv}, {len_k}, Dv)"
        )
    check_heads(heads_q, heads_kv, dim, dim_v)
    return Size(batch, heads_q, len_q, len_k)


def check_agreement(q: Tensor, k: Tensor, v: Tensor) -> None:
    """One dtype and one device."""
    if k.dtype != q.dtype or v.dtype != q.dtype:
        name, tensor = ("k", k) if k.dtype != q.dtype else ("v", v)
        raise TypeError(
            f"{name} has dtype {tensor.dtype} but q {q.dtype}: cast them to one dtype, {name}.to({q.dtype})"
        )
    if k.device != q.device:
        check_device("k", k, "q", q)
    if v.device != q.device:
        check_device("v", v, "q", q)


def check_heads(heads_q: int, heads_kv: int, dim: int, dim_v: int) -> None:
    """Groups of query heads, and head dims that there are kernels for."""
    if heads_kv == 0 or heads_q % heads_kv != 0:
        raise ValueError(
            f"q has {heads_q} heads, which is no multiple of the {heads_kv} heads of k and v: "
            "pass Hq % Hkv == 0 (query head h reads key head h // (Hq // Hkv))"
        )
    if not (1 <= dim <= MAX_HEAD_DIM and 1 <= dim_v <= MAX_HEAD_DIM):
        name, value = ("q", dim) if not 1 <= dim <= MAX_HEAD_DIM else ("v", dim_v)
        raise ValueError(
            f"{name} has head dim {value}: pass 1 to {MAX_HEAD_DIM}, for example by splitting into more heads"
        )


def lower_mask_and_bias(
    mask: Mask | LoweredMask | Tensor | None, bias: biases.Bias | Tensor | None, size: Size, q: Tensor
) -> tuple[LoweredMask, LoweredBias]:
    """The lowered mask, and the lowered bias with a float mask added to it."""
    added = NO_BIAS if bias is None else lower_bias("bias", bias, size, q)
    if mask is None:
        return NOTHING_HIDDEN, added
    if isinstance(mask, Mask):
        if isinstance(size, PackedSize):
            return lower_packed(mask, size, q.device), added
        return lowering.lower(mask, size, q.device), added
    if isinstance(mask, LoweredMask):
        if isinstance(size, PackedSize):
            raise TypeError(
                "mask is a LoweredMask, made for one length of queries and keys: pass the mask object to "
                "attention_varlen, which lowers it by each sequence's lengths"
            )
        check_lowered(mask, size, q.device)
        return mask, added
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"mask is a {type(mask).__name__}: pass an object of fastattn.masks, a bool, int32 or float tensor, or None"
        )
    check_device("mask", mask, "q", q)
    if mask.layout is not torch.strided:
        raise TypeError(f"mask has layout {mask.layout}: pass a strided tensor, for example mask.to_dense()")
    if mask.dtype == torch.bool:
        return LoweredMask(dense=as_4d("mask", mask, size)), added
    if mask.dtype == torch.int32:
        return LoweredMask(intervals=_key_ranges(mask, size)), added
    if not mask.is_floating_point():
        raise TypeError(
            f"mask has dtype {mask.dtype}: pass bool (True is visible), int32 key ranges (1|B, 1|Hq, Sq, 2), or a "
            "float tensor to add; mask.bool() makes a bool mask of zeros and ones"
        )
    terms = lower_bias("mask", mask, size, q).dense
    assert terms is not None
    if added.dense is not None:
        # The sum of two half tensors may round, and one of two finite numbers overflow where neither hides a key.
        # Beside a higher key that is the same as hidden, but a query for which all do still sees them.
        wide = torch.promote_types(q.dtype, torch.float32)
        terms, other = terms.to(wide), added.dense.to(wide)
        hides = (terms == -math.inf) | (other == -math.inf)
        total = terms + other
        lowest = ~hides & (total.amax(-1, keepdim=True) == -math.inf) if total.shape[-1] else ~hides
        terms = torch.where(lowest, torch.finfo(wide).min, total)
    return NOTHING_HIDDEN, replaced(added, dense=terms)


def _key_ranges(mask: Tensor, full: Size) -> Tensor:
    batch, heads, len_q, _ = full
    shape = mask.shape
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[1] not in (1, heads) or shape[2:] != (len_q, 2):
        raise ValueError(
            f"mask of int32 key ranges has shape {tuple(shape)}: pass (1 or {batch}, 1 or {heads}, {len_q}, 2), "
            "start and end of the keys that each query sees"
        )
    return mask.unsqueeze(0)


def lower_bias(name: str, bias: biases.Bias | Tensor, size: Size, q: Tensor) -> LoweredBias:
    """The lowered bias: a tensor with 4 dimensions, each 1 or full, or functions of distance."""
    if isinstance(bias, Tensor):
        if not bias.is_floating_point():
            raise TypeError(f"{name} has dtype {bias.dtype}: pass a float tensor (bool masks go to mask=)")
        bias = biases.Dense(bias)
    elif not isinstance(bias, biases.Bias):
        raise TypeError(f"{name} is a {type(bias).__name__}: pass a float tensor or an object of fastattn.biases")
    if not isinstance(bias, biases.Dense):
        check_tensor(name, bias.tensor)
        check_device(name, bias.tensor, "q", q)
        return bias.lower(size, torch.promote_types(q.dtype, torch.float32))
    tensor = bias.tensor
    if tensor.dtype in HALVES and is_autocast(q):
        tensor = tensor.to(torch.float32)  # autocast may have moved q to the other half dtype
    check_beside(name, tensor, "q", q)
    return LoweredBias(dense=as_4d(name, tensor, size))
