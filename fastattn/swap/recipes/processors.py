"""Attention of classes whose forward hands itself to an object that it holds, as diffusers' does to its processors:

    return self.processor(self, hidden_states, ...)

and that object's class calls torch's scaled_dot_product_attention in its `__call__`, itself or by a function. The
forward is copied with a call of ours in that one place; the `__call__` as sdpa_copies copies code, and run on the very
object that the module holds. Which class that is is asked at every call: a processor that was set since is as good,
where its `__call__` can be copied, and runs as it is where not.

Time of the model swapped without attention over that swapped with it, one thread, float32, in turns, median; one core
of an AMD EPYC (Zen 5, AVX-512), a virtual machine, torch 2.13.0, diffusers 0.42.1, 2026-11-27, width 384, 6 heads:
    Stable Diffusion's UNet (128 and 256 channels), 32 x 32      1.22        Wan, 4 layers, 512 + 77 tokens      1.19
    Stable Diffusion 3, 4 layers, 256 + 77 tokens                1.18        Flux, 2 + 4 layers, 256 + 77        1.14
    DiT, PixArt, LTX, 256 tokens                        1.07 to 1.09         the VAE, 2 heads of 128, 64 x 64    1.10
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, ClassVar

from torch import nn

from fastattn.graphs import constant
from fastattn.nn.checks import full_name
from fastattn.nn.counting import note_fallback
from fastattn.swap.reading import Reading
from fastattn.swap.recipe import Recipe
from fastattn.swap.recipes.sdpa import CallsSDPA, copy_of, counted, note_attention, reached_methods, why_replaced
from fastattn.swap.recipes.sdpa_copies import NOT_CODE, THEIRS, Copied, locals_of, with_code
from fastattn.swap.swapped import Swapped

_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
_MOST_NAMES = 120  # of an attribute in one byte of code, beside a bit: what comes after takes an EXTENDED_ARG


class HandsItselfOn(CallsSDPA):
    """Base of the swapped classes."""

    fastattn_holds: ClassVar[str]
    """The attribute that is called with the module."""

    def fastattn_call_held(self, *args: Any, **kwargs: Any) -> Any:
        """What stands in the forward for the call of that attribute."""
        held = getattr(self, self.fastattn_holds)
        if is_copied(type(held)):
            return _copies[type(held)](held, *args, **kwargs)
        note_fallback(self, f"its {self.fastattn_holds} {_why_not(held)}")
        note_attention()
        return held(*args, **kwargs)


def read(original: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward calls one attribute with the module itself."""
    methods = reached_methods(original)
    forward = methods.get("forward")
    loads = [] if forward is None else list(_calls_with_self(forward.__code__))
    names = {load.argval for load in loads}
    if forward is None or len(names) != 1:
        return None
    (name,) = names
    code = None if hasattr(original, name) else _calling_ours(forward.__code__, loads)
    if code is None:
        return None
    attributes = {"forward": counted(with_code(forward, code)), "fastattn_methods": methods, "fastattn_holds": name}
    return Reading(HandsItselfOn, _recipe, attributes)


def _recipe(swapped: type[Swapped]) -> Recipe:
    def refuse(module: nn.Module) -> list[str]:
        held = getattr(module, name)
        return [] if is_copied(type(held)) else [f"its {name} {_why_not(held)}"]

    def misfit(module: nn.Module) -> str | None:
        held = getattr(module, name, None)
        if held is None:
            return f"it has no {name}"
        if isinstance(held, nn.Module) and type(held).__call__ is nn.Module.__call__:
            return f"its {name} is a module, which is swapped on its own"
        return None if looks_like_it or not refuse(module) else f"its {name} {_why_not(held)}"

    name: str = swapped.fastattn_holds  # type: ignore[attr-defined]
    looks_like_it = "Attention" in swapped.fastattn_original.__name__
    return Recipe(
        swapped,
        kernels={"attention": THEIRS},
        misfit=misfit,
        refuse=refuse,
    )


def _why_not(held: object) -> str:
    return f"is a {full_name(held)}, whose __call__ does not call {THEIRS}"


# ---- what is held ----------------------------------------------------------------------------------------------------


@constant
def is_copied(kind: type) -> bool:
    """Whether `_copies` has the `__call__` of a class, which calls torch's function, and plainly. Where it was replaced
    since it was read, or a function that it calls, it is read again."""
    call = inspect.getattr_static(kind, "__call__", None)
    known = _read.get(kind)
    if known is None or known[0] is not call or (known[1] is not None and why_replaced((known[1],)) is not None):
        copy = copy_of(call) if isinstance(call, FunctionType) else None
        known = _read[kind] = call, copy
        _copies.pop(kind, None)
        if copy is not None:
            _copies[kind] = copy.function
    return known[1] is not None


_read: dict[type, tuple[object, Copied | None]] = {}
_copies: dict[type, FunctionType] = {}
"""Apart from what `is_copied` needs: a graph looks for nothing else."""


# ---- the forward -----------------------------------------------------------------------------------------------------


def _calls_with_self(code: CodeType) -> Iterator[dis.Instruction]:
    """Where an attribute of the first argument is loaded to be called with it: self.name(self, ...)."""
    own, steps = code.co_varnames[0], list(dis.get_instructions(code))
    if any(own in locals_of(step, "STORE") for step in steps):
        return
    told = [(index, step) for index, step in enumerate(steps) if step.opname not in NOT_CODE]
    for (first, before), (_, load), (_, after), (_, then) in zip(told, told[1:], told[2:], told[3:], strict=False):
        if load.opname not in _ATTRIBUTES or locals_of(before, "LOAD")[-1:] != (own,):
            continue
        given = locals_of(after, "LOAD")
        is_given_whole = given[:1] == (own,) and (len(given) > 1 or then.opname not in _ATTRIBUTES)
        if is_given_whole and after.opname.startswith("LOAD_FAST") and _is_called(steps, first):
            yield load


def _is_called(steps: list[dis.Instruction], first: int) -> bool:
    """Whether what begins where `first` puts the module on the stack ends in a call, whose result is then there."""
    depth = 1 + (first > 0 and steps[first - 1].opname == "PUSH_NULL")
    for step in steps[first + 1 :]:
        if step.opcode in _JUMPS:
            return False
        depth += dis.stack_effect(step.opcode, step.arg)
        if depth <= 1 and step.opname not in (*_ATTRIBUTES, *NOT_CODE):
            return depth == 1 and step.opname.startswith("CALL")
    return False


_JUMPS = frozenset(dis.hasjrel) | frozenset(dis.hasjabs)


def _calling_ours(code: CodeType, loads: list[dis.Instruction]) -> CodeType | None:
    """The code with fastattn_call_held in the place of the attribute that these load, and nowhere else; None where its
    names are too many for the one byte that is written here."""
    if len(code.co_names) > _MOST_NAMES:
        return None
    patched = bytearray(code.co_code)
    for load in loads:
        # From Python 3.12 on the lowest bit of the argument says that a method is meant.
        shift = 1 if sys.version_info >= (3, 12) and load.opname == "LOAD_ATTR" else 0
        bit = patched[load.offset + 1] & shift
        patched[load.offset + 1] = len(code.co_names) << shift | bit
    return code.replace(co_code=bytes(patched), co_names=(*code.co_names, "fastattn_call_held"))
