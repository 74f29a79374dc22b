"""Whether two functions are copies of each other: the same instructions on the same globals.

Comments, annotations and docstrings may differ; so may the functions that both call, as long as they are copies too.
"""

from __future__ import annotations

import builtins
import dis
import types
from typing import Any


def is_copy(function: object, other: object, *, ignoring_global: str | None = None) -> bool:
    """Both are there and do the same, as far as instructions, defaults, closures and globals say. One global may be
    named that is not compared, neither in these functions nor in those that they call."""
    if function is None or other is None:
        return False
    try:
        return _is_copy(function, other, set(), ignoring_global)
    except (RuntimeError, ValueError):  # a comparison without an answer, as of tensors, or an empty cell
        return False


def _is_copy(one: object, other: object, compared: set[tuple[int, int]], ignored: str | None) -> bool:
    if one is other:
        return True
    if not isinstance(one, types.FunctionType) or not isinstance(other, types.FunctionType):
        return isinstance(one, _CONSTANTS) and _constant(one) == _constant(other)
    if (id(one), id(other)) in compared:
        return True
    compared.add((id(one), id(other)))
    if _instructions(one.__code__) != _instructions(other.__code__):
        return False
    if _constant(one.__defaults__) != _constant(other.__defaults__):
        return False
    if _constant(one.__kwdefaults__) != _constant(other.__kwdefaults__):
        return False
    pairs = [
        (global_named(one, name), global_named(other, name)) for name in globals_of(one.__code__) if name != ignored
    ]
    # Equal instructions close over as many variables.
    for cell, other_cell in zip(one.__closure__ or (), other.__closure__ or (), strict=True):
        pairs.append((cell.cell_contents, other_cell.cell_contents))
    return all(_is_copy(first, second, compared, ignored) for first, second in pairs)


def _constant(value: object) -> tuple[object, ...]:
    """Tells 1, 1.0 and True apart, and 0.0 from -0.0."""
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(_constant, value))
    if isinstance(value, dict):
        return dict, *((key, _constant(each)) for key, each in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), *map(_constant, value)
    return (type(value), repr(value)) if isinstance(value, float) else (type(value), value)


_CONSTANTS = (bool, int, float, str, tuple, set, frozenset, type(None))


def _instructions(code: types.CodeType) -> list[tuple[str, Any]]:
    return [
        (i.opname, _instructions(i.argval) if isinstance(i.argval, types.CodeType) else _constant(i.argval))
        for i in dis.get_instructions(code)
    ]


def globals_of(code: types.CodeType) -> set[str]:
    names = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            names.add(instruction.argval)
        elif isinstance(instruction.argval, types.CodeType):
            names |= globals_of(instruction.argval)
    return names


def global_named(function: types.FunctionType, name: str) -> object:
    """What a name that the function does not bind itself stands for in it; None where it stands for nothing."""
    return function.__globals__[name] if name in function.__globals__ else getattr(builtins, name, None)
