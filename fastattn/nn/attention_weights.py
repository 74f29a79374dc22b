"""Attention whose weights are wanted too, as nn.MultiheadAttention(need_weights=True) wants them.

The kernels never form the weights, so they cost at least one more product. Two ways:

`kernel_and_weights`    output from the kernel, weights = exp(scores - lse) from the log-sum-exp that it returns. All
                        gradients come from the kernel where nobody differentiates the weights, and gradients through
                        the weights reach it by its lse.
`attention_by_weights`  all in torch operations. Once the weights are there the output is one product away: less than
                        the kernel takes, as long as there is no backward and the weights of a few queries at a time
                        lie in the cache. With dropout this is the only way, for the weights returned are those that
                        were used: drawing the kernel's mask again from its seed, in torch operations, takes longer
                        than the rest of the module.

Shapes: q (B, H, L, D), k and v (B, H, S, D), output (B, H, L, D), weights (B, L, S) if averaged over the heads or else
(B, H, L, S). Scores and softmax are float32. A query that sees no key has output and weights 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.functional import attention
from fastattn.nn.attention_masks import AttentionMasks
from fastattn.ops.library import tracks_gradients

_CACHED_SCORES = 2**19
"""Scores that are worked on at a time on a CPU, 2 MiB: what a core's second-level cache holds."""


def kernel_and_weights(
    q: Tensor, k: Tensor, v: Tensor, masks: AttentionMasks, average: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(output, weights) without dropout, by the kernel."""
    output, lse = attention(q, k, v, mask=masks.visible(), bias=masks.bias, return_lse=True, backend=backend)
    # A query that sees no key has lse -inf and only scores of -inf: exp(-inf - 0) = 0, and no gradient.
    shift = -lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)
    scores = _scores(q, k, shift if masks.bias is None else masks.bias.float() + shift)
    hidden = masks.hidden()
    # In place, unless a mode keeps the product: selective checkpointing may.
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
        weights = (scores if hidden is None else scores.masked_fill(hidden, float("-inf"))).exp()
    else:
        weights = (scores if hidden is None else scores.masked_fill_(hidden, float("-inf"))).exp_()
    return output, _averaged(weights, average).to(_weights_dtype(output))


def attention_by_weights(
    q: Tensor, k: Tensor, v: Tensor, masks: AttentionMasks, average: bool, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """(output, weights), the weights after dropout."""
    added, blind = _additive(masks)
    # Dropout is drawn for all at once: without gradients as with them, where a checkpoint runs the same again.
    at_once = dropout_p > 0.0 or tracks_gradients(q, k, v, added)
    if at_once or torch.compiler.is_compiling() or q.device.type != "cpu":
        output, weights = _attend(q, k, v, added, blind, dropout_p)
        return output, _averaged(weights, average).to(_weights_dtype(output))
    if blind is not None and not blind.any():
        blind = None
    batch, heads, len_q, _ = q.shape
    output = q.new_empty(batch, len_q, heads, v.shape[3]).transpose(1, 2)
    weights = q.new_empty((batch, len_q, k.shape[2]) if average else (batch, heads, len_q, k.shape[2]))
    for entries, queries in _cached_parts(batch, heads, len_q, k.shape[2]):
        masked = _part(added, entries, queries), _part(blind, entries, queries)
        some_output, some_weights = _attend(q[entries, :, queries], k[entries], v[entries], *masked, 0.0)
        output[entries, :, queries] = some_output
        weights[entries, ..., queries, :] = _averaged(some_weights, average)
    return output, weights


def _attend(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, blind: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    weights = _scores(q, k, added).softmax(dim=-1)
    if blind is not None:
        weights = weights.masked_fill(blind, 0.0)
    weights = F.dropout(weights.to(q.dtype), dropout_p)
    return weights @ v, weights


def _additive(masks: AttentionMasks) -> tuple[Tensor | None, Tensor | None]:
    """What masks and bias add to the scores, and which queries see no key, True for those: float32 (1|B, 1|H, 1|L, S)
    and bool (1|B, 1|H, 1|L, 1). Such a query has nothing hidden, so that its softmax, not used, is finite."""
    bias, hidden = masks.bias, masks.hidden()
    if bias is not None:
        added = bias.float()
    elif hidden is not None:
        added = torch.zeros_like(hidden, dtype=torch.float32)
    else:
        return None, None
    if hidden is not None:
        added = added.masked_fill(hidden, float("-inf"))
    blind = (added == float("-inf")).all(dim=-1, keepdim=True)
    return added.masked_fill(blind, 0.0), blind


def _scores(q: Tensor, k: Tensor, added: Tensor | None) -> Tensor:
    """q k^T / sqrt(D) + added, float32 (B, H, L, S). added: float32, broadcasts to that."""
    batch, heads, _, dim = q.shape
    scale = dim**-0.5
    with torch.autocast(q.device.type, enabled=False):
        rows, columns = q.float().flatten(0, 1), k.float().flatten(0, 1).transpose(1, 2)
        if added is None:
            scores = torch.bmm(rows * scale, columns)
        else:
            scores = torch.baddbmm(added.expand(batch, heads, -1, -1).flatten(0, 1), rows, columns, alpha=scale)
        return scores.unflatten(0, (batch, heads))


def _averaged(weights: Tensor, average: bool) -> Tensor:
    return weights.mean(dim=1) if average else weights


def _weights_dtype(output: Tensor) -> torch.dtype:
    """The attention's own dtype, but float32 under autocast on CUDA, where torch takes the softmax in float32."""
    device = output.device.type
    return torch.float32 if device == "cuda" and torch.is_autocast_enabled(device) else output.dtype


def _cached_parts(batch: int, heads: int, len_q: int, len_k: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the queries whose scores fit the cache."""
    queries = max(1, min(len_q, _CACHED_SCORES // max(1, heads * len_k)))
    entries = max(1, _CACHED_SCORES // max(1, heads * queries * len_k))
    for b in range(0, batch, entries):
        for i in range(0, len_q, queries):
            yield slice(b, b + entries), slice(i, i + queries)


def _part(mask: Tensor | None, entries: slice, queries: slice) -> Tensor | None:
    """A mask's slice; dimensions of size 1 stay."""
    if mask is None:
        return None
    mask = mask if mask.shape[0] == 1 else mask[entries]
    return mask if mask.shape[2] == 1 else mask[:, :, queries]
