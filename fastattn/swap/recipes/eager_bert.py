"""Self-attention as BERT of transformers had it before there was an attention interface: its copies still form scores.

EncoderSelfAttention   Flava, VisualBERT, ViLT
DecoderSelfAttention   Megatron-BERT, RemBERT, TAPAS, which may attend to an encoder and have a cache
RoFormerSelfAttention  that, with rotary positions

q, k and v as linears; attention with the model's mask. The other parts of a layer are recognised by `norm` and
`feedforward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from fastattn.functional import attention
from fastattn.nn.checks import why_not_dropout, why_not_head_dim, why_not_input, why_not_linear
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.sublayers import child_reason
from fastattn.swap.code import is_copy
from fastattn.swap.originals import original
from fastattn.swap.reading import Reading
from fastattn.swap.recipe import Recipe, always, parameters
from fastattn.swap.recipes.eager_mask import compact
from fastattn.swap.recipes.linear import linear, split_heads
from fastattn.swap.swapped import Swapped

Heads = tuple[Tensor, Tensor, Tensor]


class _SelfAttention(Swapped):
    """hidden_states (B, S, hidden); attention_mask, (B, 1, 1|S, S), is added to the scores. Asked for attention weights
    (output_attentions=True) it runs the original, which forms them."""

    # What the original holds.
    dropout: nn.Dropout
    attention_head_size: int


class EncoderSelfAttention(_SelfAttention):
    """-> ((B, S, hidden),)."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        note_call(self)
        reason = _why_not(self, hidden_states, output_attentions)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states, attention_mask, output_attentions
            )
        return (_attend(self, *_heads(self, hidden_states), attention_mask),)


class DecoderSelfAttention(_SelfAttention):
    """-> ((B, S, hidden), None), or what TAPAS makes of it. With a cache or an encoder it runs the original."""

    fastattn_is_tapas: ClassVar[bool]
    is_decoder: bool

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cache: object | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        note_call(self)
        cache = kwargs.pop("past_key_values", cache)  # its name in transformers before 5.24
        reason = _why_not_alone(encoder_hidden_states, cache)
        reason = reason or _why_not(self, hidden_states, output_attentions)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states, attention_mask, encoder_hidden_states, cache, output_attentions, **kwargs
            )
        context = _attend(self, *_heads(self, hidden_states), attention_mask)
        if self.fastattn_is_tapas:
            return (context, None) if self.is_decoder else (context,)  # the cache, which there is none of
        return context, None


class RoFormerSelfAttention(_SelfAttention):
    """-> ((B, S, hidden), None). sinusoidal_pos: (1, 1, S, D), sines and cosines.

    With a cache or an encoder it runs the original.
    """

    rotary_value: bool
    apply_rotary_position_embeddings: Callable[..., tuple[Tensor, ...]]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        sinusoidal_pos: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cache: object | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        note_call(self)
        cache = kwargs.pop("past_key_values", cache)  # its name in transformers before 5.24
        reason = _why_not_alone(encoder_hidden_states, cache)
        reason = reason or _why_not(self, hidden_states, output_attentions)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states,
                attention_mask,
                sinusoidal_pos,
                encoder_hidden_states,
                cache,
                output_attentions,
                **kwargs,
            )
        query, key, value = _heads(self, hidden_states)
        if sinusoidal_pos is not None and self.rotary_value:
            query, key, value = self.apply_rotary_position_embeddings(sinusoidal_pos, query, key, value)
        elif sinusoidal_pos is not None:
            query, key = self.apply_rotary_position_embeddings(sinusoidal_pos, query, key)
        return _attend(self, query, key, value, attention_mask), None


def _heads(module: _SelfAttention, x: Tensor) -> Heads:
    query, key, value = (
        split_heads(linear(module, name, x, "linears"), module.attention_head_size) for name in _LINEARS
    )
    return query, key, value


def _attend(module: _SelfAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """(B, S, hidden)."""
    out = attention(
        query,
        key,
        value,
        mask=None if mask is None else compact(mask),
        dropout_p=module.dropout.p if module.dropout.training else 0.0,
        backend=module.fastattn_backend,
    )
    return out.transpose(1, 2).flatten(2)


_LINEARS = ("query", "key", "value")


def _why_not(module: _SelfAttention, x: Tensor, output_attentions: bool) -> str | None:
    if output_attentions:
        return "the attention weights are asked for (output_attentions=True)"
    return (
        why_not_input(x, module.fastattn_backend)
        or child_reason("dropout", why_not_dropout(module.dropout))
        or why_not_head_dim(module.attention_head_size)
    )


def _why_not_alone(encoder_states: Tensor | None, cache: object | None) -> str | None:
    if encoder_states is not None:
        return "it attends to the states of an encoder"
    return None if cache is None else "it has a cache"


# ---- which classes ---------------------------------------------------------------------------------------------------


_ENCODERS = (
    original("models.flava.modeling_flava", "FlavaSelfAttention.forward"),
    original("models.vilt.modeling_vilt", "ViltSelfAttention.forward"),
)
_DECODERS = (
    original("models.megatron_bert.modeling_megatron_bert", "MegatronBertSelfAttention.forward"),
    original("models.rembert.modeling_rembert", "RemBertSelfAttention.forward"),
)
_TAPAS = original("models.tapas.modeling_tapas", "TapasSelfAttention.forward")
_ROFORMER = original("models.roformer.modeling_roformer", "RoFormerSelfAttention.forward")


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward is a copy of one of these."""
    forward = module_class.forward
    if any(is_copy(forward, other) for other in _ENCODERS):
        return Reading(EncoderSelfAttention, _recipe)
    if is_copy(forward, _TAPAS):
        return Reading(DecoderSelfAttention, _recipe, {"fastattn_is_tapas": True})
    if any(is_copy(forward, other) for other in _DECODERS):
        return Reading(DecoderSelfAttention, _recipe, {"fastattn_is_tapas": False})
    return Reading(RoFormerSelfAttention, _recipe) if is_copy(forward, _ROFORMER) else None


def _recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(
        swapped,
        kernels={"attention": "attention", "linears": "linear (q, k, v)"},
        takes=_takes(swapped),
        children=always(
            *((name, "linears", why_not_linear) for name in _LINEARS),
            ("dropout", "attention", why_not_dropout),
        ),
        core="attention",
    )


def _takes(swapped: type[Swapped]) -> tuple[str, ...]:
    """What the swapped forward takes, under the original's name for the cache."""
    known = parameters(swapped.forward)
    older = "past_key_values" in parameters(swapped.fastattn_original.forward)
    return tuple("past_key_values" if older and name == "cache" else name for name in known)
