"""Attention of any class whose forward calls torch's scaled_dot_product_attention: itself, by a method or a function.

They are copied with another name in the place of that function's, and nothing else: what comes before and after runs as
it was written. A method that reaches the function in a way that is not plain, through a local name say, is left alone.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastattn.functional import scaled_dot_product_attention
from fastattn.functional.plain import AS_FAST, on_torch, torch_is_as_fast
from fastattn.functional.sdpa import directly, is_overridden, on_kernels, why_torch
from fastattn.graphs import constant
from fastattn.nn.checks import why_no_kernels
from fastattn.nn.counting import note_call, note_choice, note_fallback
from fastattn.swap.reading import Reading, is_replaced
from fastattn.swap.recipe import Recipe
from fastattn.swap.recipes.sdpa_copies import THEIRS, TORCHS, Copied, codes, copied, layers, names_it, names_own
from fastattn.swap.swapped import Swapped


class CallsSDPA(Swapped):
    """Base of the swapped classes."""

    fastattn_methods: ClassVar[dict[str, Callable[..., Any]]]
    """The methods of the original that were copied, and those on the way from forward to them."""


Otherwise = Callable[[CallsSDPA], bool]


class _Running(threading.local):
    """The swapped module whose forward runs in this thread, and whether it has called the function."""

    def __init__(self) -> None:  # once a thread. Dynamo guards on what the instance holds: no defaults of the class
        self.module: CallsSDPA | None = None
        self.has_called = False


_running = _Running()


def attend(
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
    if F.scaled_dot_product_attention is not TORCHS:
        note_fallback(module, f"torch's {THEIRS} was replaced")
        # Whose other parameters may be its own: what is not at its default goes by name.
        options = {
            "attn_mask": attn_mask,
            "dropout_p": dropout_p or None,
            "is_causal": is_causal or None,
            "scale": scale,
            "enable_gqa": enable_gqa or None,
        }
        given: dict[str, Any] = {name: option for name, option in options.items() if option is not None}
        return F.scaled_dot_product_attention(query, key, value, **given)
    backend = module.fastattn_backend
    out = directly(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend)
    if out is not None:
        return out
    reason = why_torch(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    reason = reason or why_no_kernels(query, backend)
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


def note_attention() -> None:
    """The swapped forward that runs came to its attention: whatever runs that is counted."""
    _running.has_called = True


def read(original: type[nn.Module], otherwise: Otherwise | None = None) -> Reading | None:
    """The reading of a class whose forward, or a method that it calls, calls torch's function. `otherwise` is asked of
    a module whose forward has just not called it whether that is as it should be."""
    methods = reached_methods(original)
    copies = {name: copy for name, method in methods.items() if (copy := copy_of(method)) is not None}
    named = {name for name, method in methods.items() if any(_asks_for_it(layer, methods) for layer in layers(method))}
    if not copies or named - copies.keys():
        return None
    attributes: dict[str, Any] = {name: copy.function for name, copy in copies.items()}
    forward = attributes.get("forward", methods["forward"])
    attributes |= {"forward": counted(forward, tuple(copies.values()), otherwise), "fastattn_methods": methods}
    return Reading(CallsSDPA, _recipe, attributes)


def _asks_for_it(function: FunctionType, methods: dict[str, FunctionType]) -> bool:
    """Whether the function names torch's, and not a method of the class that is called so."""
    return names_it(function.__code__) and not (THEIRS in methods and names_own(function.__code__))


def copy_of(function: FunctionType) -> Copied | None:
    """The function with ours in the place of torch's; None where it does not call that, or not plainly."""
    return copied(function, attend)


def _recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(swapped, kernels={"attention": THEIRS})


def counted(
    forward: Callable[..., Any], copies: tuple[Copied, ...] = (), otherwise: Otherwise | None = None
) -> Callable[..., Any]:
    """The forward of a swapped class, made of a copied one and with these copies: counts its calls, and runs the
    original where something that was read is no longer what it was."""
    through = any(copy.through for copy in copies)

    @constant
    def why_not() -> str | None:
        return why_replaced(copies)

    @functools.wraps(forward)
    def run(self: CallsSDPA, *args: Any, **kwargs: Any) -> Any:
        note_call(self)
        original = self.fastattn_original
        for name, method in self.fastattn_methods.items():
            if is_replaced(self, name, method):
                note_fallback(self, f"its {name} was replaced")
                return original.forward(self, *args, **kwargs)
        reason = why_not() if through else None
        if reason is not None:
            note_fallback(self, reason)
            return original.forward(self, *args, **kwargs)
        before = _running.module, _running.has_called
        is_told = before[0] is not None or self.fastattn_backend or self.fastattn_strict
        if torch.compiler.is_compiling() and not is_told:
            # Nothing to tell attend, and activation checkpointing inside of a graph allows no assignment.
            return forward(self, *args, **kwargs)
        _running.module, _running.has_called = self, False
        try:
            result = forward(self, *args, **kwargs)
            if not _running.has_called and (otherwise is None or not otherwise(self)):
                note_fallback(self, f"its forward did not call {THEIRS}")
            return result
        finally:
            _running.module, _running.has_called = before

    return run


def why_replaced(copies: tuple[Copied, ...]) -> str | None:
    """None where the functions that were copied with these are still those that the originals would call."""
    for copy in copies:
        for scope, name, function in copy.through:
            if scope.get(name) is not function:
                return f"{name}, which it calls, was replaced"
    return None


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
        waiting += [other for layer in layers(method) for code in codes(layer.__code__) for other in code.co_names]
    return found if "forward" in found else {}


def _definition(original: type, name: str) -> object:
    """What stands in the class under this name: no function where it is a static method or a property."""
    return next((vars(base)[name] for base in original.__mro__ if name in vars(base)), None)
