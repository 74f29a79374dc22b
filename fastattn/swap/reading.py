"""What a recipe that recognises classes finds in one, and what its swapped forwards share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from fastattn.nn.checks import holds_its_own_forward
from fastattn.nn.counting import note_fallback
from fastattn.swap.expression import Spelling
from fastattn.swap.recipe import Recipe
from fastattn.swap.swapped import Swapped

FLAGGED = "its flags are those of another branch"


@dataclass(frozen=True)
class Reading:
    """A class whose forward a recipe knows.

    mixin        its forward stands for that of the class.
    attributes   class attributes of the swapped class, by which the mixin knows the names in this class.
    recipe       the recipe of the swapped class.
    built_on     other classes whose forwards and recipes it was made with.
    """

    mixin: type[Swapped]
    recipe: Callable[[type[Swapped]], Recipe]
    attributes: dict[str, Any] = field(default_factory=dict)
    built_on: tuple[type[nn.Module], ...] = ()


class ReadMethods(Swapped):
    """Base of the mixins that stand for more than the forward of their original."""

    fastattn_methods: ClassVar[dict[str, Callable[..., Any]]]
    """The methods of the original that were read."""
    fastattn_bases: ClassVar[tuple[tuple[type[nn.Module], Callable[..., Any]], ...]] = ()
    """The classes whose forward they call as super().forward(...), and that forward."""


class ReadForward(ReadMethods):
    """Base of the mixins that stand for forwards of any spelling.

    Whatever a mixin adds begins with fastattn: any other name may be that of a child in some class. The swapped class
    gets a forward that takes what its original takes, by position or name, and hands it to fastattn_forward.
    """

    def fastattn_forward(self, *inputs: Any) -> Any:
        """The forward, its inputs in the original's order."""
        raise NotImplementedError


def spelled_as(spelling: Spelling) -> dict[str, Any]:
    """The class attributes of a swapped class whose original has this spelling."""
    return {
        "fastattn_methods": spelling.methods,
        "fastattn_bases": tuple((base, base.forward) for base in spelling.bases),
        "forward": _forward_that_takes(spelling.inputs),
    }


def _forward_that_takes(names: tuple[str, ...]) -> Callable[..., Any]:
    """A method of these parameters, as dataclasses make theirs: tools that look at a signature find the original's."""
    listed, scope = ", ".join(names), dict[str, Any]()
    exec(f"def forward(self, {listed}):\n    return self.fastattn_forward({listed})", scope)
    forward: Callable[..., Any] = scope["forward"]
    return forward


def why_not_as_read(module: Any) -> str | None:
    """None where the methods of the original class are those that were read: other libraries replace them, too."""
    for name, method in module.fastattn_methods.items():
        if is_replaced(module, name, method):
            return f"its {name} was replaced"
    for base, forward in getattr(module, "fastattn_bases", ()):
        if base.forward is not forward:
            return f"the forward of {base.__name__} was replaced"
    return None


def unless_replaced(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A mixin's forward that stands aside where the original class has another one by now."""

    @functools.wraps(forward)
    def forward_or_original(self: Any, *args: Any, **kwargs: Any) -> Any:
        reason = why_not_as_read(self)
        if reason is None:
            return forward(self, *args, **kwargs)
        note_fallback(self, reason)
        return self.fastattn_original.forward(self, *args, **kwargs)

    return forward_or_original


def is_replaced(module: Any, name: str, method: object) -> bool:
    """Whether something else stands in the place of a method that was read, on the module or in its original class."""
    on_module = name in module.__dict__ and not (name == "forward" and holds_its_own_forward(module))
    return on_module or getattr(module.fastattn_original, name) is not method


def calls_forward_as_it_is(original: type[nn.Module]) -> bool:
    """Whether calling a module of the class does its forward and nothing more."""
    plain = all(
        getattr(original, name) is getattr(nn.Module, name) for name in ("__call__", "_call_impl", "__getattr__")
    )
    return plain and original.__getattribute__ is object.__getattribute__


def classes_beside(module_class: type[nn.Module]) -> list[type[nn.Module]]:
    """The classes of modules in the file of this class."""
    found = vars(sys.modules[module_class.__module__]).values()
    return [each for each in found if isinstance(each, type) and issubclass(each, nn.Module)]


def attribute(module: nn.Module, name: str | float) -> Any:
    """A constant of a forward, or the attribute of the module that it names."""
    return getattr(module, name) if isinstance(name, str) else name
