"""Gemma of transformers, the first one.

GemmaAttention   the original forward, attention through the interface, on the config that swap copied
GemmaRMSNorm     rms_norm, whose weight is stored less 1
GemmaMLP         gated_ffn
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.gemma import modeling_gemma

from fastattn.functional import rms_norm
from fastattn.nn.checks import why_not_input, why_not_tensor
from fastattn.nn.counting import note_call, note_fallback
from fastattn.swap.recipes.decoder import GatedMLP, attention_recipe, mlp_recipe, norm_recipe
from fastattn.swap.recipes.shared import InterfaceAttention
from fastattn.swap.swapped import Swapped


class GemmaAttention(InterfaceAttention, modeling_gemma.GemmaAttention):
    fastattn_original = modeling_gemma.GemmaAttention


class GemmaRMSNorm(Swapped, modeling_gemma.GemmaRMSNorm):
    """(1 + weight) * x / sqrt(mean(x^2) + eps) in x's dtype, x (..., N)."""

    fastattn_original = modeling_gemma.GemmaRMSNorm

    def forward(self, x: Tensor) -> Tensor:
        note_call(self)
        reason = why_not_input(x) or why_not_tensor("weight", self.weight)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(x)
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.to(torch.float32)
        return rms_norm(x, weight, self.eps, offset=1.0, backend=self.fastattn_backend)


class GemmaMLP(GatedMLP, modeling_gemma.GemmaMLP):
    fastattn_original = modeling_gemma.GemmaMLP


_ALL_RECIPES = (attention_recipe(GemmaAttention), norm_recipe(GemmaRMSNorm, ("self", "x")), mlp_recipe(GemmaMLP))

RECIPES = {recipe.original: recipe for recipe in _ALL_RECIPES}
