"""Longformer of transformers, and the encoder of LED, which has copies of its attention: a sliding window, and tokens
that see all and are seen by all.

LongformerSelfAttention   its six projections as linears; attention over the window and the global tokens, and, with
                          projections of their own, that of the global tokens over everything; where these are few,
                          keys and values are not projected for them

The original cuts the window's scores out of overlapping chunks, at several times their size; here a mask says what is
seen. The other parts of a layer are recognised by `norm` (LongformerSelfOutput, LongformerOutput) and `feedforward`
(LongformerIntermediate).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.functional import attention
from fastattn.functional.checks import resolve_backend
from fastattn.masks import KeyMask, Mask, SinkTokens, SlidingWindow
from fastattn.nn.checks import MAX_DROPOUT, why_not_head_dim, why_not_input, why_not_linear
from fastattn.nn.counting import note_call, note_fallback
from fastattn.swap.code import is_copy
from fastattn.swap.originals import original
from fastattn.swap.reading import Reading, ReadMethods, why_not_as_read
from fastattn.swap.recipe import Recipe, always
from fastattn.swap.recipes.linear import linear, split_heads
from fastattn.swap.swapped import Swapped

_LOCAL, _GLOBAL = ("query", "key", "value"), ("query_global", "key_global", "value_global")


class _GlobalTokens(NamedTuple):
    """Where they are. entry, slot, position: int64 (n,) of all of them, the slot counting those of a batch entry.
    slots: the most that a batch entry has."""

    entry: Tensor
    slot: Tensor
    position: Tensor
    slots: int


class LongformerSelfAttention(ReadMethods):
    """hidden_states (B, S, hidden) of any length -> ((B, S, hidden),); rows of padding are 0, as in the original.

    attention_mask: float (B, S), negative where a token is padding, positive where it is global, else 0;
    is_index_masked, is_index_global_attn: bool (B, S), which of them are; is_global_attn: whether any is global.
    Asked for attention weights (output_attentions=True) it runs the original, which forms them.
    """

    # What the original holds.
    dropout: float
    head_dim: int
    num_heads: int
    one_sided_attn_window_size: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        is_index_masked: Tensor | None = None,
        is_index_global_attn: Tensor | None = None,
        is_global_attn: bool | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, ...]:
        note_call(self)
        reason = _why_not(self, hidden_states, output_attentions)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states,
                attention_mask,
                is_index_masked,
                is_index_global_attn,
                is_global_attn,
                output_attentions,
            )
        assert attention_mask is not None and is_index_masked is not None  # the original cannot do without
        tokens = None
        if is_global_attn:
            assert is_index_global_attn is not None
            tokens = _global_tokens(is_index_global_attn)
        out = _from_every_token(self, hidden_states, attention_mask == 0, tokens)
        out = out.masked_fill(is_index_masked[..., None], 0.0)
        if tokens is not None:
            own = _from_global_tokens(self, hidden_states, ~is_index_masked, tokens)
            out[tokens.entry, tokens.position] = own[tokens.entry, tokens.slot]
        return (out,)


def _why_not(module: LongformerSelfAttention, hidden_states: Tensor, output_attentions: bool) -> str | None:
    if output_attentions:
        return "the attention weights are asked for (output_attentions=True)"
    if module.dropout > MAX_DROPOUT:
        return f"its dropout is {module.dropout}"
    if torch.jit.is_tracing():
        return "torch.jit.trace, which makes tensors of lengths, records it"
    return (
        why_not_as_read(module)
        or why_not_input(hidden_states, module.fastattn_backend)
        or why_not_head_dim(module.head_dim)
    )


def _global_tokens(is_global: Tensor) -> _GlobalTokens:
    """Reads the device, as the original does."""
    entry, position = is_global.nonzero(as_tuple=True)
    slot = (is_global.cumsum(1) - 1)[entry, position]
    return _GlobalTokens(entry, slot, position, int(slot.max()) + 1)


def _from_every_token(
    module: LongformerSelfAttention, x: Tensor, is_local: Tensor, tokens: _GlobalTokens | None
) -> Tensor:
    """(B, S, hidden): each token attends to its window, as far as `is_local` (B, S) goes, and to the global tokens."""
    q, k, v = (_projected(module, name, x) for name in _LOCAL)
    window = module.one_sided_attn_window_size
    mask: Mask = SlidingWindow(window, window)
    if tokens is not None:
        # Global tokens lie anywhere, and any number of them: their keys are put before the others, once more.
        k, v = (torch.cat([_gathered(each, tokens), each], dim=1) for each in (k, v))
        is_used = is_local.new_zeros(x.shape[0], tokens.slots)
        is_used[tokens.entry, tokens.slot] = True
        mask, is_local = mask | SinkTokens(tokens.slots), torch.cat([is_used, is_local], dim=1)
    return _attend(module, q, k, v, mask & KeyMask(is_local))


def _from_global_tokens(module: LongformerSelfAttention, x: Tensor, is_seen: Tensor, tokens: _GlobalTokens) -> Tensor:
    """(B, slots, hidden): each global token attends to everything that is seen (B, S)."""
    q = _projected(module, "query_global", _gathered(x, tokens))
    if _can_absorb(module, tokens.slots):
        return _absorbed(module, q, x, is_seen)
    k, v = (_projected(module, name, x) for name in _GLOBAL[1:])
    return _attend(module, q, k, v, KeyMask(is_seen))


def _projected(module: LongformerSelfAttention, name: str, x: Tensor) -> Tensor:
    """The child applied to x (B, S, hidden). Where it is called, it gets the tokens before the batch, as the original
    has them: its hooks may look."""
    if "linears" in module.fastattn_off or why_not_linear(getattr(module, name)) is not None:
        return linear(module, name, x.transpose(0, 1), "linears").transpose(0, 1)
    return linear(module, name, x, "linears")


def _can_absorb(module: LongformerSelfAttention, slots: int) -> bool:
    """Where the queries are few, the projections nothing but their weights, and no backend is forced: torch runs it."""
    if _FEW * slots > module.head_dim or "linears" in module.fastattn_off or resolve_backend(module.fastattn_backend):
        return False
    return all(why_not_linear(getattr(module, name)) is None for name in _GLOBAL[1:])


_FEW = 4
"""Queries fewer than a head's features by this factor are projected into the space of the states, where they meet every
token, instead of every token twice into theirs: over 4,096 tokens of 768 features one query takes a twelfth of the time
so, with gradients a fifth, and 16 take 0.6 of it (one core of an AMD EPYC with AVX-512, float32, 2026-11-27)."""


def _absorbed(module: LongformerSelfAttention, q: Tensor, x: Tensor, is_seen: Tensor) -> Tensor:
    """The attention of q (B, slots, hidden) to keys and values that are projections of x, as q (W x) = (q W) x."""
    shape = (module.num_heads, module.head_dim)
    k, v = (getattr(module, name) for name in _GLOBAL[1:])
    q = q.unflatten(2, shape) / math.sqrt(module.head_dim)
    rows = torch.einsum("bshd,hde->bhse", q, k.weight.unflatten(0, shape))
    scores = (rows.flatten(1, 2) @ x.transpose(1, 2)).unflatten(1, (module.num_heads, -1))
    if k.bias is not None:  # the same for every key: it changes nothing but has a gradient, of rounding
        scores = scores + torch.einsum("bshd,hd->bhs", q, k.bias.unflatten(0, shape))[..., None]
    # Not -inf: a slot that is not used may see nothing.
    scores = scores.masked_fill(~is_seen[:, None, None], torch.finfo(scores.dtype).min)
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(x.dtype), module.dropout, module.training)
    mixed = (weights.flatten(1, 2) @ x).unflatten(1, (module.num_heads, -1))
    out = torch.einsum("bhse,hde->bshd", mixed, v.weight.unflatten(0, shape))
    if v.bias is not None:
        out = out + torch.einsum("bhs,hd->bshd", weights.sum(-1), v.bias.unflatten(0, shape))
    return out.flatten(2).to(q.dtype)


def _gathered(x: Tensor, tokens: _GlobalTokens) -> Tensor:
    """(B, slots, hidden): the rows of the global tokens, and rows of 0 in slots that a batch entry does not use."""
    rows = x.new_zeros(x.shape[0], tokens.slots, x.shape[2])
    rows[tokens.entry, tokens.slot] = x[tokens.entry, tokens.position]
    return rows


def _attend(module: LongformerSelfAttention, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    q, k, v = (split_heads(x, module.head_dim) for x in (q, k, v))
    out = attention(
        q,
        k,
        v,
        mask=mask,
        dropout_p=module.dropout if module.training else 0.0,
        backend=module.fastattn_backend,
    )
    return out.transpose(1, 2).flatten(2)


# ---- which classes ---------------------------------------------------------------------------------------------------


_METHODS = {
    name: original("models.longformer.modeling_longformer", f"LongformerSelfAttention.{name}")
    for name in (
        "forward",
        "_chunk",
        "_compute_attn_output_with_global_indices",
        "_compute_global_attn_output_from_hidden",
        "_concat_with_global_key_attn_probs",
        "_get_global_attn_indices",
        "_mask_invalid_locations",
        "_pad_and_diagonalize",
        "_pad_and_transpose_last_two_dims",
        "_sliding_chunks_matmul_attn_probs_value",
        "_sliding_chunks_query_key_matmul",
    )
}


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose methods are copies of this one's."""
    methods = {name: getattr(module_class, name, None) for name in _METHODS}
    if not all(is_copy(methods[name], _METHODS[name]) for name in _METHODS):
        return None
    return Reading(LongformerSelfAttention, _recipe, {"fastattn_methods": methods})


def _recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(
        swapped,
        kernels={"attention": "attention", "linears": "linear (query, key, value, and those of global tokens)"},
        takes=(
            "self",
            "hidden_states",
            "attention_mask",
            "is_index_masked",
            "is_index_global_attn",
            "is_global_attn",
            "output_attentions",
        ),
        children=always(*((name, "linears", why_not_linear) for name in (*_LOCAL, *_GLOBAL))),
        core="attention",
    )
