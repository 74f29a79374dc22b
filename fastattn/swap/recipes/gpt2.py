"""GPT-2 of transformers: its attention through the interface. Its LayerNorms are torch.nn's.

Its projections are Conv1D, whose weights lie transposed; they and the feed-forward block stay as they are.
"""

from __future__ import annotations

from transformers.models.gpt2 import modeling_gpt2

from fastattn.swap.recipes.decoder import attention_recipe
from fastattn.swap.recipes.shared import InterfaceAttention


class GPT2Attention(InterfaceAttention, modeling_gpt2.GPT2Attention):
    fastattn_original = modeling_gpt2.GPT2Attention


_TAKES = (
    "self",
    "hidden_states",
    "past_key_values",
    "attention_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "output_attentions",
    "kwargs",
)

RECIPES = {GPT2Attention.fastattn_original: attention_recipe(GPT2Attention, _TAKES)}
