"""Qwen2 of transformers, Qwen2.5 too.

Qwen2Attention   the original forward, attention through the interface, on the config that swap copied
Qwen2RMSNorm     rms_norm
Qwen2MLP         gated_ffn
"""

from __future__ import annotations

from transformers.models.qwen2 import modeling_qwen2

from fastattn.swap.recipes.decoder import GatedMLP, RootMeanSquareNorm, attention_recipe, mlp_recipe, norm_recipe
from fastattn.swap.recipes.shared import InterfaceAttention


class Qwen2Attention(InterfaceAttention, modeling_qwen2.Qwen2Attention):
    fastattn_original = modeling_qwen2.Qwen2Attention


class Qwen2RMSNorm(RootMeanSquareNorm, modeling_qwen2.Qwen2RMSNorm):
    fastattn_original = modeling_qwen2.Qwen2RMSNorm


class Qwen2MLP(GatedMLP, modeling_qwen2.Qwen2MLP):
    fastattn_original = modeling_qwen2.Qwen2MLP


_ALL_RECIPES = (attention_recipe(Qwen2Attention), norm_recipe(Qwen2RMSNorm), mlp_recipe(Qwen2MLP))

RECIPES = {recipe.original: recipe for recipe in _ALL_RECIPES}
