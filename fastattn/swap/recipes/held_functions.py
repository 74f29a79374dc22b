"""Attention of classes whose forward calls a function that the module holds, and that calls torch's:

    self.attend = attention_function()                                    in __init__
    output = self.attend(q, k, v, mask=mask, dropout_p=p)                 in forward

torch's scaled_dot_product_attention itself may be held, too. The forward is copied with another name in the place of
the attribute's: a property, which gives a copy of the function that the module holds at that moment, made as
sdpa_copies makes copies. What cannot be copied so, another function that was set since say, is called as it is.

__init__ is read for the attributes' names alone. Whether such a function is there is seen of the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any, ClassVar

from torch import nn

from fastattn.graphs import constant
from fastattn.swap.reading import Reading
from fastattn.swap.recipe import Recipe
from fastattn.swap.recipes.sdpa import CallsSDPA, attend, copy_of, counted, reached_methods, why_replaced
from fastattn.swap.recipes.sdpa_copies import (
    THEIRS,
    TORCHS,
    codes,
    instructions,
    locals_of,
    names_it,
    names_own,
    renamed,
    with_code,
)
from fastattn.swap.swapped import Swapped

_HELD = "fastattn_held_"


class HoldsFunction(CallsSDPA):
    """Base of the swapped classes."""

    fastattn_holds: ClassVar[tuple[str, ...]]
    """The attributes that may be such a function."""


def read(original: type[nn.Module]) -> Reading | None:
    """The reading of a class whose __init__ sets an attribute to what may be such a function, and whose forward, or a
    method that it calls, loads that."""
    methods = reached_methods(original)
    names = (
        tuple(dict.fromkeys(name for name in _set_in_init(original) if not hasattr(original, name))) if methods else ()
    )
    loading = {
        method: own
        for method, function in methods.items()
        if (own := [name for name in names if any(name in code.co_names for code in codes(function.__code__))])
    }
    if not loading or not all(_loads_its_own(methods[method], own) for method, own in loading.items()):
        return None
    attributes: dict[str, Any] = {}
    for method, own in loading.items():
        function = methods[method]
        attributes[method] = with_code(function, renamed(function.__code__, {name: _HELD + name for name in own}))
        attributes |= {_HELD + name: _property(name) for name in own}
    forward = counted(attributes.get("forward", methods["forward"]))
    attributes |= {"forward": forward, "fastattn_methods": methods, "fastattn_holds": names}
    return Reading(HoldsFunction, _recipe, attributes)


def _recipe(swapped: type[Swapped]) -> Recipe:
    def misfit(module: nn.Module) -> str | None:
        for name in swapped.fastattn_holds:  # type: ignore[attr-defined]
            value = module.__dict__.get(name)
            if value is TORCHS or (isinstance(value, FunctionType) and _is_copied(value)):
                return None
        return f"it holds no function that calls {THEIRS}"

    return Recipe(swapped, kernels={"attention": THEIRS}, misfit=misfit)


# ---- what is held ----------------------------------------------------------------------------------------------------


def _property(name: str) -> property:
    """What stands in a forward for self.name."""

    def held(self: nn.Module) -> Any:
        value = getattr(self, name)
        if value is TORCHS:
            return attend
        if not isinstance(value, FunctionType) or not _is_copied(value):
            return value
        return value.fastattn_copy.function  # type: ignore[attr-defined]

    return property(held)


@constant
def _is_copied(function: FunctionType) -> bool:
    """Whether the function has a copy, which it keeps, for it may be made anew with every module. Where a function that
    it calls was replaced since, it is copied again."""
    known = function.__dict__.get(_COPY, _UNKNOWN)
    if known is _UNKNOWN or (known is not None and why_replaced((known,)) is not None):
        known = function.__dict__[_COPY] = copy_of(function)
    return known is not None


_COPY = "fastattn_copy"
_UNKNOWN: Any = object()


# ---- reading a class -------------------------------------------------------------------------------------------------


def _set_in_init(original: type[nn.Module]) -> Iterator[str]:
    """The attributes that a statement of an __init__ sets which names torch's function, or a function in whose code
    that is named, or an argument that is one by default."""
    for base in original.__mro__[: original.__mro__.index(nn.Module)]:
        init = vars(base).get("__init__")
        if not isinstance(init, FunctionType):
            continue
        own, by_default = init.__code__.co_varnames[:1], _defaults(init)
        is_named, before = False, tuple[str, ...]()
        for step in instructions(init.__code__):
            loaded = locals_of(step, "LOAD")
            if step.opname == "STORE_ATTR" and is_named and before[-1:] == own:
                yield step.argval
            if step.opname.startswith(("STORE_", "POP_TOP")):
                is_named = False
            elif step.opname == "LOAD_GLOBAL":
                is_named = is_named or _leads_to_it(init.__globals__.get(step.argval))
            elif step.opname != "LOAD_CONST":
                is_named = is_named or step.argval == THEIRS
            is_named = is_named or any(_leads_to_it(by_default.get(name)) for name in loaded)
            before = loaded


def _defaults(function: FunctionType) -> dict[str, object]:
    code = function.__code__
    positional = code.co_varnames[: code.co_argcount]
    given = function.__defaults__ or ()
    return dict(zip(positional[len(positional) - len(given) :], given, strict=True)) | (function.__kwdefaults__ or {})


def _leads_to_it(value: object) -> bool:
    return value is TORCHS or (isinstance(value, FunctionType) and names_it(value.__code__))


def _loads_its_own(method: FunctionType, names: list[str]) -> bool:
    """Whether these names are always those of attributes of the method's first argument, in its own code."""
    code = method.__code__
    inner = list(codes(code))[1:]
    if hasattr(method, "__wrapped__") or any(name in each.co_names for name in names for each in inner):
        return False
    is_set = any(code.co_varnames[0] in locals_of(step, "STORE") for step in instructions(code))
    return not is_set and all(names_own(code, name) for name in names)
