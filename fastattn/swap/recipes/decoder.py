"""Decoders of transformers that are built as Llama is: RMSNorm, a gated feed-forward block, attention by the interface.

Each family's file derives its classes from these and the originals; their forwards differ in names at most, which the
recipes check.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.functional import gated_ffn, rms_norm
from fastattn.nn.checks import why_not_input, why_not_linear, why_not_tensor
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.sublayers import child_reason
from fastattn.swap.recipe import Recipe
from fastattn.swap.recipes.shared import activation_name
from fastattn.swap.swapped import Swapped


class RootMeanSquareNorm(Swapped):
    """weight * x / sqrt(mean(x^2) + eps), x (..., N). The original rounds half tensors once more, before the weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        note_call(self)
        own: Any = self
        reason = why_not_input(hidden_states) or why_not_tensor("weight", own.weight)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(hidden_states)  # type: ignore[misc, no-any-return]
        wide = torch.promote_types(hidden_states.dtype, own.weight.dtype)  # of the product in the original
        x, weight = hidden_states.to(wide), own.weight.to(wide)
        return rms_norm(x, weight, own.variance_epsilon, backend=self.fastattn_backend)


class GatedMLP(Swapped):
    """down_proj(act(gate_proj(x)) * up_proj(x)), x (..., hidden)."""

    def forward(self, x: Tensor) -> Tensor:
        note_call(self)
        own: Any = self
        gate, up, down = own.gate_proj, own.up_proj, own.down_proj
        activation = activation_name(own.act_fn)
        reason = (
            why_not_input(x)
            or child_reason("gate_proj", why_not_linear(gate))
            or child_reason("up_proj", why_not_linear(up))
            or child_reason("down_proj", why_not_linear(down))
            or (None if activation is not None else "act_fn has no kernel")
        )
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(x)  # type: ignore[misc, no-any-return]
        return gated_ffn(
            x,
            gate.weight,
            up.weight,
            down.weight,
            activation,
            gate.bias,
            up.bias,
            down.bias,
            backend=self.fastattn_backend,
        )


def attention_recipe(swapped: type[Swapped], takes: tuple[str, ...] = ()) -> Recipe:
    """takes: the parameters of the original forward, where they are not those that most families have."""
    return Recipe(swapped, kernels={"attention": "attention"}, takes=takes or ATTENTION_TAKES, interface=True)


def norm_recipe(swapped: type[Swapped], takes: tuple[str, ...] = ("self", "hidden_states")) -> Recipe:
    return Recipe(swapped, kernels={"norms": "rms_norm"}, takes=takes)


def mlp_recipe(swapped: type[Swapped]) -> Recipe:
    projections = ("gate_proj", "up_proj", "down_proj")
    return Recipe(
        swapped,
        kernels={"ffns": "gated_ffn"},
        takes=("self", "x"),
        children=tuple((name, "ffns", why_not_linear) for name in projections),
        refuse=_refuse_mlp,
    )


ATTENTION_TAKES = ("self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values", "kwargs")


def _refuse_mlp(module: nn.Module) -> list[str]:
    if activation_name(module.act_fn) is not None:
        return []
    return [f"the activation {getattr(module.act_fn, '__name__', type(module.act_fn).__name__)} has no kernel"]
