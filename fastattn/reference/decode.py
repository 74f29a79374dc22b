"""Attention over a key-value cache in plain PyTorch: the definition of what every backend computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.reference.attention import DenseBias, DenseMask, attention


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    mask: Tensor | DenseMask | None = None,
    bias: Tensor | DenseBias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention of `fastattn.attention_decode`, with its arguments, one sequence at a time over the keys it holds.

    q (B, Hq, Sq, D), any float dtype. Returns out (B, Hq, Sq, Dv) in q's dtype and, with return_lse, lse (B, Hq, Sq)
    in float32 (float64 for float64 inputs).
    """
    keys, values = gather_pages(k_cache, block_table), gather_pages(v_cache, block_table)
    full = (*q.shape[:3], keys.shape[2])
    results = []
    for b, length in enumerate(cache_lengths.tolist()):
        out = attention(
            q[b : b + 1],
            keys[b : b + 1, :, :length],
            values[b : b + 1, :, :length],
            mask=_of_sequence(mask, b, length, full),
            bias=_bias_of_sequence(bias, b, length, full),
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            return_lse=True,
        )
        results.append(out)
    if not results:
        results.append(attention(q, keys[:, :, :0], values[:, :, :0], return_lse=True))
    out, lse = (torch.cat(tensors) for tensors in zip(*results, strict=True))
    return (out, lse) if return_lse else out


def gather_pages(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """A cache as (B, Hkv, S, D): itself, or of pages (pages, page size, Hkv, D) those that block_table (B, n) names."""
    if block_table is None:
        return cache
    pages = cache[
        block_table.clamp(0, max(cache.shape[0] - 1, 0)).long()
    ]  # entries past a sequence's end may be anything
    return pages.flatten(1, 2).transpose(1, 2)


def _bias_of_sequence(
    bias: Tensor | DenseBias | None, b: int, length: int, full: tuple[int, int, int, int]
) -> Tensor | None:
    """One sequence's part of the bias, of an object by the sequence's own length."""
    if bias is None or isinstance(bias, Tensor):
        return _of_sequence(bias, b, length, full)
    return bias.to_dense(*full[:3], length)[b : b + 1]


def _of_sequence(given: Any, b: int, length: int, full: tuple[int, int, int, int]) -> Any:
    """One sequence's part of a tensor that broadcasts to `full`; an object stays what it is."""
    return given.expand(full)[b : b + 1, ..., :length] if isinstance(given, Tensor) else given
