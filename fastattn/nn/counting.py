"""Calls and fallbacks of fastattn's modules: forbidden, warned about, and counted while a report asks for it.

One process-wide variable holds the reports that count. A swapped forward looks at it in eager mode only: read inside a
compiled graph it would be guarded, and every `with report.counting():` would recompile the model.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from fastattn import dispatch
from fastattn.errors import NotSupported
from fastattn.locks import Lock
from fastattn.nn.fused import Fused


@dataclass
class Tally:
    """What happened to one module: forwards run, and parts of a forward left to the original code, by reason: those
    that no kernel takes, and those for which torch's own was found to be as fast."""

    calls: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    choices: Counter[str] = field(default_factory=Counter)


# Replaced, never changed: a forward in another thread sees the old tuple or the new one.
_counting: tuple[dict[int, Tally], ...] = ()
_lock = Lock()


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


def note_call(module: Fused) -> None:
    """A module ran its forward."""
    if torch.compiler.is_compiling():
        return
    for tally in _tallies(module):
        with _lock:
            tally.calls += 1


def note_choice(module: Fused, reason: str) -> None:
    """A module left part of its forward to the original code because that is as fast."""
    if torch.compiler.is_compiling():
        return
    for tally in _tallies(module):
        with _lock:
            tally.choices[reason] += 1


def note_fallback(module: Fused, reason: str) -> None:
    """A module leaves part of its forward to the original code. Warned once per class and reason.

    Raises NotSupported where that is forbidden: a backend is forced, or the swap was strict.
    """
    name = type(module).__name__
    backend = module.fastattn_backend or dispatch.forced
    if backend:
        raise NotSupported(name, "original code would run", {backend: [reason]})
    if module.fastattn_strict:
        raise NotSupported(
            name, "original code would run", {"swap(strict=True)": [reason]}, "Swap with strict=False to allow that."
        )
    if torch.compiler.is_compiling():
        return
    for tally in _tallies(module):
        with _lock:
            tally.fallbacks[reason] += 1
    dispatch.log("%s: original code runs: %s", name, reason)
    dispatch.warn_once((name, reason), f"{name} runs original code where {reason}")


def _tallies(module: Fused) -> list[Tally]:
    if not _counting:
        return []
    counted = module.fastattn_replica_of or id(module)
    return [tallies[counted] for tallies in _counting if counted in tallies]
