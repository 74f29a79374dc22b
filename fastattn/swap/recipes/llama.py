"""Llama of transformers, and what is loaded as it.

LlamaAttention   the original forward, attention through the interface, on the config that swap copied
LlamaRMSNorm     rms_norm
LlamaMLP         gated_ffn
"""

from __future__ import annotations

from transformers.models.llama import modeling_llama

from fastattn.swap.recipes.decoder import GatedMLP, RootMeanSquareNorm, attention_recipe, mlp_recipe, norm_recipe
from fastattn.swap.recipes.shared import InterfaceAttention


class LlamaAttention(InterfaceAttention, modeling_llama.LlamaAttention):
    fastattn_original = modeling_llama.LlamaAttention


class LlamaRMSNorm(RootMeanSquareNorm, modeling_llama.LlamaRMSNorm):
    fastattn_original = modeling_llama.LlamaRMSNorm


class LlamaMLP(GatedMLP, modeling_llama.LlamaMLP):
    fastattn_original = modeling_llama.LlamaMLP


_ALL_RECIPES = (attention_recipe(LlamaAttention), norm_recipe(LlamaRMSNorm), mlp_recipe(LlamaMLP))

RECIPES = {recipe.original: recipe for recipe in _ALL_RECIPES}
