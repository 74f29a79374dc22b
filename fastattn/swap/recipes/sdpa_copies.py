"""Copies of code that calls torch's scaled_dot_product_attention, with another name in that function's place.

A copy is made where the name plainly stands for torch's function. Functions of the same package that the code calls by
name are copied with it, where they call torch's function in their turn; so is the way through diffusers' registry of
attention backends.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, CellType, CodeType, FunctionType
from typing import Any

from torch.nn import functional as F

THEIRS = "scaled_dot_product_attention"
_OURS = "_fastattn_"
"""Before a name: what torch.nn.functional, and the modules that copied code is from, get for the copies to find."""
_DEPTH = 2
"""Functions that call functions: how far they are followed."""
NOT_CODE = ("CACHE", "EXTENDED_ARG", "PUSH_NULL", "PRECALL")

Attend = Callable[..., Any]

TORCHS = F.scaled_dot_product_attention
"""torch's own function, unless another took its place before fastattn was imported: nothing is copied then."""


@dataclass(frozen=True)
class Copied:
    """A copy, and the functions that were copied with it: where they stand, under which name, and what they were."""

    function: FunctionType
    through: tuple[tuple[dict[str, Any], str, object], ...] = ()


def copied(function: FunctionType, attend: Attend, depth: int = _DEPTH) -> Copied | None:
    """The function with `attend` in the place of torch's; None where it does not call that, or not plainly. Of one that
    is decorated what it wraps is copied, and called as before."""
    inner = _wrapped(function)
    if inner is not None and not names_it(function.__code__):
        copy = copied(inner, attend, depth)
        return None if copy is None else Copied(_wrapping(function, inner, copy.function), copy.through)
    code, scope = function.__code__, function.__globals__
    names: dict[str, str] = {}
    if names_it(code):
        if not _calls_torchs(code, scope):
            return None
        names[THEIRS] = _OURS + THEIRS
        setattr(F, _OURS + THEIRS, attend)
        if scope.get(THEIRS) is TORCHS:
            scope[_OURS + THEIRS] = attend
    through: list[tuple[dict[str, Any], str, object]] = []
    for name in _functions_named(code) if depth else ():
        value = scope.get(name)
        if not isinstance(value, FunctionType) or value is function or not _is_beside(value, function):
            continue
        other = _of_registry(value, attend) or copied(value, attend, depth - 1)
        if other is not None:
            names[name] = _OURS + name
            scope[_OURS + name] = other.function
            through += [(scope, name, value), *other.through]
    return Copied(with_code(function, renamed(code, names)), tuple(through)) if names else None


def layers(function: FunctionType) -> Iterator[FunctionType]:
    """A function, and what it wraps where it is decorated."""
    layer: FunctionType | None = function
    while layer is not None:
        yield layer
        layer = _wrapped(layer)


def _wrapped(function: FunctionType) -> FunctionType | None:
    """What a decorated function wraps, and closes over."""
    inner = getattr(function, "__wrapped__", None)
    if not isinstance(inner, FunctionType):
        return None
    return inner if any(_content(cell) is inner for cell in function.__closure__ or ()) else None


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _wrapping(function: FunctionType, inner: FunctionType, other: FunctionType) -> FunctionType:
    """A decorated function with `other` in the place of what it wraps."""
    cells = tuple(CellType(other) if _content(cell) is inner else cell for cell in function.__closure__ or ())
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    return functools.wraps(function)(copy)  # type: ignore[return-value]


def with_code(function: FunctionType, code: CodeType) -> FunctionType:
    """The function with other code."""
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return functools.wraps(function)(copy)  # type: ignore[return-value]


def codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of those defined inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def names_it(code: CodeType) -> bool:
    """Whether the name of torch's function is used, whatever it stands for."""
    return any(THEIRS in each.co_names for each in codes(code))


def names_own(code: CodeType, name: str = THEIRS) -> bool:
    """Whether the name is always that of an attribute of the method's first argument, as litgpt names a method."""
    for each in codes(code):
        before: tuple[str, ...] = ()
        for instruction in instructions(each):
            is_load = instruction.opname in ("LOAD_ATTR", "LOAD_METHOD")
            if instruction.argval == name and not (is_load and before[-1:] == code.co_varnames[:1]):
                return False
            before = locals_of(instruction, "LOAD")
    return True


def locals_of(instruction: dis.Instruction, verb: str) -> tuple[str, ...]:
    """The function's own variables that an instruction loads, or stores: from Python 3.13 on it may do two things."""
    verbs = [word for word in instruction.opname.split("_") if word in ("LOAD", "STORE")]
    if "_FAST" not in instruction.opname:
        return ()
    names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
    return tuple(name for each, name in zip(verbs, names, strict=False) if each == verb)


def instructions(code: CodeType) -> list[dis.Instruction]:
    """Those that do something, which differ least from one Python to the next."""
    return [each for each in dis.get_instructions(code) if each.opname not in NOT_CODE]


def _functions_named(code: CodeType) -> Iterator[str]:
    """The names of globals that are nothing else in this code: renaming them renames no attribute."""
    found: dict[str, set[str]] = {}
    for each in codes(code):
        for instruction in instructions(each):
            if isinstance(instruction.argval, str) and instruction.argval in each.co_names:
                found.setdefault(instruction.argval, set()).add(instruction.opname)
    return (name for name, uses in found.items() if uses == {"LOAD_GLOBAL"})


def _is_beside(function: FunctionType, other: FunctionType) -> bool:
    return str(function.__module__).partition(".")[0] == str(other.__module__).partition(".")[0]


def _calls_torchs(code: CodeType, scope: dict[str, Any]) -> bool:
    """Whether the name stands for torch's own function wherever it is used."""
    for each in codes(code):
        path: list[str] = []
        for instruction in instructions(each):
            if instruction.opname == "LOAD_GLOBAL":
                path = [instruction.argval]
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and path:
                path.append(instruction.argval)
            else:
                path = []
            is_meant = isinstance(instruction.argval, str) and instruction.argval == THEIRS
            if is_meant and instruction.opname != "LOAD_CONST" and not _is_torchs(path, scope):
                return False
    return True


def _is_torchs(path: list[str], scope: dict[str, Any]) -> bool:
    """F.scaled_dot_product_attention by any name of F, or the function's own, imported."""
    if not path or path[0] not in scope:
        return False
    if len(path) == 1:
        return scope[path[0]] is TORCHS and _is_builtin()
    holder = scope[path[0]]
    for name in path[1:-1]:
        holder = getattr(holder, name, None)
    return holder is F and F.scaled_dot_product_attention is TORCHS and _is_builtin()


def _is_builtin() -> bool:
    return isinstance(TORCHS, BuiltinFunctionType)


def renamed(code: CodeType, names: dict[str, str]) -> CodeType:
    constants = tuple(renamed(each, names) if isinstance(each, CodeType) else each for each in code.co_consts)
    return code.replace(co_names=tuple(names.get(name, name) for name in code.co_names), co_consts=constants)


# ---- diffusers -------------------------------------------------------------------------------------------------------


_DISPATCH = "diffusers.models.attention_dispatch"
_REGISTRY = "_AttentionBackendRegistry"


class _Registry:
    """diffusers' registry of attention backends, in which its native one, a call of torch's function, is a copy. Any
    other backend that the user chose is as it was."""

    def __init__(self, registry: Any, native: object, copy: object) -> None:
        self._theirs, self._native, self._copy = registry, native, copy

    def get_active_backend(self) -> tuple[Any, Any]:
        name, function = self._theirs.get_active_backend()
        return name, self._copy if function is self._native else function

    @property
    def _backends(self) -> _Registry:
        return self

    def get(self, name: Any) -> Any:
        function = self._theirs._backends.get(name)
        return self._copy if function is self._native else function

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)


def _of_registry(function: FunctionType, attend: Attend) -> Copied | None:
    """The copy of diffusers' dispatch_attention_fn that finds a copy of its native backend."""
    if function.__module__ != _DISPATCH or function.__name__ != "dispatch_attention_fn":
        return None
    scope = vars(sys.modules[_DISPATCH])
    native, registry = scope.get("_native_attention"), scope.get(_REGISTRY)
    copy = copied(native, attend, 0) if isinstance(native, FunctionType) else None
    asks = [name for name in ("get_active_backend", "_backends") if name in function.__code__.co_names]
    if registry is None or copy is None or _REGISTRY not in _functions_named(function.__code__) or not asks:
        return None
    scope[_OURS + _REGISTRY] = _Registry(registry, native, copy.function)
    code = renamed(function.__code__, {_REGISTRY: _OURS + _REGISTRY})
    return Copied(with_code(function, code), ((scope, _REGISTRY, registry),))
