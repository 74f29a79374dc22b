"""MPT of transformers, whose attention asks no interface and adds ALiBi's biases.

MptAttention   q, k, v and the output as linears; attention with the model's mask and biases
MptBlock       hands on whether attention weights are asked for, which the original keeps to itself
MptMLP         ffn
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from fastattn.functional import attention, ffn
from fastattn.nn.checks import MAX_DROPOUT, why_not_head_dim, why_not_input, why_not_linear
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.sublayers import child_reason
from fastattn.swap.code import is_copy
from fastattn.swap.originals import original
from fastattn.swap.reading import Reading
from fastattn.swap.recipe import Recipe, always
from fastattn.swap.recipes.activations import activation_name, why_not_activation
from fastattn.swap.recipes.eager_mask import compact_hidden
from fastattn.swap.recipes.linear import linear, split_heads
from fastattn.swap.swapped import Swapped


class MptAttention(Swapped):
    """hidden_states (B, Sq, hidden) -> ((B, Sq, hidden), None).

    position_bias: (H, 1, keys) or None, its last Skv keys added to the scores of every query; attention_mask: bool
    (B, 1, Sq, Skv), True where a key is hidden. Where its block does not say that no attention weights are asked for it
    runs the original, which always forms them.
    """

    # What the original holds.
    attn_dropout_p: float
    clip_qkv: float | None
    head_dim: int
    layer_idx: Any
    softmax_scale: float

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor | None,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        note_call(self)
        reason = _why_not(self, hidden_states, output_attentions)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states, position_bias, cache, attention_mask, **kwargs
            )
        mixed = linear(self, "Wqkv", hidden_states, "linears")
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        query, key, value = (split_heads(part, self.head_dim) for part in mixed.chunk(3, dim=2))
        if cache is not None:
            own: Any = cache
            key, value = own.update(key, value, self.layer_idx, kwargs=kwargs)
        out = attention(
            query,
            key,
            value,
            mask=None if attention_mask is None else compact_hidden(attention_mask),
            bias=None if position_bias is None else position_bias[None, ..., -key.shape[2] :],
            scale=self.softmax_scale,
            dropout_p=self.attn_dropout_p if self.training else 0.0,
            backend=self.fastattn_backend,
        )
        return linear(self, "out_proj", out.transpose(1, 2).flatten(2), "linears"), None


def _why_not(module: MptAttention, hidden_states: Tensor, output_attentions: bool | None) -> str | None:
    if output_attentions:
        return "the attention weights are asked for (output_attentions=True)"
    if output_attentions is None:
        return "its block does not say whether the attention weights are asked for"
    if module.attn_dropout_p > MAX_DROPOUT:
        return f"its dropout is {module.attn_dropout_p}"
    return why_not_input(hidden_states, module.fastattn_backend) or why_not_head_dim(module.head_dim)


class MptBlock(Swapped):
    """The original's forward, but for the one argument that it keeps to itself."""

    # What the original holds.
    norm_1: nn.Module
    attn: nn.Module
    resid_attn_dropout: nn.Module
    norm_2: nn.Module
    ffn: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        attention_mask: Tensor,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        note_call(self)
        # Another attention may stand in its place by now, which takes the original's arguments alone.
        is_ours = isinstance(self.attn, MptAttention) and "forward" not in self.attn.__dict__
        attended, weights = self.attn(
            self.norm_1(hidden_states),
            position_bias=position_bias,
            attention_mask=attention_mask,
            cache=layer_past,
            **({"output_attentions": bool(output_attentions)} if is_ours else {}),
        )
        hidden_states = self.resid_attn_dropout(attended) + hidden_states
        return self.ffn(self.norm_2(hidden_states), hidden_states), weights


class MptMLP(Swapped):
    """hidden_states, residual (B, S, hidden) -> residual + block (B, S, hidden)."""

    # What the original holds.
    up_proj: nn.Linear
    act: nn.Module
    down_proj: nn.Linear
    hidden_dropout: float

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        note_call(self)
        up, down, activation = self.up_proj, self.down_proj, activation_name(self.act)
        reason = (
            why_not_input(hidden_states, self.fastattn_backend)
            or child_reason("up_proj", why_not_linear(up))
            or child_reason("act", why_not_activation(self.act))
            or child_reason("down_proj", why_not_linear(down))
        )
        if reason is not None or activation is None:
            note_fallback(self, str(reason))
            return super().forward(hidden_states, residual)  # type: ignore[misc, no-any-return]
        y = ffn(hidden_states, up.weight, up.bias, down.weight, down.bias, activation, backend=self.fastattn_backend)
        return F.dropout(y, p=self.hidden_dropout, training=self.training) + residual


# ---- which classes ---------------------------------------------------------------------------------------------------


_ATTENTION, _BLOCK, _MLP = (
    original("models.mpt.modeling_mpt", f"{name}.forward") for name in ("MptAttention", "MptBlock", "MptMLP")
)


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward is a copy of one of these."""
    for forward, mixin, recipe in (
        (_ATTENTION, MptAttention, _attention_recipe),
        (_BLOCK, MptBlock, _block_recipe),
        (_MLP, MptMLP, _mlp_recipe),
    ):
        if is_copy(module_class.forward, forward):
            return Reading(mixin, recipe)
    return None


def _attention_recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(
        swapped,
        kernels={"attention": "attention", "linears": "linear (Wqkv, out_proj)"},
        takes=("self", "hidden_states", "position_bias", "cache", "attention_mask", "kwargs"),
        children=always(*((name, "linears", why_not_linear) for name in ("Wqkv", "out_proj"))),
        core="attention",
    )


def _block_recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(
        swapped,
        kernels={"attention": "(hands output_attentions on)"},
        takes=(
            "self",
            "hidden_states",
            "position_bias",
            "attention_mask",
            "layer_past",
            "use_cache",
            "output_attentions",
            "kwargs",
        ),
    )


def _mlp_recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(
        swapped,
        kernels={"ffns": "ffn"},
        takes=("self", "hidden_states", "residual"),
        children=always(
            ("up_proj", "ffns", why_not_linear),
            ("act", "ffns", why_not_activation),
            ("down_proj", "ffns", why_not_linear),
        ),
    )
