"""Attention as BART of transformers had it before there was an attention interface: its copies still form scores.

LEDDecoderAttention   the decoder of LED, whose encoder is Longformer's
TrOCRAttention        TrOCR
XGLMAttention         XGLM
MvpAttention          MVP, but for its prompts

q, k, v and the output as linears; attention, of the states to themselves or to an encoder's, with a cache and the
model's mask. The other parts of a layer are recognised by `norm` and `feedforward`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from fastattn.functional import attention
from fastattn.integrations.transformers_versions import weights_are_collected
from fastattn.nn.checks import MAX_DROPOUT, why_not_head_dim, why_not_input, why_not_linear
from fastattn.nn.counting import note_call, note_fallback
from fastattn.swap.code import is_copy
from fastattn.swap.originals import original
from fastattn.swap.reading import Reading
from fastattn.swap.recipe import Recipe, always
from fastattn.swap.recipes.eager_mask import compact
from fastattn.swap.recipes.linear import linear, split_heads
from fastattn.swap.swapped import Swapped


class _Call(NamedTuple):
    """What every one of these forwards is given.

    x       (B, Sq, hidden).
    states  (B, Skv, hidden) of an encoder, or None.
    mask    None or (B, 1, Sq, Skv), added to the scores.
    kwargs  what the cache is told; None where it is told nothing.
    """

    x: Tensor
    states: Tensor | None
    cache: Cache | None
    mask: Tensor | None
    kwargs: dict[str, Any] | None


class _Attention(Swapped):
    """Asked for attention weights it runs the original, which forms them."""

    # What the original holds.
    dropout: float
    head_dim: int
    layer_idx: Any
    scaling: float


class LEDDecoderAttention(_Attention):
    """-> ((B, Sq, hidden), None, cache)."""

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Cache | None]:
        note_call(self)
        reason = _why_not(self, hidden_states, kwargs, output_attentions)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states, key_value_states, cache, attention_mask, output_attentions, **kwargs
            )
        return _attend(self, _Call(hidden_states, key_value_states, cache, attention_mask, None)), None, cache


class TrOCRAttention(_Attention):
    """-> ((B, Sq, hidden), None)."""

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        note_call(self)
        reason = _why_not(self, hidden_states, kwargs, output_attentions)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states, key_value_states, cache, attention_mask, output_attentions, **kwargs
            )
        return _attend(self, _Call(hidden_states, key_value_states, cache, attention_mask, kwargs)), None


class XGLMAttention(_Attention):
    """-> ((B, Sq, hidden), None). Weights are asked for by the hooks that collect a model's outputs."""

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        note_call(self)
        reason = _why_not(self, hidden_states, kwargs, kwargs.get("output_attentions") or weights_are_collected(self))
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states, key_value_states, cache, attention_mask, **kwargs
            )
        return _attend(self, _Call(hidden_states, key_value_states, cache, attention_mask, kwargs)), None


class MvpAttention(_Attention):
    """-> ((B, Sq, hidden), None)."""

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        attn_prompt: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        note_call(self)
        reason = _why_not(self, hidden_states, kwargs, output_attentions)
        if attn_prompt is not None:
            reason = reason or "it has a prompt"
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states, key_value_states, cache, attention_mask, attn_prompt, output_attentions, **kwargs
            )
        return _attend(self, _Call(hidden_states, key_value_states, cache, attention_mask, kwargs)), None


def _why_not(
    module: _Attention, hidden_states: Tensor, kwargs: dict[str, Any], output_attentions: bool | None
) -> str | None:
    if output_attentions:
        return "the attention weights are asked for (output_attentions=True)"
    if kwargs.get("past_key_values") is not None:
        return "its cache has the name of transformers before 5.24"
    if module.dropout > MAX_DROPOUT:
        return f"its dropout is {module.dropout}"
    return why_not_input(hidden_states, module.fastattn_backend) or why_not_head_dim(module.head_dim)


def _attend(module: _Attention, call: _Call) -> Tensor:
    """(B, Sq, hidden)."""
    query = split_heads(linear(module, "q_proj", call.x, "linears"), module.head_dim)
    key, value = _keys_and_values(module, call)
    out = attention(
        query,
        key,
        value,
        mask=None if call.mask is None else compact(call.mask),
        scale=module.scaling,
        dropout_p=module.dropout if module.training else 0.0,
        backend=module.fastattn_backend,
    )
    return linear(module, "out_proj", out.transpose(1, 2).flatten(2), "linears")


def _keys_and_values(module: _Attention, call: _Call) -> tuple[Tensor, Tensor]:
    """(B, H, Skv, D) each, those of earlier calls before them: of an encoder's states they are computed once."""
    own: Any = call.cache
    is_both, is_cross = isinstance(own, EncoderDecoderCache), call.states is not None
    is_kept = is_both and is_cross and own.is_updated.get(module.layer_idx)
    if is_both:
        own = own.cross_attention_cache if is_cross else own.self_attention_cache
    if is_kept:
        kept = own.layers[module.layer_idx]
        return kept.keys, kept.values
    states = call.x if call.states is None else call.states
    key, value = (
        split_heads(linear(module, name, states, "linears"), module.head_dim) for name in ("k_proj", "v_proj")
    )
    if own is None:
        return key, value
    told = {} if call.kwargs is None else {"kwargs": call.kwargs}
    key, value = own.update(key, value, module.layer_idx, **told)
    if is_both and is_cross:
        cache: Any = call.cache
        cache.is_updated[module.layer_idx] = True
    return key, value


# ---- which classes ---------------------------------------------------------------------------------------------------


_FIRST = ("self", "hidden_states", "key_value_states", "cache", "attention_mask")
_KNOWN: tuple[tuple[object, type[_Attention], tuple[str, ...]], ...] = (
    (
        original("models.led.modeling_led", "LEDDecoderAttention.forward"),
        LEDDecoderAttention,
        (*_FIRST, "output_attentions"),
    ),
    (
        original("models.trocr.modeling_trocr", "TrOCRAttention.forward"),
        TrOCRAttention,
        (*_FIRST, "output_attentions", "kwargs"),
    ),
    (original("models.xglm.modeling_xglm", "XGLMAttention.forward"), XGLMAttention, (*_FIRST, "kwargs")),
    (
        original("models.mvp.modeling_mvp", "MvpAttention.forward"),
        MvpAttention,
        (*_FIRST, "attn_prompt", "output_attentions", "kwargs"),
    ),
)


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward is a copy of one of these."""
    for forward, mixin, takes in _KNOWN:
        if is_copy(module_class.forward, forward):
            return Reading(mixin, partial(_recipe, takes=takes))
    return None


def _recipe(swapped: type[Swapped], takes: tuple[str, ...]) -> Recipe:
    return Recipe(
        swapped,
        kernels={"attention": "attention", "linears": "linear (q, k, v, out)"},
        takes=takes,
        children=always(*((name, "linears", why_not_linear) for name in ("q_proj", "k_proj", "v_proj", "out_proj"))),
        core="attention",
    )
