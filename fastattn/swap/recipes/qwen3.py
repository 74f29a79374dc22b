"""Qwen3 of transformers. Its norms of queries and keys are norms of head_dim features.

Qwen3Attention   the original forward, attention through the interface, on the config that swap copied
Qwen3RMSNorm     rms_norm
Qwen3MLP         gated_ffn
"""

from __future__ import annotations

from transformers.models.qwen3 import modeling_qwen3

from fastattn.swap.recipes.decoder import GatedMLP, RootMeanSquareNorm, attention_recipe, mlp_recipe, norm_recipe
from fastattn.swap.recipes.shared import InterfaceAttention


class Qwen3Attention(InterfaceAttention, modeling_qwen3.Qwen3Attention):
    fastattn_original = modeling_qwen3.Qwen3Attention


class Qwen3RMSNorm(RootMeanSquareNorm, modeling_qwen3.Qwen3RMSNorm):
    fastattn_original = modeling_qwen3.Qwen3RMSNorm


class Qwen3MLP(GatedMLP, modeling_qwen3.Qwen3MLP):
    fastattn_original = modeling_qwen3.Qwen3MLP


_ALL_RECIPES = (attention_recipe(Qwen3Attention), norm_recipe(Qwen3RMSNorm), mlp_recipe(Qwen3MLP))

RECIPES = {recipe.original: recipe for recipe in _ALL_RECIPES}
