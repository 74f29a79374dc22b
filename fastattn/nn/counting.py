"""Calls and fallbacks of swapped modules, counted while a report asks for it.

One process-wide variable holds the reports that count. A swapped forward looks at it in eager mode only: read inside a
compiled graph it would be guarded, and every `with report.counting():` would recompile the model.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class Tally:
    """What happened to one module: forwards run, and parts of a forward left to the original code, by reason."""

    calls: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)


# Replaced, never changed: a forward in another thread sees the old tuple or the new one.
_counting: tuple[dict[int, Tally], ...] = ()
_lock = threading.Lock()
_warned: set[tuple[str, str]] = set()


def start(tallies: dict[int, Tally]) -> None:
    """Counts into `tallies` (keyed by id of the module) until `stop` is called with the same object."""
    global _counting
    with _lock:
        _counting = (*_counting, tallies)


def stop(tallies: dict[int, Tally]) -> None:
    """Ends what `start` began."""
    global _counting
    with _lock:
        _counting = tuple(other for other in _counting if other is not tallies)


def note_call(module: nn.Module) -> None:
    """A swapped module ran its forward."""
    if torch.compiler.is_compiling():
        return
    if _counting:
        with _lock:
            for tallies in _counting:
                if id(module) in tallies:
                    tallies[id(module)].calls += 1


def note_fallback(module: nn.Module, reason: str) -> None:
    """A swapped module left part of its forward to the original code. Warned once per class and reason."""
    if torch.compiler.is_compiling():
        return
    with _lock:
        for tallies in _counting:
            if id(module) in tallies:
                tallies[id(module)].fallbacks[reason] += 1
        kind = (type(module).__name__, reason)
        first = kind not in _warned
        _warned.add(kind)
    if first:
        warnings.warn(f"fastattn: a swapped {kind[0]} runs original code where {reason}", stacklevel=3)
