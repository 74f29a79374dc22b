"""Attention by torch alone, for what no kernel takes; and masks as dense tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn.masks import Causal


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
    not, by the operations that it stands for, with scores (B, Hq, Lq, Lk) in memory."""
    grouped = query.shape[1] != key.shape[1]
    if not softcap and sinks is None:
        if isinstance(mask, Causal) and bias is None:
            return F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout_p, is_causal=True, scale=scale, enable_gqa=grouped
            )
        added = _added(dense_mask(mask, query.shape[2], key.shape[2], query.device), bias, query.dtype)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=added, dropout_p=dropout_p, scale=scale, enable_gqa=grouped
        )
    if grouped:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    scores = (query @ key.mT).float() * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    added = _added(dense_mask(mask, query.shape[2], key.shape[2], query.device), bias, torch.float32)
    if added is not None:
        scores = scores.masked_fill(~added, -torch.inf) if added.dtype is torch.bool else scores + added
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=3)
    blind = (scores == -torch.inf).all(dim=3, keepdim=True)  # 0, and no gradient, instead of NaN
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=3).masked_fill(blind, 0.0)
    weights = F.dropout(weights[..., : key.shape[2]], dropout_p).to(value.dtype)
    return weights @ value


def dense_mask(mask: Tensor | Causal | None, len_q: int, len_k: int, device: torch.device) -> Tensor | None:
    """A mask of `attention_forward` as bool (1|B, 1|Hq, Lq, Lk), True where visible; float ones as they are."""
    if isinstance(mask, Causal):
        return torch.ones(len_q, len_k, dtype=torch.bool, device=device).tril()[None, None]
    if mask is None or mask.dtype is not torch.int32:
        return mask
    positions = torch.arange(len_k, device=device)
    return (positions >= mask[..., :1]) & (positions < mask[..., 1:])


def chosen_keys(mask: Tensor | Causal | None, indices: Tensor, len_k: int) -> Tensor:
    """The mask without the keys that are not among indices (B, Lq, n)."""
    batch, len_q, _ = indices.shape
    chosen = torch.zeros(batch, len_q, len_k, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(2, indices.long(), True)[:, None]
    dense = dense_mask(mask, len_q, len_k, indices.device)
    if dense is None:
        return chosen
    return dense & chosen if dense.dtype is torch.bool else dense.masked_fill(~chosen, -torch.inf)


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
