"""`scaled_dot_product_attention`: torch's function, argument for argument, on `attention`'s kernels."""

from __future__ import annotations

import itertools
import math
import sys

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from fastattn import dispatch
from fastattn.functional import direct
from fastattn.functional.attention import MAX_HEAD_DIM, attention
from fastattn.functional.checks import FLOATS, HALVES, is_autocast
from fastattn.masks import Causal, Dense, Mask

_NAME = "scaled_dot_product_attention"
_TOP_LEFT = Causal("top-left")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: the same arguments, results and errors.

    Args:
        query, key, value: (..., Hq, L, E), (..., H, S, E) and (..., H, S, Ev), two dimensions at least; what comes
            before the last two broadcasts.
        attn_mask: broadcasts to (..., Hq, L, S): bool, True takes part, or float, added to the scores.
        dropout_p: share of the weights to drop, whatever the training mode is.
        is_causal: query i sees keys 0 to i (the upper left triangle, also where L is not S); not beside attn_mask.
        scale: factor of the scores, 1 / sqrt(E) by default.
        enable_gqa: heads of key and value, a divisor of Hq, are shared by groups of query heads.

    Returns:
        (..., Hq, L, Ev) in query's dtype. A query that sees no key gets 0.

    What the kernels do not take goes to torch's own function, which computes it or raises its error. Where it computes,
    a fallback is counted in `fastattn.dispatch.fallbacks` and warned about once per reason. The dropout mask is drawn
    by Philox from a seed of torch's generator: it differs from the one torch would draw.
    """
    tensors = (query, key, value, attn_mask)
    if is_overridden(*tensors):
        return handle_torch_function(
            F.scaled_dot_product_attention,
            tensors,
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    out = directly(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if out is not None:
        return out
    reason = why_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is not None:
        dispatch.forbid_fallback(_NAME, "torch", reason)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        dispatch.note_fallback(_NAME, "fastattn", "torch", reason)
        return out
    return on_kernels(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def directly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str | None = None,
) -> Tensor | None:
    """The output of a plain call by the short way; None for any other."""
    mask: object = attn_mask
    if type(is_causal) is not bool or type(enable_gqa) is not bool:
        return None
    if attn_mask is not None:
        # Ranges of keys, as int32, and masks of one dimension the kernels take and torch does not.
        if is_causal or not isinstance(attn_mask, Tensor) or attn_mask.dtype is torch.int32 or attn_mask.dim() < 2:
            return None
    elif is_causal:
        mask = _TOP_LEFT
    return direct.attention(query, key, value, mask, scale, backend, dropout_p, grouped=enable_gqa)


def on_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str | None = None,
) -> Tensor:
    """A call for which `why_torch` has no reason."""
    q, k, v, lead = _four_dims(query, key, value, enable_gqa)
    mask: Mask | None = _TOP_LEFT if is_causal else None
    bias = None
    if attn_mask is not None:
        shaped = _mask_of_four_dims(attn_mask, lead)
        if attn_mask.dtype == torch.bool:
            mask = Dense(shaped)
        else:
            bias = shaped
    out = attention(q, k, v, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p, backend=backend)
    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[-2:])


def is_overridden(*tensors: object) -> bool:
    """Whether a tensor subclass has its own idea of the function. A mode, as of torch.device or torch.export, has none:
    it would get torch's function, which then runs in the place of ours."""
    if torch.compiler.is_dynamo_compiling():  # which compares no methods
        return has_torch_function(tensors)
    return any(type(tensor) is not Tensor and _override(type(tensor)) not in _NO_OVERRIDES for tensor in tensors)


def _override(kind: type) -> object:
    override = getattr(kind, "__torch_function__", None)
    return getattr(override, "__func__", override)


_NO_OVERRIDES = (None, _override(Tensor), _override(torch.nn.Parameter))


def why_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> str | None:
    """Why the call is torch's to compute or to refuse; None where it is one for the kernels."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        reason = _why_not_tensor(name, tensor)
        if reason is not None:
            return reason
        differs = tensor.dtype != query.dtype and not (
            is_autocast(query) and torch.float64 not in (tensor.dtype, query.dtype)
        )
        if differs or tensor.device != query.device:
            return f"{name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on {query.device}"
    if query.dtype not in FLOATS:
        return f"query has dtype {query.dtype}"
    for name, number in (("dropout_p", dropout_p), ("scale", scale)):
        if number is not None and not isinstance(number, (int, float, torch.SymInt, torch.SymFloat)):
            return f"{name} is a {type(number).__name__}"
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            return f"{name} is a {type(flag).__name__}"
    if dropout_p is None or not 0.0 <= dropout_p <= 65535 / 65536:
        return f"dropout_p={dropout_p}"
    if isinstance(scale, bool) or (isinstance(scale, float) and not math.isfinite(scale)):
        return f"scale={scale}"
    return _why_not_shapes(query, key, value, enable_gqa) or _why_not_mask(query, key, value, attn_mask, is_causal)


def _why_not_tensor(name: str, tensor: object) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"{name} is a {type(tensor).__name__}"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"{name} is nested or sparse"
    if tensor.is_meta:
        return f"{name} is on the meta device"
    if type(tensor) is not Tensor and _is_distributed(tensor):
        return f"{name} is a DTensor"
    return f"{name} has {tensor.dim()} dimensions" if tensor.dim() < 2 else None


def _is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, for which torch's own function has rules and our operators have none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _why_not_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> str | None:
    if key.shape[-1] != query.shape[-1] or key.shape[-2] != value.shape[-2]:
        return f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit"
    for name, dim in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if not 1 <= dim <= MAX_HEAD_DIM:
            return f"{name} has head dim {dim}; the kernels take 1 to {MAX_HEAD_DIM}"
    if enable_gqa:
        if min(query.dim(), key.dim(), value.dim()) < 3:
            return "enable_gqa without a dimension of heads"
        heads = query.shape[-3], key.shape[-3], value.shape[-3]
        if heads[1] != heads[2]:
            return f"key has {heads[1]} heads, value {heads[2]}"
        if heads[1] == 0 or heads[0] % heads[1] != 0:
            return f"{heads[0]} heads of query are no multiple of the {heads[1]} of key"
    if any(each.dim() > 2 and each.shape[-3] == 0 for each in (query, key)):
        return "there are no heads"
    shapes = (_lead(query, enable_gqa), _lead(key, enable_gqa), _lead(value, enable_gqa))
    return None if _broadcast(*shapes) is not None else "the batch dimensions do not broadcast"


def _why_not_mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> str | None:
    if mask is None:
        return None
    if is_causal:
        return "attn_mask beside is_causal"
    reason = _why_not_tensor("attn_mask", mask)
    if reason is not None:
        return reason
    if mask.device != query.device:
        return f"attn_mask lies on {mask.device}, query on {query.device}"
    if mask.dtype not in (torch.bool, query.dtype) and not (mask.dtype == torch.float32 and query.dtype in HALVES):
        return f"attn_mask has dtype {mask.dtype} beside query of {query.dtype}"
    rows = tuple(query.shape[:-2])
    lead = _broadcast(rows, tuple(key.shape[:-2])) or rows  # grouped heads do not broadcast: the scores have query's
    scores = (*lead, query.shape[-2], key.shape[-2])
    last = scores[len(scores) - mask.dim() :]
    if mask.dim() > len(scores) or any(m not in (1, s) for m, s in zip(mask.shape, last, strict=True)):
        return f"attn_mask {tuple(mask.shape)} does not broadcast to the scores' {scores}"
    return None


def _lead(tensor: Tensor, grouped: bool) -> tuple[int, ...]:
    """The dimensions that broadcast: all but the last two, and but the heads where these are grouped."""
    return tuple(tensor.shape[: -3 if grouped else -2])


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that these broadcast to, None where they do not."""
    if shapes[0] == shapes[1] == shapes[-1]:  # of two or three
        return shapes[0]
    result: list[int] = []
    for sizes in itertools.zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1):
        size = 1
        for other in sizes:  # no next() and any(): Dynamo of torch 2.7 does not trace them
            if size == 1:
                size = other
            elif other not in (1, size):
                return None
        result.append(size)
    return tuple(result[::-1])


def _four_dims(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """query, key and value as (B, H, L, E) by views where their strides allow, and query's leading dimensions."""
    if query.dim() == key.dim() == value.dim() == 4:  # as nearly all are
        batches, heads = query.shape[0], query.shape[1]
        if key.shape[0] == value.shape[0] == batches and (enable_gqa or key.shape[1] == value.shape[1] == heads):
            return query, key, value, (batches, heads)
    shared = _broadcast(*(_lead(t, enable_gqa) for t in (query, key, value))) or ()
    lead = of_keys = (*shared, query.shape[-3]) if enable_gqa else shared
    if enable_gqa:
        of_keys = (*shared, key.shape[-3])
    elif lead and _heads(key) == _heads(value) == 1:  # a group to the kernels, which sum its gradients in float32
        of_keys = (*lead[:-1], 1)
    return _expanded(query, lead), _expanded(key, of_keys), _expanded(value, of_keys), lead


def _heads(t: Tensor) -> int:
    return t.shape[-3] if t.dim() > 2 else 1


def _expanded(t: Tensor, lead: tuple[int, ...]) -> Tensor:
    """(..., L, E) as (B, H, L, E), once its leading dimensions are those."""
    return _merge_lead(t if tuple(t.shape[:-2]) == lead else t.expand(*lead, *t.shape[-2:]))


def _merge_lead(t: Tensor) -> Tensor:
    """(..., H, L, E) as (B, H, L, E)."""
    if t.dim() == 4:
        return t
    if t.dim() < 4:
        return t[(None,) * (4 - t.dim())]
    return t.flatten(0, t.dim() - 4)


def _mask_of_four_dims(mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    """The mask with at most four dimensions, beside leading dimensions that _merge_lead merges."""
    extra = len(lead) - 2
    if extra <= 0 or mask.dim() <= 3:
        return mask
    mask = mask[(None,) * (len(lead) + 2 - mask.dim())]
    if all(size == 1 for size in mask.shape[: extra + 1]):
        return mask.flatten(0, extra)
    return mask.expand(*lead[: extra + 1], *mask.shape[-3:]).flatten(0, extra)
