"""Experts of transformers' mixtures in other layouts than `experts`: gpt-oss, Aria, Nemotron-H and more.

Their weights may lie transposed, with biases, with no gate or an interleaved one, with a norm behind; what is between
the two products is the class's own function. For the implementations that transformers chooses by itself, flags say
all of it. In inference on a CPU the two linears of each expert run on the kernel, over its rows; what is between them,
and behind, is called for all rows at once, as the original does.

Measured against `grouped_mm`, experts of 1,024 x 1,024, 2 of 8 for each of 1 to 256 tokens (one core of an AMD EPYC of
Zen 5 with AVX-512, 2026-11-28): gpt-oss's and Aria's, which lie transposed, 1.1 to 2.0 times as fast in float32, 1.1 to
2.4 in bfloat16 up to 20 rows for an expert, and 20 to 200 in float16; Nemotron-H's 1.2 to 1.8, 1.2 to 1.7 up to 24
rows, and 1.3 to 5.8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.functional import linear_act
from fastattn.swap.expression import Input, Spelling
from fastattn.swap.reading import FLAGGED, Reading, spelled_as
from fastattn.swap.recipe import AS_FAST, Recipe, parameters
from fastattn.swap.recipes import free_linear
from fastattn.swap.recipes.experts import (
    MISFIT,
    Experts,
    added_up,
    eager_of,
    flag,
    is_large,
    may_gain,
    rows_of_experts,
    why_not_called,
)
from fastattn.swap.swapped import Swapped

_BY_FLAGS = ("batched_mm", "grouped_mm")
_FLAGS = ("has_gate", "has_bias", "is_transposed")


class GeneralExperts(Experts):
    """sum over a token's experts of w * down(between(up(x))), x (tokens, N), their indices and w (tokens, k)."""

    def fastattn_why_not(self, x: Any, index: Any, scale: Any) -> str | None:
        reason = why_not_called(self, _names(self), _BY_FLAGS, x, index, scale)
        if reason is not None:
            return reason
        up, down = _weights(self)
        hidden = up.shape[1] // 2 if flag(self, "has_gate") else up.shape[1]
        biases = [self._parameters[name].shape for name in _names(self)[2:]]  # type: ignore[union-attr]
        fit = down.shape[::2] == (len(up), hidden) and biases in ([], [up.shape[:2], down.shape[:2]])
        return None if fit and up.shape[2:] == x.shape[1:] else MISFIT

    def fastattn_is_faster(self, x: Tensor, index: Tensor) -> bool:
        up, down = _weights(self)
        few = free_linear.few_rows(up[0]) * 5 // 6  # on the average: some experts have more rows than others
        return may_gain(x, index, (up, down), few) and _are_large(up, down)

    def fastattn_run(self, x: Tensor, index: Tensor, scale: Tensor) -> Tensor | None:
        """Both linears of each expert over its rows; None where an index is none of an expert."""
        up, down = _weights(self)
        up_bias, down_bias = (self._parameters[name] for name in _names(self)[2:]) if self.has_bias else (None, None)
        sorted_rows = rows_of_experts(x, index, len(up))
        if sorted_rows is None:
            return None
        order, rows = sorted_rows
        if not rows:
            return x * 0.0
        hidden = torch.cat([self._fastattn_linear(row, up, up_bias, expert) for expert, row in rows])
        between = self._apply_gate(hidden) if flag(self, "has_gate") else self.act_fn(hidden)
        pieces = between.split([len(row) for _, row in rows])
        y = torch.cat(
            [
                self._fastattn_linear(piece, down, down_bias, expert)
                for (expert, _), piece in zip(rows, pieces, strict=True)
            ]
        )
        if flag(self, "has_post_expert_norm"):
            y = self.post_expert_norm(y)
        return added_up(y, order, scale).to(x.dtype)

    def _fastattn_linear(self, x: Tensor, weights: Tensor, biases: Tensor | None, expert: int) -> Tensor:
        bias = None if biases is None else biases[expert]
        return linear_act(x, weights[expert], bias, backend=self.fastattn_backend)


def _names(module: Any) -> tuple[str, ...]:
    """Its parameters: the first weight and the last, and their biases if there are any."""
    names = "gate_up_proj" if flag(module, "has_gate") else "up_proj", "down_proj"
    return (*names, *(f"{name}_bias" for name in names)) if module.has_bias else names


def _weights(module: Any) -> tuple[Tensor, Tensor]:
    """The first weights and the last ones, (experts, out features, in features) each, views where they lie
    transposed."""
    up, down = (module._parameters[name] for name in _names(module)[:2])
    return (up.mT, down.mT) if module.is_transposed else (up, down)


def _are_large(up: Tensor, down: Tensor) -> bool:
    """Whether each linear of an expert is."""
    return is_large(up.dtype, min(up[0].numel(), down[0].numel()))


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class behind transformers' interface of experts."""
    eager = eager_of(module_class)
    names = () if eager is None else parameters(eager)[1:]
    if len(names) != 3:
        return None
    return Reading(GeneralExperts, _recipe, spelled_as(Spelling(Input(0), names, {"forward": module_class.forward})))


def _recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(swapped, kernels={"ffns": "two linears of each expert"}, misfit=_misfit)


def _misfit(module: nn.Module) -> str | None:
    """Why it has not the weights that its flags promise, large, on a CPU, or runs not what they say."""
    if any(type(flag(module, name)) is not bool for name in _FLAGS):
        return FLAGGED
    if any(not isinstance(module._parameters.get(name), Tensor) for name in _names(module)):
        return f"its {', '.join(_names(module))} are not its weights"
    if flag(module, "has_post_expert_norm") and not callable(getattr(module, "post_expert_norm", None)):
        return "it has no post_expert_norm"
    up, down = _weights(module)
    if not (up.dim() == down.dim() == 3 and len(up) > 0 and len(down) > 0):
        return f"its {', '.join(_names(module))} are not the weights of all experts"
    if not (up.is_cpu and down.is_cpu) or not free_linear.is_measured(up.dtype) or not _are_large(up, down):
        return AS_FAST
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return None if implementation in _BY_FLAGS else f"its config asks for the experts of {implementation}"
