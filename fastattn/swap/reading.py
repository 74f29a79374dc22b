"""What a recipe that reads forwards finds in a class, and what its swapped forwards share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from fastattn.swap.recipe import Recipe
from fastattn.swap.swapped import Swapped


@dataclass(frozen=True)
class Reading:
    """A class whose forward a recipe knows.

    mixin        its forward stands for that of the class.
    attributes   class attributes of the swapped class, by which the mixin knows the names in this class.
    recipe       the recipe of the swapped class.
    """

    mixin: type[Swapped]
    recipe: Callable[[type[Swapped]], Recipe]
    attributes: dict[str, object] = field(default_factory=dict)


class ReadForward(Swapped):
    """Base of the mixins that stand for forwards of any spelling.

    Whatever a mixin adds but `forward` begins with fastattn: any other name may be that of a child in some class.
    """

    fastattn_inputs: ClassVar[tuple[str, ...]]
    """What the original forward calls the tensors that it takes."""


def inputs_of(module: ReadForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The tensors of a call in order; None where the original forward would not take it."""
    names = module.fastattn_inputs
    if len(args) == len(names) and not kwargs:
        return args
    if len(args) + len(kwargs) != len(names) or any(name not in kwargs for name in names[len(args) :]):
        return None
    return (*args, *(kwargs[name] for name in names[len(args) :]))


def attribute(module: nn.Module, name: str | float) -> Any:
    """A constant of a forward, or the attribute of the module that it names."""
    return getattr(module, name) if isinstance(name, str) else name
