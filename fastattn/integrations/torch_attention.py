"""Attention by torch alone, for what no kernel takes; and masks as dense tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn import reference
from fastattn.functional.checks import check_dropout
from fastattn.masks import Causal
from fastattn.reference.attention import dense_mask

REPLACED = "scaled_dot_product_attention"
_TORCHS = torch._C._nn.scaled_dot_product_attention  # what F has by then may already be another one


def is_replaced() -> bool:
    """Whether another function stands in the place of torch's, as SageAttention's is put there."""
    return F.scaled_dot_product_attention is not _TORCHS


def torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | Causal | None,
    bias: Tensor | None,
    scale: float | None,
    softcap: float,
    sinks: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """(B, Hq, Lq, Dv), as fastattn.attention: by scaled_dot_product_attention, or with softcap or sinks, which that has
    not, by the reference, with scores (B, Hq, Lq, Lk) in memory."""
    if softcap or sinks is not None:
        seed = check_dropout(dropout_p, None, "query", query)
        options = {"scale": scale, "softcap": softcap or None, "sinks": sinks, "dropout_p": dropout_p}
        return reference.attention(query, key, value, mask=mask, bias=bias, dropout_seed=seed, **options)  # type: ignore
    is_causal = isinstance(mask, Causal) and bias is None
    added = None if is_causal else _added(_dense(mask, query.shape[2], key.shape[2], query), bias, query.dtype)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=added,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def added_mask(mask: Tensor | Causal | None, query: Tensor, len_k: int) -> Tensor | None:
    """A mask as transformers' eager functions add it: float (B, 1 or Hq, Lq, Lk), finfo.min where a key is hidden."""
    dense = _dense(mask, query.shape[2], len_k, query)
    if dense is None or dense.dtype is not torch.bool:
        return dense
    return torch.zeros_like(dense, dtype=query.dtype).masked_fill(~dense, torch.finfo(query.dtype).min)


def chosen_keys(mask: Tensor | Causal | None, indices: Tensor, len_k: int) -> Tensor:
    """The mask without the keys that are not among indices (B, Lq, n)."""
    batch, len_q, _ = indices.shape
    chosen = torch.zeros(batch, len_q, len_k, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(2, indices.long(), True)[:, None]
    dense = _dense(mask, len_q, len_k, indices)
    if dense is None:
        return chosen
    return dense & chosen if dense.dtype is torch.bool else dense.masked_fill(~chosen, -torch.inf)


def _dense(mask: Tensor | Causal | None, len_q: int, len_k: int, beside: Tensor) -> Tensor | None:
    """A mask of `attention_forward` as bool, True where visible; float ones and none as they are. `beside`: a tensor of
    the same batch and device."""
    if mask is None or (isinstance(mask, Tensor) and mask.is_floating_point()):
        return mask
    heads = mask.shape[1] if isinstance(mask, Tensor) else 1
    return dense_mask(mask, (beside.shape[0], heads, len_q, len_k), beside.device)


def _added(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Mask and bias as one mask of torch's function."""
    if mask is not None and mask.dtype is not torch.bool:
        mask = _narrowed(mask, dtype)
    if bias is None or mask is None:
        return mask if bias is None else _narrowed(bias, dtype)
    bias = _narrowed(bias, dtype)
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else bias + mask


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype, where its smallest number, by which models hide keys, must not become -inf."""
    if tensor.dtype is dtype:
        return tensor
    return torch.where(tensor == -torch.inf, tensor, tensor.clamp(min=torch.finfo(dtype).min)).to(dtype)
