"""Before anything is timed: does the swapped model give the original's answers?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.cli.demo.model import Batch, embed, nearest


@dataclass(frozen=True)
class Agreement:
    """The swapped model beside the original, over all passages.

    max_abs_diff: largest difference of a last hidden state on valid tokens, swapped against eager. sdpa_diff: the same
    for torch's own sdpa, as a yardstick. all_called: every swapped module ran and none fell back to original code.
    """

    max_abs_diff: float
    sdpa_diff: float
    embedding_diff: float
    neighbours_agree: bool
    neighbours_differing: int
    all_called: bool
    examples: list[tuple[int, int]]


def _states(model: Any, batches: list[Batch]) -> list[Tensor]:
    with torch.no_grad():
        return [batch.run(model) for batch in batches]


def difference(found: list[Tensor], expected: list[Tensor], batches: list[Batch]) -> float:
    """Largest |found - expected| on valid tokens; inf where anything there is NaN."""
    worst = 0.0
    for a, b, batch in zip(found, expected, batches, strict=True):
        gap = float((a - b).abs()[batch.attention_mask.bool()].max())
        worst = max(worst, math.inf if math.isnan(gap) else gap)
    return worst


def compare(eager: Any, sdpa: Any, swapped: Any, report: Any, batches: list[Batch]) -> Agreement:
    """Runs all batches through the three models."""
    original, torch_own = _states(eager, batches), _states(sdpa, batches)
    with report.counting():
        fused = _states(swapped, batches)

    def embeddings(states: list[Tensor]) -> Tensor:
        return torch.cat([embed(s, b.attention_mask) for s, b in zip(states, batches, strict=True)])

    before, after = embeddings(original), embeddings(fused)
    lists, found = nearest(before), nearest(after)
    differing = int((lists != found).any(dim=1).sum())
    return Agreement(
        max_abs_diff=difference(fused, original, batches),
        sdpa_diff=difference(torch_own, original, batches),
        embedding_diff=float((before - after).abs().max()),
        neighbours_agree=differing == 0,
        neighbours_differing=differing,
        all_called=report.all_called,
        examples=[(i, int(found[i, 0])) for i in range(len(found))],
    )
