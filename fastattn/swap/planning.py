"""What would be swapped in a model, and why the rest would not. Nothing is changed here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from fastattn import dispatch
from fastattn.integrations import why_not_transformers
from fastattn.swap.originals import why_unknown
from fastattn.swap.recipe import AS_FAST, Recipe
from fastattn.swap.recipes import recipe_for
from fastattn.swap.report import Row
from fastattn.swap.swapped import Swapped

# Class names that promise something a recipe could take over, per part.
_LOOKS_LIKE = {
    "attention": re.compile(r"Attention"),
    "norms": re.compile(r"(Layer|RMS|Rms)_?Norm"),
    "ffns": re.compile(r"(MLP|Mlp|FeedForward|FFN|Ffn|DenseActDense|DenseGatedActDense|Intermediate|Experts)$"),
}


@dataclass(frozen=True)
class Target:
    """A module to swap: its path, the recipe, and the parts that the swapped class takes over."""

    path: str
    module: nn.Module
    recipe: Recipe
    parts: frozenset[str]


@dataclass
class Decision:
    """One row; `target` is None where the module is left as it is. is_guess: nothing but its class's name speaks for
    it."""

    row: Row
    module: nn.Module
    target: Target | None = None
    is_guess: bool = False


def decide(model: nn.Module, asked: frozenset[str], backend: str | None = None) -> list[Decision]:
    """A decision for each module that a recipe knows, or that looks as if one should. Shared modules are met once.
    backend: the one that calls will be forced to."""
    paths: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
        modules[id(module)] = module
    decisions = [
        decision for key, module in modules.items() if (decision := _decide_one(module, paths[key], asked)) is not None
    ]
    if not (backend or dispatch.forced):
        _leave_without_kernels(decisions)
    _mark_fused(decisions)
    return _innermost(decisions)


def _decide_one(module: nn.Module, paths: list[str], asked: frozenset[str]) -> Decision | None:
    try:
        return _decide(module, paths, asked)
    except Exception as error:  # of reading the module: a child or an attribute that its class promises is missing
        row = Row(path=paths[0], class_name=type(module).__name__, action="left")
        row.reason = f"it could not be read: {type(error).__name__}: {error}"
        return Decision(row, module)


def _decide(module: nn.Module, paths: list[str], asked: frozenset[str]) -> Decision | None:
    module_class = type(module)
    row = Row(path=paths[0], class_name=module_class.__name__, action="left")
    if issubclass(module_class, Swapped):
        row.asked = False
        row.reason = "swapped before"
        return Decision(row, module)
    recipe = recipe_for(module_class)
    if recipe is None:
        return _decide_unknown(module, row, asked)
    misfit = recipe.misfit(module)
    if misfit is not None:
        promised = asked.intersection(_parts_by_name(module_class))
        if not promised or misfit == AS_FAST:
            return None
        return _left(module, row, misfit if promised.intersection(recipe.kernels) else _no_recipe(module_class))
    parts = recipe.parts(asked)
    if not parts:
        row.asked = False
        row.reason = "turned off: " + ", ".join(f"{part}=False" for part in recipe.kernels if part not in asked)
        return Decision(row, module)
    reasons = recipe.reasons_to_leave(module)
    if reasons:
        row.reason = "; ".join(reasons)
        return Decision(row, module)
    row.action = "swap"
    row.kernel = recipe.kernel_of(module, parts)
    remarks = recipe.children_called(module, parts)
    if len(paths) > 1:
        remarks.append("also at " + ", ".join(paths[1:]))
    row.reason = "; ".join(remarks)
    return Decision(row, module, Target(row.path, module, recipe, parts))


def _decide_unknown(module: nn.Module, row: Row, asked: frozenset[str]) -> Decision | None:
    """A row for a module that looks swappable though no recipe knows its class, None for any other."""
    module_class = type(module)
    for base in module_class.__mro__[1:]:
        of_base = recipe_for(base) if issubclass(base, nn.Module) else None
        if of_base is not None and of_base.parts(asked) and of_base.misfit(module) is None:
            row.reason = f"only the exact class {base.__name__} is swapped, this is a subclass of it"
            return Decision(row, module)
    if not asked.intersection(_parts_by_name(module_class)):
        return None
    return _left(module, row, _no_recipe(module_class))


def _no_recipe(module_class: type[nn.Module]) -> str:
    known = why_unknown(module_class.forward)
    return f"no recipe for class {module_class.__name__}" + ("" if known is None else f": {known}")


def _left(module: nn.Module, row: Row, reason: str) -> Decision:
    """A module for whose row its class's name alone speaks, but where a too old transformers is why it is left."""
    too_old = why_not_transformers() if type(module).__module__.startswith("transformers.") else None
    row.reason = too_old or reason
    return Decision(row, module, is_guess=too_old is None)


def _parts_by_name(module_class: type[nn.Module]) -> list[str]:
    return [part for part, pattern in _LOOKS_LIKE.items() if pattern.search(module_class.__name__)]


def _leave_without_kernels(decisions: list[Decision]) -> None:
    """Modules on a GPU that no backend has kernels for: the reference would run them, slower than they run now."""
    there = [d for d in decisions if d.target is not None and any(p.is_cuda for p in d.module.parameters())]
    if not there:
        return
    reason = dispatch.why_no_kernels_on_gpus()
    if reason is None:
        return
    for decision in there:
        decision.row.action, decision.row.kernel, decision.row.reason = "left", "", reason
        decision.target = None


def _mark_fused(decisions: list[Decision]) -> None:
    """Children whose work a swapped parent does itself are not swapped on their own."""
    read = {
        id(child)
        for decision in decisions
        if decision.target is not None
        for child in decision.target.recipe.children_read(decision.module, decision.target.parts)
    }
    for decision in decisions:
        if decision.target is not None and id(decision.module) in read:
            decision.row.action, decision.row.kernel = "fused", ""
            decision.row.reason = "part of its parent's kernel"
            decision.target = None


def _innermost(decisions: list[Decision]) -> list[Decision]:
    """Drops containers that only look swappable (BertAttention) where something inside them is decided on."""
    kept = []
    for decision in decisions:
        prefix = decision.row.path + "." if decision.row.path else ""
        inner = [other for other in decisions if other is not decision and other.row.path.startswith(prefix)]
        same_part = any(set(_parts_by_name(type(decision.module))) & _parts_of(other) for other in inner)
        if not (decision.is_guess and same_part):
            kept.append(decision)
    return kept


def _parts_of(decision: Decision) -> set[str]:
    module_class = type(decision.module)
    original = module_class.fastattn_original if issubclass(module_class, Swapped) else module_class
    recipe = recipe_for(original)
    return set(recipe.kernels) if recipe is not None else set(_parts_by_name(original))
