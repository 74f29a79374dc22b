"""GPT-Neo of transformers, whose attention asks no interface: causal, in every other layer over a window alone.

GPTNeoSelfAttention   q, k, v and the output as linears; attention with the model's mask, the scores not scaled

The original keeps a bool matrix of what is seen, `bias`; where it is the one that it was made with, it is not read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from fastattn.functional import attention
from fastattn.masks import Causal, Mask, SlidingWindow
from fastattn.masks import cache as masks_cache
from fastattn.nn.checks import why_not_dropout, why_not_head_dim, why_not_input, why_not_linear
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.sublayers import child_reason
from fastattn.swap.code import is_copy
from fastattn.swap.originals import original
from fastattn.swap.reading import Reading, ReadMethods, why_not_as_read
from fastattn.swap.recipe import Recipe, always
from fastattn.swap.recipes.eager_mask import can_be_read, compact
from fastattn.swap.recipes.linear import linear, split_heads
from fastattn.swap.swapped import Swapped


class GPTNeoSelfAttention(ReadMethods):
    """hidden_states (B, Sq, hidden) -> ((B, Sq, hidden), None). attention_mask: None or (B, 1, Sq, Skv), added to the
    scores. Asked for attention weights (output_attentions=True) it runs the original, which forms them."""

    # What the original holds.
    attn_dropout: nn.Dropout
    resid_dropout: nn.Module
    attention_type: str
    bias: Tensor
    config: Any
    head_dim: int
    layer_id: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        note_call(self)
        reason = _why_not(self, hidden_states, output_attentions)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states, attention_mask, layer_past, use_cache, output_attentions, **kwargs
            )
        query, key, value = (
            split_heads(linear(self, name, hidden_states, "linears"), self.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_id)
        out = attention(
            query,
            key,
            value,
            mask=_mask(self, attention_mask, query.shape[2], key.shape[2]),
            scale=1.0,
            dropout_p=self.attn_dropout.p if self.attn_dropout.training else 0.0,
            backend=self.fastattn_backend,
        )
        output = linear(self, "out_proj", out.transpose(1, 2).flatten(2), "linears")
        return self.resid_dropout(output), None


def _why_not(module: GPTNeoSelfAttention, hidden_states: Tensor, output_attentions: bool) -> str | None:
    if output_attentions:
        return "the attention weights are asked for (output_attentions=True)"
    return (
        why_not_as_read(module)
        or why_not_input(hidden_states, module.fastattn_backend)
        or child_reason("attn_dropout", why_not_dropout(module.attn_dropout))
        or why_not_head_dim(module.head_dim)
    )


# ---- what is seen ----------------------------------------------------------------------------------------------------


def _mask(module: GPTNeoSelfAttention, added: Tensor | None, len_q: int, len_k: int) -> Mask | Tensor:
    """What the layer's own rule and the model's mask leave to be seen."""
    own = module.bias[:, :, len_k - len_q : len_k, :len_k]
    rule = _rule(module)
    if added is None:
        return own if rule is None else rule
    mask = compact(added)
    if mask.dtype is torch.int32 and rule is not None:
        return _within(rule, mask, len_q, len_k)
    if mask.dtype is torch.bool:
        return mask & own
    mask = added if mask.dtype is torch.int32 else mask
    return torch.where(own, mask, torch.finfo(mask.dtype).min)


def _within(rule: SlidingWindow, ranges: Tensor, len_q: int, len_k: int) -> Tensor:
    """The key ranges cut to the rule's."""
    position = torch.arange(len_k - len_q, len_k, dtype=torch.int32, device=ranges.device)
    start, end = ranges.unbind(-1)
    if rule.left is not None:
        start = torch.maximum(start, position - rule.left)
    return torch.stack([start, torch.minimum(end, position + 1)], dim=-1)


def _rule(module: GPTNeoSelfAttention) -> SlidingWindow | None:
    """The rule that `bias` spells out; None where it was changed, or cannot be read now."""
    if not can_be_read(module.bias):
        return None
    rule = SlidingWindow(module.config.window_size - 1, 0) if module.attention_type == "local" else Causal()
    key = (module.attention_type, module.config.window_size)
    return rule if _checked.get(key, (module.bias,), lambda: _spells(module.bias, rule)) else None


_checked = masks_cache.Cache(entries=512, size=1 << 20)
"""Of each layer, whether its matrix is what it was made with."""


def _spells(bias: Tensor, rule: SlidingWindow) -> tuple[Tensor, ...]:
    """Something where the matrix is that of the rule, else nothing."""
    length = bias.shape[-1]
    expected = torch.ones(length, length, dtype=torch.bool, device=bias.device).tril()
    if rule.left is not None:
        expected = expected.triu(-rule.left)
    return (torch.empty(0),) if torch.equal(bias, expected[None, None]) else ()


# ---- which classes ---------------------------------------------------------------------------------------------------


_METHODS = {
    name: original("models.gpt_neo.modeling_gpt_neo", f"GPTNeoSelfAttention.{name}")
    for name in ("forward", "_attn", "_split_heads", "_merge_heads")
}


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose methods are copies of this one's."""
    methods = {name: getattr(module_class, name, None) for name in _METHODS}
    if not all(is_copy(methods[name], _METHODS[name]) for name in _METHODS):
        return None
    return Reading(GPTNeoSelfAttention, _recipe, {"fastattn_methods": methods})


def _recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(
        swapped,
        kernels={"attention": "attention", "linears": "linear (q, k, v, out)"},
        takes=(
            "self",
            "hidden_states",
            "attention_mask",
            "layer_past",
            "use_cache",
            "output_attentions",
            "kwargs",
        ),
        children=always(
            *((name, "linears", why_not_linear) for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
            ("attn_dropout", "attention", why_not_dropout),
        ),
        core="attention",
    )
