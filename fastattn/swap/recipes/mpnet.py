"""MPNet of transformers, whose attention asks no interface: sentence embeddings (all-mpnet-base-v2) are made with it.

MPNetSelfAttention   q, k, v and o as linears; attention with the encoder's position bias and padding mask

The other parts of a layer are recognised by `feedforward` (MPNetIntermediate) and `norm` (MPNetOutput).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastattn.functional import attention
from fastattn.nn.checks import why_not_dropout, why_not_head_dim, why_not_input, why_not_linear
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.sublayers import child_reason
from fastattn.swap.code import is_copy
from fastattn.swap.originals import original
from fastattn.swap.reading import Reading
from fastattn.swap.recipe import Recipe, always
from fastattn.swap.recipes.eager_mask import compact
from fastattn.swap.recipes.linear import linear, split_heads
from fastattn.swap.swapped import Swapped


class MPNetSelfAttention(Swapped):
    """hidden_states (B, S, hidden); attention_mask and position_bias (1|B, H, S, S) are added to the scores.

    Asked for attention weights (output_attentions=True) it runs the original, which forms them.
    """

    # What the original holds.
    dropout: nn.Dropout
    attention_head_size: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        note_call(self)
        reason = why_not_input(hidden_states, self.fastattn_backend) or child_reason(
            "dropout", why_not_dropout(self.dropout)
        )
        reason = reason or why_not_head_dim(self.attention_head_size)
        if output_attentions:
            reason = reason or "the attention weights are asked for (output_attentions=True)"
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states, attention_mask, position_bias, output_attentions, **kwargs
            )
        projected = (linear(self, name, hidden_states, "linears") for name in ("q", "k", "v"))
        q, k, v = (split_heads(x, self.attention_head_size) for x in projected)
        out = attention(
            q,
            k,
            v,
            mask=None if attention_mask is None else compact(attention_mask),
            bias=position_bias,
            dropout_p=self.dropout.p if self.dropout.training else 0.0,
            backend=self.fastattn_backend,
        )
        return (linear(self, "o", out.transpose(1, 2).flatten(2), "linears"),)


_ATTENTION = original("models.mpnet.modeling_mpnet", "MPNetSelfAttention.forward")


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward is a copy of this one."""
    if not is_copy(module_class.forward, _ATTENTION):
        return None
    return Reading(MPNetSelfAttention, _recipe)


def _recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(
        swapped,
        kernels={"attention": "attention", "linears": "linear (q, k, v, o)"},
        takes=("self", "hidden_states", "attention_mask", "position_bias", "output_attentions", "kwargs"),
        children=always(
            *((name, "linears", why_not_linear) for name in ("q", "k", "v", "o")),
            ("dropout", "attention", why_not_dropout),
        ),
        core="attention",
    )
