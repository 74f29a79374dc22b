"""Attention of any class whose forward calls torch's scaled_dot_product_attention itself.

Its methods are copied with another name in the place of that function's, and nothing else: what comes before and after
runs as it was written. A method that reaches the function in a way that is not plain, through a local name say, is left
alone.
"""

from __future__ import annotations

import dis
import functools
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.functional import scaled_dot_product_attention
from fastattn.functional.plain import AS_FAST, on_torch, torch_is_as_fast
from fastattn.functional.sdpa import directly, is_overridden, on_kernels, why_torch
from fastattn.nn.counting import note_call, note_choice, note_fallback
from fastattn.swap.reading import Reading
from fastattn.swap.recipe import Recipe
from fastattn.swap.swapped import Swapped

_THEIRS = "scaled_dot_product_attention"
_OURS = "_fastattn_scaled_dot_product_attention"
"""An attribute that torch.nn.functional, or a module that imported the function by name, gets when a class is read."""


class CallsSDPA(Swapped):
    """Base of the swapped classes."""

    fastattn_methods: ClassVar[dict[str, Callable[..., Any]]]
    """The methods of the original that were copied, and those on the way from forward to them."""


class _Running(threading.local):
    """The swapped module whose forward runs in this thread, and whether it has called the function."""

    def __init__(self) -> None:  # once a thread. Dynamo guards on what the instance holds: no defaults of the class
        self.module: CallsSDPA | None = None
        self.has_called = False


_running = _Running()


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's function as a swapped forward calls it."""
    module = _running.module
    if module is not None:
        _running.has_called = True
    if module is None or is_overridden(query, key, value, attn_mask):
        return scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    backend = module.fastattn_backend
    out = directly(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend)
    if out is not None:
        return out
    reason = why_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is None:
        is_plain = attn_mask is None and dropout_p == 0.0 and query.dim() == key.dim() == value.dim() == 4
        if is_plain and torch_is_as_fast(query, key, value, is_causal, scale, backend):
            note_choice(module, AS_FAST)
            return on_torch(query, key, value, is_causal, scale)
        return on_kernels(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend)
    note_fallback(module, reason)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def read(original: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward, or a method that it calls, calls torch's function."""
    methods = reached_methods(original)
    calling = {name: method for name, method in methods.items() if _names(method.__code__, _THEIRS)}
    if not calling or not all(_calls_torchs(method.__code__, method.__globals__) for method in calling.values()):
        return None
    copies = {name: _copy(method) for name, method in calling.items()}
    forward = copies.pop("forward", methods["forward"])
    attributes = {**copies, "forward": _counted(forward), "fastattn_methods": methods}
    return Reading(CallsSDPA, _recipe, attributes)


def _recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(swapped, kernels={"attention": _THEIRS})


def _counted(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(self: CallsSDPA, *args: Any, **kwargs: Any) -> Any:
        note_call(self)
        original = self.fastattn_original
        for name, method in self.fastattn_methods.items():
            if name in self.__dict__ or getattr(original, name) is not method:
                note_fallback(self, f"its {name} was replaced")
                return original.forward(self, *args, **kwargs)
        before = _running.module, _running.has_called
        is_told = before[0] is not None or self.fastattn_backend or self.fastattn_strict
        if torch.compiler.is_compiling() and not is_told:
            # Nothing to tell _attend, and activation checkpointing inside of a graph allows no assignment.
            return forward(self, *args, **kwargs)
        _running.module, _running.has_called = self, False
        try:
            result = forward(self, *args, **kwargs)
            if not _running.has_called:
                note_fallback(self, f"its forward did not call {_THEIRS}")
            return result
        finally:
            _running.module, _running.has_called = before

    return run


def reached_methods(original: type[nn.Module]) -> dict[str, FunctionType]:
    """forward, and the methods of the class that it calls by name, directly or not."""
    found: dict[str, FunctionType] = {}
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        method = getattr(original, name, None)
        is_own = isinstance(method, FunctionType) and method is not getattr(nn.Module, name, None)
        if name in found or not is_own or not isinstance(_definition(original, name), FunctionType):
            continue
        found[name] = method
        waiting += [other for code in _codes(method.__code__) for other in code.co_names]
    return found if "forward" in found else {}


def _definition(original: type, name: str) -> object:
    """What stands in the class under this name: no function where it is a static method or a property."""
    return next((vars(base)[name] for base in original.__mro__ if name in vars(base)), None)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of those defined inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _names(code: CodeType, name: str) -> bool:
    return any(name in each.co_names for each in _codes(code))


def _calls_torchs(code: CodeType, scope: dict[str, Any]) -> bool:
    """Whether the name stands for torch's own function wherever it is used."""
    for each in _codes(code):
        path: list[str] = []
        for instruction in dis.get_instructions(each):
            if instruction.opname == "LOAD_GLOBAL":
                path = [instruction.argval]
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and path:
                path.append(instruction.argval)
            elif instruction.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL"):
                path = []
            is_meant = isinstance(instruction.argval, str) and instruction.argval == _THEIRS
            if is_meant and instruction.opname != "LOAD_CONST" and not _is_torchs(path, scope):
                return False
    return True


def _is_torchs(path: list[str], scope: dict[str, Any]) -> bool:
    """F.scaled_dot_product_attention by any name of F, or the function's own, imported."""
    if not path or path[0] not in scope:
        return False
    if len(path) == 1:
        return scope[path[0]] is F.scaled_dot_product_attention
    holder = scope[path[0]]
    for name in path[1:-1]:
        holder = getattr(holder, name, None)
    return holder is F


def _copy(method: FunctionType) -> FunctionType:
    """The method with our function's name in the place of torch's."""
    F._fastattn_scaled_dot_product_attention = _attend  # type: ignore[attr-defined]
    if method.__globals__.get(_THEIRS) is F.scaled_dot_product_attention:
        method.__globals__[_OURS] = _attend
    copy = FunctionType(
        _renamed(method.__code__), method.__globals__, method.__name__, method.__defaults__, method.__closure__
    )
    copy.__kwdefaults__ = method.__kwdefaults__
    return functools.wraps(method)(copy)  # type: ignore[return-value]


def _renamed(code: CodeType) -> CodeType:
    names = tuple(_OURS if name == _THEIRS else name for name in code.co_names)
    constants = tuple(_renamed(each) if isinstance(each, CodeType) else each for each in code.co_consts)
    return code.replace(co_names=names, co_consts=constants)
