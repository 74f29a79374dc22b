"""A recipe: how one class of modules is swapped."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn

from fastattn.nn.checks import holds_its_own_forward
from fastattn.swap.swapped import Swapped

PARTS = ("attention", "norms", "ffns", "linears")
Check = Callable[[Any], "str | None"]
AS_FAST = "torch's kernel is as fast"
Child = tuple[str, str, Check]


def _nothing(module: nn.Module) -> list[Any]:
    return []


def _never(module: nn.Module) -> bool:
    return False


def _no_reason(module: nn.Module) -> None:
    return None


def _child(module: nn.Module, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), module)


def always(*children: Child) -> Callable[[nn.Module], tuple[Child, ...]]:
    """The same children for every module of the class."""
    return lambda module: children


def parameters(method: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a method's parameters. Not by inspect.signature, which evaluates annotations from Python 3.14 on."""
    code: CodeType = inspect.unwrap(method).__code__
    count = code.co_argcount + code.co_kwonlyargcount
    for flag in (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS):
        count += bool(code.co_flags & flag)
    return code.co_varnames[:count]


@dataclass(frozen=True)
class Recipe:
    """Swaps modules whose class is exactly `swapped.fastattn_original`.

    kernels     part (of PARTS) -> what the swapped forward runs for it.
    takes       parameter names of the original forward that the swapped one stands for; another version of the
                library may have others, and is left alone. None where the forward itself was read, or is called.
    children    of a module, (name, part, check): children, or children of those by a path with dots, whose tensors the
                swapped forward reads for that part, where check allows it. An activation may be a function.
    misfit      why a module of the class is not what its forward looks like, None where it is: no business of a swap,
                which speaks of it only where the class's name promises more, and not where AS_FAST is why.
    refuse      why a module must be left alone; empty when it need not.
    core        the part without which the original forward runs whole; None where each part stands alone.
    whole       the swapped forward does all its parts in one call: with a part turned off the module is left alone.
    interface   the attention comes through the transformers attention interface: the config must name it.
    named       what the swapped forward of a module runs, where that is not the same for all of the class.
    weighs      whether the attention of a module of the class gives its weights to who asks for them.
    """

    swapped: type[Swapped]
    kernels: dict[str, str]
    takes: tuple[str, ...] | None = None
    children: Callable[[nn.Module], Iterable[Child]] = _nothing
    misfit: Callable[[nn.Module], str | None] = _no_reason
    refuse: Callable[[nn.Module], list[str]] = _nothing
    core: str | None = None
    whole: bool = False
    interface: bool = False
    named: Callable[[nn.Module], str] | None = None
    weighs: Callable[[nn.Module], bool] = _never

    @property
    def original(self) -> type[nn.Module]:
        return self.swapped.fastattn_original

    def parts(self, asked: frozenset[str]) -> frozenset[str]:
        """What the swapped forward takes over of the parts asked for."""
        known = frozenset(self.kernels)
        taken = asked & known
        lacks = (self.core is not None and self.core not in taken) or (self.whole and taken != known)
        return frozenset() if lacks else taken

    def kernel_of(self, module: nn.Module, parts: frozenset[str]) -> str:
        """What the swapped forward of a module runs for these parts."""
        if self.named is not None:
            return self.named(module)
        return " + ".join(dict.fromkeys(kernel for part, kernel in self.kernels.items() if part in parts))

    def reasons_to_leave(self, module: nn.Module) -> list[str]:
        """Why this module, of the recipe's class, cannot be swapped; empty when it can."""
        found = parameters(self.original.forward)
        reasons = []
        if self.takes is not None and found != self.takes:
            reasons.append(f"its forward takes {', '.join(found)}; the recipe knows {', '.join(self.takes)}")
        if "forward" in module.__dict__ and not holds_its_own_forward(module):
            reasons.append("its forward is replaced on the instance (by an offloading hook, say): swap before that")
        return reasons + self.refuse(module)

    def children_called(self, module: nn.Module, parts: frozenset[str]) -> list[str]:
        """Children, with the reason, that the swapped forward would call as they are now instead of reading them."""
        found = [(name, check(_child(module, name))) for name, part, check in self.children(module) if part in parts]
        return [f"{name} {reason}" for name, reason in found if reason is not None]

    def children_read(self, module: nn.Module, parts: frozenset[str]) -> list[Any]:
        """Children whose work the swapped forward does itself."""
        return [_child(module, name) for name, part, _ in self.children(module) if part in parts]
