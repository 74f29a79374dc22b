"""Interleaved timing: every round calls each variant once, so that a slow minute of the machine hits all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastattn.cli.demo.model import Batch

SETTINGS = ((8, 360), (32, 128), (32, 32), (8, 64), (1, 360), (1, 16))
"""(batch, tokens): long and short, many and one."""


@dataclass(frozen=True)
class Effort:
    """How long to time a setting: at least `rounds` rounds, then on until `seconds` are over or `most` is reached."""

    rounds: int = 9
    seconds: float = 4.0
    most: int = 150
    warm_up: int = 2


@dataclass
class Timing:
    """Times of one setting in ms per batch, one per round and variant; `notes` says why a variant has none."""

    batch: int
    length: int
    samples: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.length}"

    def median(self, variant: str) -> float | None:
        return float(np.median(self.samples[variant])) if self.samples.get(variant) else None

    def quartiles(self, variant: str) -> tuple[float, float] | None:
        if not self.samples.get(variant):
            return None
        low, high = np.percentile(self.samples[variant], [25, 75])
        return float(low), float(high)

    def speedup(self, over: str) -> float | None:
        """How many times faster fastattn is than another variant, by medians."""
        ours, theirs = self.median("fastattn"), self.median(over)
        return None if ours is None or theirs is None else theirs / ours

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"batch": self.batch, "length": self.length}
        for variant in self.samples:
            row[f"{variant}_ms"] = self.median(variant)
            row[f"{variant}_iqr_ms"] = self.quartiles(variant)
        row |= {f"speedup_vs_{v}": self.speedup(v) for v in self.samples if v != "fastattn"}
        row["rounds"] = max((len(times) for times in self.samples.values()), default=0)
        row["notes"] = self.notes
        return row


def time_setting(
    models: Mapping[str, Any], batch: Batch, effort: Effort, step: Callable[[str], object] = lambda _: None
) -> Timing:
    """Times each model on one batch. A model whose warm-up raises gets a note and no times."""
    size, length = batch.input_ids.shape
    timing = Timing(size, length, {name: [] for name in models})
    running = []
    with torch.no_grad():
        for name, model in models.items():
            step(f"{size}x{length} warm-up: {name}")
            try:
                for _ in range(effort.warm_up):
                    batch.run(model)
            except Exception as error:  # torch.compile raises what its compiler raises: anything
                if name != "compile":
                    raise
                timing.notes[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            else:
                running.append(name)
        draw = random.Random(0)
        start = time.perf_counter()
        for number in range(effort.most):
            step(f"{size}x{length}")
            for name in draw.sample(running, len(running)):
                began = time.perf_counter()
                batch.run(models[name])
                timing.samples[name].append(1e3 * (time.perf_counter() - began))
            if number + 1 >= effort.rounds and time.perf_counter() - start > effort.seconds:
                break
    return timing
