"""Additive attention biases: pure descriptions and their lowering."""

from __future__ import annotations

from fastattn.biases.dense import Dense

__all__ = ["Dense"]
