"""Mistral of transformers.

MistralAttention   the original forward, attention through the interface, on the config that swap copied
MistralRMSNorm     rms_norm
MistralMLP         gated_ffn
"""

from __future__ import annotations

from transformers.models.mistral import modeling_mistral

from fastattn.swap.recipes.decoder import GatedMLP, RootMeanSquareNorm, attention_recipe, mlp_recipe, norm_recipe
from fastattn.swap.recipes.shared import InterfaceAttention


class MistralAttention(InterfaceAttention, modeling_mistral.MistralAttention):
    fastattn_original = modeling_mistral.MistralAttention


class MistralRMSNorm(RootMeanSquareNorm, modeling_mistral.MistralRMSNorm):
    fastattn_original = modeling_mistral.MistralRMSNorm


class MistralMLP(GatedMLP, modeling_mistral.MistralMLP):
    fastattn_original = modeling_mistral.MistralMLP


_ALL_RECIPES = (attention_recipe(MistralAttention), norm_recipe(MistralRMSNorm), mlp_recipe(MistralMLP))

RECIPES = {recipe.original: recipe for recipe in _ALL_RECIPES}
