"""The linears of `spelled_linear` that belong to no block: as those of torch in `free_linear`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fastattn.nn.counting import note_call, note_fallback
from fastattn.swap.expression import spellings_of
from fastattn.swap.reading import ReadForward, Reading, spelled_as, why_not_as_read
from fastattn.swap.recipe import Recipe
from fastattn.swap.recipes import free_linear
from fastattn.swap.recipes.spelled_linear import is_spelled_linear
from fastattn.swap.swapped import Swapped


class SpelledLinear(ReadForward, free_linear.FreeLinear):
    """x W^T + b; x (..., K)."""

    def fastattn_forward(self, x: Any) -> Tensor:
        reason = why_not_as_read(self) or _why_not_dtype(self._parameters.get("weight"), x)
        if reason is None:
            return free_linear.FreeLinear.fastattn_forward(self, x)
        note_call(self)
        note_fallback(self, reason)
        return self.fastattn_original.forward(self, x)  # type: ignore[no-any-return]


def _why_not_dtype(weight: object, x: object) -> str | None:
    if not isinstance(weight, Tensor) or not isinstance(x, Tensor) or weight.dtype is x.dtype:
        return None
    return "its weight is of another dtype than the input"


def read(original: type[nn.Module]) -> Reading | None:
    """The reading of a class that is such a linear."""
    if not is_spelled_linear(original):
        return None
    return Reading(SpelledLinear, _recipe, spelled_as(spellings_of(original)[0]))


def _recipe(swapped: type[Swapped]) -> Recipe:
    return replace(free_linear.recipe(swapped), takes=None)
