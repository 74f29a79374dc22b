"""Chooses the backend of each call and says why the others do not run it.

The first backend of `order` that is available and has no reason against the problem runs. Passing over an available
one, or the first one where this machine lacks it, is a fallback: counted in `fallbacks`, warned about once per reason,
and logged for every new problem under FASTATTN_LOG=1. A backend forced by `use_backend`, FASTATTN_BACKEND or backend=
never falls back.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.errors import NotSupported
from fastattn.locks import Lock
from fastattn.problems import FEW_QUERIES, AttentionProblem, Problem

_TRITON_ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"

ORDER: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda", "triton", "reference"),
    "cpu": ("cpu", "triton", "reference") if _TRITON_ON_CPU else ("cpu", "reference"),
}
NAMES = ("cuda", "cpu", "triton", "reference")

FASTER: dict[tuple[str, int], tuple[str, ...]] = {
    # Triton multiplies by wgmma there, and the CUDA kernel by mma.sync: 1.3 to 1.6 times as fast on an H100.
    ("attention", 9): ("triton", "cuda", "reference"),
    # Unmeasured. Triton multiplies by tcgen05, and mma.sync falls further behind it than behind wgmma.
    ("attention", 10): ("triton", "cuda", "reference"),
}
"""Per operation and major compute capability, the order that was measured to be faster than ORDER's."""

FIRST_TRITON = ("triton", "cuda", "reference")
"""On every GPU the order of decoding, of attention of few queries, which is that, and of attention with gradients:
Triton's kernels were measured on one, the CUDA ones were not. Those run where Triton is missing, and where they are
asked for."""

fallbacks: Counter[tuple[str, str, str]] = Counter()
"""How often each (op, backend, reason) sent a call on to the next backend."""

_FORGET_AT = 4096  # remembered choices; shapes may vary without end
_LOG = logging.getLogger("fastattn")


class BackendWarning(UserWarning):
    """A call runs on a slower backend than its device's first one, or a module on the code that it was to replace."""


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a problem. `reasons` holds, per backend, why not: nothing for the chosen one, and for those
    after it that could run the problem too."""

    problem: Problem
    chosen: str | None
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.problem.op}: {self.chosen or 'no backend'} runs {self.problem}"]
        for name, why in self.reasons.items():
            could = "runs it" if name == self.chosen else f"could run it, but {self.chosen} comes first"
            lines.append(f"  {name}: {'; '.join(why) or could}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Choice:
    backend: Any
    fallbacks: tuple[tuple[str, str, str], ...]


_choices: dict[tuple[Any, ...], _Choice] = {}
_modules: dict[str, Any] = {}
_warned: set[tuple[str, ...]] = set()


def check_backend_name(name: str, argument: str = "backend") -> str:
    """`name` itself; ValueError, naming the argument, where no backend has it. The empty string chooses
    automatically."""
    if name and name not in NAMES:
        known = ", ".join(map(repr, NAMES))
        otherwise = "pass None" if argument == "backend" else "leave it unset"
        raise ValueError(f"{argument}={name!r} is unknown: pass one of {known}, or {otherwise} to choose automatically")
    return name


forced: str = check_backend_name(os.environ.get("FASTATTN_BACKEND", ""), "FASTATTN_BACKEND")
"""The backend every call uses unless it passes its own; empty chooses. Set by `use_backend`, for the whole process."""

_blocks: list[list[str]] = [[forced]]
"""The backend of the environment, and that of each `use_backend` block that has not ended, the newest last."""

_blocks_lock = Lock()  # outside of it `forced` is the newest block's


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block every call of the process, in all threads, runs on this backend; None chooses automatically.

    A call that the backend refuses raises NotSupported. ValueError for an unknown name. Blocks nest.
    """
    global forced
    block = [check_backend_name(name or "")]
    with _alone():
        _blocks.append(block)
        forced = _blocks[-1][0]
    try:
        yield
    finally:
        # Blocks of several threads need not end in the order in which they began.
        with _alone():
            del _blocks[next(i for i, other in enumerate(_blocks) if other is block)]
            forced = _blocks[-1][0]


def _alone() -> AbstractContextManager[object]:
    """The lock of the blocks. torch.compile has no way to take one, and runs a block while it traces."""
    return nullcontext() if torch.compiler.is_compiling() else _blocks_lock


def backends() -> dict[str, str | None]:
    """Each backend's name with None where this machine can use it, else the reason why not."""
    return {name: _unavailable(name) for name in NAMES}


@functools.cache
def why_no_kernels_on_gpus() -> str | None:
    """None where a backend has kernels for the GPUs of this machine, else why none has: the reference alone would run,
    slower than torch's own code."""
    verdicts = {name: _unavailable(name) for name in ORDER["cuda"] if name != "reference"}
    if None in verdicts.values():
        return None
    return "no kernels run on this GPU: " + "; ".join(f"{name}: {why}" for name, why in verdicts.items())


def order(problem: Problem) -> tuple[str, ...]:
    """The backends that may run a problem, the one that should first."""
    names = ORDER.get(problem.device_type, ("reference",))
    if problem.device_type != "cuda":
        return names
    if problem.op == "attention_decode":
        return FIRST_TRITON
    if isinstance(problem, AttentionProblem):
        is_decoding = problem.len_q <= FEW_QUERIES and not problem.packed  # see fastattn.backends.few
        if problem.requires_grad or is_decoding:
            return FIRST_TRITON
    return FASTER.get((problem.op, _capability()), names)


@functools.cache
def _capability() -> int:
    """The major compute capability of the GPUs, the lowest where they differ; 0 without one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return min((torch.cuda.get_device_capability(index)[0] for index in range(count)), default=0)


def explain_problem(problem: Problem, backend: str = "") -> Explanation:
    """Which backend runs this problem, and why each other does not: those in question in their order, then the rest.

    A backend that this machine lacks is also asked what it had against the problem where it is.
    """
    tried = _candidates(problem, backend)
    reasons = {name: _all_reasons(name, problem) for name in (*tried, *(n for n in NAMES if n not in tried))}
    chosen = next((name for name in tried if not reasons[name]), None)
    for name in reasons:
        if backend and name != backend:
            reasons[name].append(f"the backend {backend!r} is forced")
        elif name not in tried and not reasons[name]:
            reasons[name].append(f"it is never chosen for {problem.device_type} tensors")
    return Explanation(problem, chosen, reasons)


def choose(make_problem: Callable[..., Problem], fields: tuple[Any, ...], backend: str) -> Any:
    """The backend module that runs `make_problem(*fields)`; remembered per fields, so that a call costs one lookup.

    Raises NotSupported, with all reasons, where `backend` is forced and refuses or no backend is left.
    """
    key = (make_problem, backend, fields)
    choice = _choices.get(key)
    if choice is None:
        if len(_choices) >= _FORGET_AT:
            _choices.clear()
        choice = _choices[key] = _choose(make_problem(*fields), backend)
    if choice.fallbacks:
        fallbacks.update(choice.fallbacks)
    return choice.backend


def _choose(problem: Problem, backend: str) -> _Choice:
    passed: dict[str, list[str]] = {}
    for name in _candidates(problem, backend):
        why = _reasons(name, problem)
        if not why:
            return _Choice(_module(name), _report(problem, name, passed))
        passed[name] = why
    raise NotSupported(problem.op, problem, passed)


def _candidates(problem: Problem, backend: str) -> tuple[str, ...]:
    return (backend,) if backend else order(problem)


def _reasons(name: str, problem: Problem) -> list[str]:
    unavailable = _unavailable(name)
    if unavailable is not None:
        return [unavailable]
    return list(_module(name).not_supported_reasons(problem))


def _all_reasons(name: str, problem: Problem) -> list[str]:
    unavailable = _unavailable(name)
    try:
        against = list(_module(name).not_supported_reasons(problem))
    except ImportError:
        against = []
    return against if unavailable is None else [unavailable, *against]


def _report(problem: Problem, chosen: str, passed: dict[str, list[str]]) -> tuple[tuple[str, str, str], ...]:
    """The fallbacks behind a choice, warned about and logged. A missing backend counts where it is its device's
    first."""
    first = order(problem)[0]
    found = tuple(
        (problem.op, name, reason)
        for name, why in passed.items()
        if name == first or _unavailable(name) is None
        for reason in why
    )
    for op, name, reason in found:
        _tell(op, name, chosen, reason, problem)
    return found


def forbid_fallback(op: str, chosen: str, reason: str) -> None:
    """NotSupported where a backend is forced, and something else would run."""
    if forced:
        raise NotSupported(op, f"{chosen} would run it", {forced: [reason]})


def note_fallback(op: str, passed: str, chosen: str, reason: str) -> None:
    """Counts a fallback that was decided above the backends, and warns of it once."""
    if torch.compiler.is_compiling():
        return
    fallbacks[(op, passed, reason)] += 1
    _tell(op, passed, chosen, reason)


def _tell(op: str, passed: str, chosen: str, reason: str, problem: Problem | None = None) -> None:
    """The log line of a fallback, under FASTATTN_LOG=1, and its warning, once per reason."""
    log("%s: %s runs instead of %s: %s; %s", op, chosen, passed, reason, problem or "")
    warn_once((op, passed, reason), f"{op} falls back from backend {passed!r} to {chosen!r}: {reason}")


def log(text: str, *values: object) -> None:
    """A line of the logger "fastattn" under FASTATTN_LOG=1."""
    if os.environ.get("FASTATTN_LOG") == "1":
        _LOG.warning(text, *values)


def warn_once(key: tuple[str, ...], text: str) -> None:
    """A BackendWarning, the first time for this key, at the line outside of fastattn and torch that led here."""
    if key in _warned:
        return
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("fastattn", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(f"fastattn: {text}", BackendWarning, stacklevel=level)
    _warned.add(key)  # not where the warning was made an error


def _unavailable(name: str) -> str | None:
    try:
        module = _module(name)
    except ImportError as error:
        return f"fastattn.backends.{name} cannot be imported: {error}"
    reason: str | None = module.unavailable_reason()
    return reason


def _module(name: str) -> Any:
    module = _modules.get(name)
    if module is None:
        module = _modules[name] = importlib.import_module(f"fastattn.backends.{name}")
    return module
