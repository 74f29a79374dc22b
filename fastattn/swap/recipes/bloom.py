"""Bloom of transformers, whose attention asks no interface and adds ALiBi's biases.

BloomAttention   q, k, v and the output as linears; attention with the model's mask and biases
BloomMLP         ffn; its GELU, an autograd function of Bloom's own, is the tanh approximation

The biases of a key are the same for every query, so that they stay (B, H, 1, Skv); the original makes scores of them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.bloom import modeling_bloom

from fastattn.functional import attention, ffn
from fastattn.nn.checks import (
    full_name,
    why_not_dropout,
    why_not_head_dim,
    why_not_input,
    why_not_linear,
    why_not_unwatched,
)
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.sublayers import child_reason
from fastattn.swap.code import is_copy
from fastattn.swap.originals import original
from fastattn.swap.reading import Reading, ReadMethods, why_not_as_read
from fastattn.swap.recipe import Recipe, always
from fastattn.swap.recipes.eager_mask import compact
from fastattn.swap.recipes.linear import linear
from fastattn.swap.swapped import Swapped


class BloomAttention(ReadMethods):
    """hidden_states (B, Sq, hidden) -> (residual + output (B, Sq, hidden), None).

    alibi: (B * H, 1, Skv), added to the scores of every query; attention_mask: None or (B, 1, Sq, Skv), added too.
    Asked for attention weights (output_attentions=True) it runs the original, which forms them.
    """

    # What the original holds.
    attention_dropout: nn.Dropout
    num_heads: int
    head_dim: int
    inv_norm_factor: float
    beta: float
    hidden_dropout: float
    layer_idx: int | None
    pretraining_tp: int
    slow_but_exact: bool

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
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
                hidden_states, residual, alibi, attention_mask, layer_past, use_cache, output_attentions, **kwargs
            )
        fused = linear(self, "query_key_value", hidden_states, "linears")
        parts = fused.view(*fused.shape[:2], self.num_heads, 3, self.head_dim).transpose(1, 2)
        query, key, value = parts.unbind(3)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out = attention(
            query,
            key,
            value,
            mask=None if attention_mask is None else compact(attention_mask),
            bias=alibi.unflatten(0, (-1, self.num_heads)),
            scale=self.inv_norm_factor,
            dropout_p=self.attention_dropout.p if self.attention_dropout.training else 0.0,
            backend=self.fastattn_backend,
        )
        output = linear(self, "dense", out.transpose(1, 2).flatten(2), "linears")
        return modeling_bloom.dropout_add(output, residual, self.hidden_dropout, self.training), None


def _why_not(module: BloomAttention, hidden_states: Tensor, output_attentions: bool) -> str | None:
    if output_attentions:
        return "the attention weights are asked for (output_attentions=True)"
    if module.beta != 1.0:
        return f"its beta is {module.beta}"
    return (
        why_not_as_read(module)
        or _why_not_whole(module)
        or why_not_input(hidden_states, module.fastattn_backend)
        or child_reason("attention_dropout", why_not_dropout(module.attention_dropout))
        or why_not_head_dim(module.head_dim)
    )


class BloomMLP(Swapped):
    """hidden_states, residual (B, S, hidden) -> residual + block (B, S, hidden)."""

    # What the original holds.
    dense_h_to_4h: nn.Linear
    gelu_impl: nn.Module
    dense_4h_to_h: nn.Linear
    hidden_dropout: float
    pretraining_tp: int
    slow_but_exact: bool

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        note_call(self)
        up, down = self.dense_h_to_4h, self.dense_4h_to_h
        reason = (
            _why_not_whole(self)
            or why_not_input(hidden_states, self.fastattn_backend)
            or child_reason("dense_h_to_4h", why_not_linear(up))
            or child_reason("gelu_impl", _why_not_gelu(self.gelu_impl))
            or child_reason("dense_4h_to_h", why_not_linear(down))
        )
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(hidden_states, residual)  # type: ignore[misc, no-any-return]
        y = ffn(hidden_states, up.weight, up.bias, down.weight, down.bias, "gelu_tanh", backend=self.fastattn_backend)
        return modeling_bloom.dropout_add(y, residual, self.hidden_dropout, self.training)


def _why_not_whole(module: BloomAttention | BloomMLP) -> str | None:
    if module.pretraining_tp > 1 and module.slow_but_exact:
        return "the output is computed in slices (slow_but_exact)"
    return None


def _why_not_gelu(child: nn.Module) -> str | None:
    if type(child) is not modeling_bloom.BloomGelu:
        return f"is a {full_name(child)}"
    if type(child).forward is not _GELU:
        return "is of a class whose forward was replaced"
    return why_not_unwatched(child)


# ---- which classes ---------------------------------------------------------------------------------------------------


_METHODS = {
    name: original("models.bloom.modeling_bloom", f"BloomAttention.{name}")
    for name in ("forward", "_reshape", "_merge_heads")
}
_MLP = original("models.bloom.modeling_bloom", "BloomMLP.forward")
_GELU = original("models.bloom.modeling_bloom", "BloomGelu.forward")


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose methods are copies of the attention's, or whose forward is one of the block's."""
    methods = {name: getattr(module_class, name, None) for name in _METHODS}
    if all(is_copy(methods[name], _METHODS[name]) for name in _METHODS):
        return Reading(BloomAttention, _attention_recipe, {"fastattn_methods": methods})
    if _GELU is not None and is_copy(module_class.forward, _MLP):
        return Reading(BloomMLP, _mlp_recipe)
    return None


def _attention_recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(
        swapped,
        kernels={"attention": "attention", "linears": "linear (query_key_value, dense)"},
        takes=(
            "self",
            "hidden_states",
            "residual",
            "alibi",
            "attention_mask",
            "layer_past",
            "use_cache",
            "output_attentions",
            "kwargs",
        ),
        children=always(
            *((name, "linears", why_not_linear) for name in ("query_key_value", "dense")),
            ("attention_dropout", "attention", why_not_dropout),
        ),
        core="attention",
    )


def _mlp_recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(
        swapped,
        kernels={"ffns": "ffn"},
        takes=("self", "hidden_states", "residual"),
        children=always(
            ("dense_h_to_4h", "ffns", why_not_linear),
            ("gelu_impl", "ffns", _why_not_gelu),
            ("dense_4h_to_h", "ffns", why_not_linear),
        ),
    )
