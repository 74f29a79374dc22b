"""Additive attention biases: pure descriptions and their lowering."""

from __future__ import annotations

from fastattn.biases.base import Bias
from fastattn.biases.dense import Dense
from fastattn.biases.distance import ALiBi, RelativeBias, T5Bias
from fastattn.biases.lowered import LoweredBias

__all__ = ["ALiBi", "Bias", "Dense", "LoweredBias", "RelativeBias", "T5Bias"]
