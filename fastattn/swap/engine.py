"""plan and swap: classes are assigned, configs copied, and both given back by the report's undo."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastattn.dispatch import backends, check_backend_name
from fastattn.errors import NotSupported
from fastattn.nn.checks import holds_its_own_forward
from fastattn.swap.configs import ConfigMove, config_moves
from fastattn.swap.planning import Decision, Target, decide
from fastattn.swap.recipe import PARTS
from fastattn.swap.report import NotSwapped, SwapReport


def plan(
    model: nn.Module,
    *,
    attention: bool = True,
    norms: bool = True,
    ffns: bool = True,
    linears: bool = True,
    backend: str | None = None,
    strict: bool = False,
) -> SwapReport:
    """What `swap` with the same arguments would do; changes nothing."""
    decisions = _checked_decisions(model, (attention, norms, ffns, linears), backend, strict)
    return SwapReport(type(model).__name__, [decision.row for decision in decisions], applied=False)


def swap(
    model: nn.Module,
    *,
    attention: bool = True,
    norms: bool = True,
    ffns: bool = True,
    linears: bool = True,
    backend: str | None = None,
    strict: bool = False,
) -> SwapReport:
    """Makes the modules of `model` that a recipe knows run on fastattn kernels, in place.

    Parameters, state_dict keys, hooks and sharing stay as they are: only classes are assigned (and a config that names
    its attention implementation is replaced, in this model, by a copy that names fastattn's).

    attention, norms, ffns: which parts to take over. linears: projections (q, k, v and output of attention, and on a
    CPU large linears of any kind, where the kernel was found faster than torch's).
    backend: the name of the backend that every call is forced to; None lets dispatch choose per call, and leaves to
        torch what it was measured to do as fast: small LayerNorms on a CPU, plain attention where cuDNN runs it on
        Hopper.
    strict: swap everything that was asked for, or nothing; and a call that would run original code all the same,
        because of its input or of a hook that came later, raises NotSupported. So it does where a backend is forced.

    Returns the report; print it, and call its undo() to get the original model back.
    Raises TypeError if model is not an nn.Module, ValueError for an unknown backend, NotSupported for one that is not
    usable here, and NotSwapped (a NotSupported) where strict and something asked for would run original code.
    """
    decisions = _checked_decisions(model, (attention, norms, ffns, linears), backend, strict)
    targets = [decision.target for decision in decisions if decision.target is not None]
    change = _Change(model, targets, backend, strict)
    change.apply()
    for decision in decisions:
        if decision.target is not None:
            decision.row.action = "swapped"
    return SwapReport(
        type(model).__name__,
        [decision.row for decision in decisions],
        applied=True,
        swapped_modules={target.path: target.module for target in targets},
        _model=model,
        _undo=change.undo,
    )


def _checked_decisions(
    model: nn.Module, flags: tuple[bool, bool, bool, bool], backend: str | None, strict: bool
) -> list[Decision]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _check_backend(backend)
    decisions = decide(model, frozenset(part for part, on in zip(PARTS, flags, strict=True) if on), backend)
    original = {decision.row.path: [decision.row.reason] for decision in decisions if _runs_original_code(decision)}
    if strict and original:
        raise NotSwapped("swap", type(model).__name__, original)
    return decisions


def _check_backend(backend: str | None) -> None:
    if backend is None:
        return
    reason = backends()[check_backend_name(backend)]
    if reason is not None:
        raise NotSupported("swap", "every call of the model", {backend: [reason]})


def _runs_original_code(decision: Decision) -> bool:
    """Something asked for would not run on a kernel: a module left alone, or a child that would be called."""
    target = decision.target
    if target is not None:
        return bool(target.recipe.children_called(target.module, target.parts))
    return decision.row.asked and decision.row.action == "left"


@dataclass(frozen=True)
class _Set:
    """The class that a swap sets, the one that it replaces, and what it writes on the module. Nothing of the recipe: a
    report is saved with a model that holds it."""

    path: str
    module: nn.Module
    original: type[nn.Module]
    swapped: type[nn.Module]
    state: dict[str, Any]

    def apply(self) -> None:
        if holds_its_own_forward(self.module):
            del self.module.forward
        object.__setattr__(self.module, "__class__", self.swapped)  # whatever the class does with attributes
        self.module.__dict__.update(self.state)

    def undo(self) -> None:
        if holds_its_own_forward(self.module):
            del self.module.forward
        object.__setattr__(self.module, "__class__", self.original)
        for name in self.state:
            self.module.__dict__.pop(name, None)


_FX_LEAF = "torch.nn (fastattn)"
"""What modules of torch.nn call their home once they are swapped: torch.fx asks the instance, and calls what begins
with "torch.nn" as it is, where it would otherwise trace through kernels. "torch.nn." would be too much: Dynamo guards
less of torch's own modules."""


def _set(target: Target, backend: str | None, strict: bool) -> _Set:
    recipe = target.recipe
    off = frozenset(recipe.kernels) - target.parts
    state = {
        "fastattn_off": off or None,
        "fastattn_backend": backend,
        "fastattn_strict": strict or None,
        "fastattn_forms_weights": recipe.weighs(target.module) or None,
        "__module__": _FX_LEAF if recipe.original.__module__.startswith("torch.nn.") else None,
    }
    written = {name: value for name, value in state.items() if value is not None}
    return _Set(target.path, target.module, recipe.original, recipe.swapped, written)


class _Change:
    """The classes and configs that one swap sets."""

    def __init__(self, model: nn.Module, targets: list[Target], backend: str | None, strict: bool) -> None:
        self.classes = [_set(target, backend, strict) for target in targets]
        self.moves = config_moves(model, [t.module for t in targets if t.recipe.interface and "attention" in t.parts])

    def apply(self) -> None:
        """Sets all of them, or, where a module refuses its class, none."""
        with contextlib.ExitStack() as taken_back:
            for each in self._all():
                each.apply()
                taken_back.callback(each.undo)
            taken_back.pop_all()

    def undo(self) -> None:
        self._check_unchanged()
        for each in self._all():
            each.undo()

    def _all(self) -> list[_Set | ConfigMove]:
        return [*self.classes, *self.moves]

    def _check_unchanged(self) -> None:
        for each in self.classes:
            found = type(each.module)
            if found is not each.swapped:
                raise RuntimeError(
                    f"undo: {each.path or 'the model'} is now a {found.__module__}.{found.__qualname__}, not the "
                    "class that swap set; undo what changed it first (nothing was undone)"
                )
            if "forward" in each.module.__dict__ and not holds_its_own_forward(each.module):
                raise RuntimeError(
                    f"undo: the forward of {each.path or 'the model'} was replaced on the instance since the swap; "
                    "undo that first (nothing was undone)"
                )
        for move in self.moves:
            for holder in move.holders:
                if holder.config is not move.new:
                    raise RuntimeError(
                        f"undo: a {type(holder).__name__} has another config than the one that swap set; put it back "
                        "first (nothing was undone)"
                    )
