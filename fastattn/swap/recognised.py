"""Swapped classes of classes that a recipe recognises by what their forward computes.

They are made when a module of the class is first met, and are attributes of this file by the path of their original, so
that a swapped model that was saved whole finds them in a process that never called swap.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import FunctionType
from typing import Any

from torch import nn

from fastattn.integrations import why_not_transformers
from fastattn.swap.reading import Reading, ReadMethods, calls_forward_as_it_is, unless_replaced
from fastattn.swap.recipe import Recipe
from fastattn.swap.recipes import (
    either_way,
    feedforward,
    flagged_glu,
    free_spelled_linear,
    held_functions,
    in_order,
    norm,
    processors,
    sequences,
    written_out,
)


@dataclass(frozen=True)
class _Remembered:
    methods: dict[str, object]
    recipe: Recipe | None
    built_on: tuple[tuple[type[nn.Module], object, Recipe | None], ...] = ()

    def still_holds(self, original: type[nn.Module]) -> bool:
        """Whether no library has replaced a method that was read since."""
        own = all(getattr(original, name, None) is method for name, method in self.methods.items())
        return own and all(
            other.forward is forward and recipe_for(other) is recipe for other, forward, recipe in self.built_on
        )


_remembered: dict[Any, _Remembered] = {}


def recipe_for(original: type[nn.Module]) -> Recipe | None:
    """The recipe for exactly this class, or None where nothing recognises its forward.

    Where a library has replaced a method since the class was read, it is read again.
    """
    known = _remembered.get(original)
    if known is None or not known.still_holds(original):
        known = _remembered[original] = _read(original)
    return known.recipe


def _read(original: type[nn.Module]) -> _Remembered:
    methods: dict[str, object] = {"forward": getattr(original, "forward", None)}
    if callable(methods["forward"]) and _can_be_derived_from(original):
        for read in _readers(original):
            reading = read(original)
            if reading is not None:
                methods |= reading.attributes.get("fastattn_methods", {})
                above = (base for base, _ in reading.attributes.get("fastattn_bases", ()))
                others = tuple((other, other.forward, recipe_for(other)) for other in (*reading.built_on, *above))
                return _Remembered(methods, reading.recipe(_swapped_class(reading, original)), others)
    # Which of its methods a recipe would know, nothing says.
    methods |= {name: value for name, value in vars(original).items() if isinstance(value, FunctionType)}
    return _Remembered(methods, None)


def _readers(original: type[nn.Module]) -> list[Callable[[type[nn.Module]], Reading | None]]:
    readers: list[Callable[[type[nn.Module]], Reading | None]] = []
    if calls_forward_as_it_is(original):
        readers += [norm.read, feedforward.read, sequences.read, flagged_glu.read, in_order.read]
        readers += [free_spelled_linear.read]
    if "transformers" in sys.modules and _is_of_transformers(original) and why_not_transformers() is None:
        readers.append(import_module("fastattn.swap.recipes.transformers").read)
    return [*readers, either_way.read, processors.read, written_out.read, held_functions.read]


def _is_of_transformers(original: type[nn.Module]) -> bool:
    """A class of transformers, or one that asks its interfaces for attention or experts: model code that comes with a
    checkpoint."""
    codes = [getattr(forward, "__code__", None) for forward in (original.forward, inspect.unwrap(original.forward))]
    interfaces = {"get_interface", "ALL_ATTENTION_FUNCTIONS", "ALL_EXPERTS_FUNCTIONS"}
    asks = any(code is not None and not interfaces.isdisjoint(code.co_names) for code in codes)
    return asks or original.__module__.startswith("transformers.")


def _can_be_derived_from(original: type[nn.Module]) -> bool:
    """Whether making a subclass has no effect but that. The hook of transformers' layers expects more subclasses.

    Classes of torch itself are known by name, but for Sequential; those that it makes (parametrised, sharded) it wants
    to find as they are.
    """
    if original.__module__.startswith("torch.") and original is not nn.Sequential:
        return False
    watching = [base for base in original.__mro__[:-1] if "__init_subclass__" in vars(base)]
    return type(original) is type and all(base.__module__.startswith("transformers.") for base in watching)


def _swapped_class(reading: Reading, original: type[nn.Module]) -> Any:
    own: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": _path(original),
        "__doc__": f"A swapped {original.__module__}.{original.__qualname__}.",
        "fastattn_original": original,
        **reading.attributes,
    }
    if not issubclass(reading.mixin, ReadMethods):
        own["fastattn_methods"] = {"forward": original.forward, **own.get("fastattn_methods", {})}
        makes_its_own = "forward" in own or reading.mixin.forward is nn.Module.forward
        if not makes_its_own and not reading.mixin.fastattn_runs_original:
            own["forward"] = unless_replaced(reading.mixin.forward)
    return type(original.__name__, (reading.mixin, original), own)


# ---- found again by name ---------------------------------------------------------------------------------------------


def _path(original: type) -> str:
    """transformers/models/llama/modeling_llama:LlamaMLP. Without a dot, at which pickle would cut it."""
    return f"{original.__module__}:{original.__qualname__}".replace(".", "/")


def __getattr__(name: str) -> Any:
    module_path, colon, class_path = name.partition(":")
    if not colon:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: Any = import_module(module_path.replace("/", "."))
    for part in class_path.split("/"):
        found = getattr(found, part)
    recipe = recipe_for(found)
    if recipe is None:  # no AttributeError: pickle would leave its words out
        raise ImportError(
            f"{found.__module__}.{found.__qualname__} was swapped when this was saved; in the installed version its "
            "forward is another one, which no recipe recognises: install the version it was saved with"
        )
    return recipe.swapped
