"""Feed-forward blocks that call the children of a list in their order, as diffusers has them:

    for module in self.net:                 self.net = [Linear, activation, Dropout, Linear, Dropout]
        x = module(x)                    or [a module that is act(linear(x)), or first * act(second)
                                             of the halves of linear(x); Dropout, Linear, Dropout]

with the dropouts or without. That a forward does this and nothing else is found by running it on a list of stand-ins;
what the first module computes is read as every other forward is (fastattn.swap.expression).

Time of the model with the block's linears swapped alone over that with the block, one thread, float32, in turns,
median; one core of an AMD EPYC (Zen 5, AVX-512), a virtual machine, torch 2.13.0, diffusers 0.42.1, 2026-11-27:
1.03 to 1.08 of DiT, Stable Diffusion 3, Flux, PixArt, Wan, Qwen-Image, CogVideoX and others, 3 to 6 layers of 384; 1.05
of Stable Diffusion's UNet with 128 and 256 channels (GEGLU). In bfloat16 1.02 to 1.13.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.functional import ffn, gated_ffn
from fastattn.graphs import constant
from fastattn.nn.activations import shown
from fastattn.nn.checks import why_not_dropout, why_not_input, why_not_unwatched
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.fused import original_class
from fastattn.swap.expression import Call, Input, Op, Own, argument_names, spelling_of
from fastattn.swap.plain_code import has_effects
from fastattn.swap.reading import Reading, ReadMethods, calls_forward_as_it_is, why_not_as_read
from fastattn.swap.recipe import Child, Recipe
from fastattn.swap.recipes.activations import activation_name, why_not_activation
from fastattn.swap.recipes.feedforward import Activated, Block, Named, Step, first_half, halves_of, why_no_linear
from fastattn.swap.recipes.linear import is_projection, projection, why_not_projection
from fastattn.swap.swapped import Swapped

_LENGTHS = (2, 3, 4, 5)
_LISTS = (nn.ModuleList, nn.Sequential)


class _Steps(NamedTuple):
    """The children of a block, and the keys that they have in the list."""

    first: nn.Module | None
    """The module that holds the first linear and the activation; None where the list itself does."""
    up: nn.Module
    activation: Any
    """A child, or what the kernels call it."""
    gate: str | None
    """Which half of the first linear's output is under the activation; None where it is not cut."""
    hidden: nn.Dropout | None
    down: nn.Module
    last: nn.Module | None
    names: dict[str, str]


class InOrder(ReadMethods):
    """down(dropout(act(up(x)))) or, gated, of the halves of up(x); x (..., K)."""

    fastattn_list: ClassVar[str]
    fastattn_input: ClassVar[str]

    def fastattn_run(self, x: Tensor) -> Tensor | str:
        """The block, or why the original must run; asked every time."""
        steps = _steps(self, self.fastattn_list)
        if steps is None:
            return "its children are no longer those of a feed-forward block"
        reason = why_not_as_read(self) or why_not_input(x, self.fastattn_backend) or _why_not(steps, x)
        if reason is not None:
            return reason
        activation = activation_name(steps.activation)
        assert activation is not None  # _why_not has asked
        dropout_p = float(steps.hidden.p) if steps.hidden is not None and steps.hidden.training else 0.0
        up, up_bias = projection(steps.up)
        down, down_bias = projection(steps.down)
        backend = self.fastattn_backend
        if steps.gate is None:
            y = ffn(x, up, up_bias, down, down_bias, activation, dropout_p=dropout_p, backend=backend)
        else:
            (gate, up), (gate_bias, up_bias) = halves_of(up, up_bias, steps.gate)
            y = gated_ffn(
                x, gate, up, down, activation, gate_bias, up_bias, down_bias, dropout_p=dropout_p, backend=backend
            )
        return y if steps.last is None else steps.last(y)


def _why_not(steps: _Steps, x: Tensor) -> str | None:
    names = steps.names
    if steps.first is not None:
        reason = why_not_first(steps.first)
        if reason is not None:
            return f"{names['first']} {reason}"
    dtype = None if torch.is_autocast_enabled(x.device.type) else x.dtype
    for name, linear in (("up", steps.up), ("down", steps.down)):
        reason = why_not_projection(linear)
        if reason is None and dtype is not None and linear._parameters["weight"].dtype is not dtype:  # type: ignore[union-attr]
            reason = "is of another dtype than the input"
        if reason is not None:
            return f"{names[name]} {reason}"
    if steps.gate is not None and projection(steps.up)[0].shape[0] % 2:
        return f"{names['up']} has an odd number of features"
    if activation_name(steps.activation) is None:
        return f"{names['activation']} is {_shown(steps.activation)}, which has no kernel"
    reason = None if steps.hidden is None else why_not_dropout(steps.hidden)
    return None if reason is None else f"{names['hidden']} {reason}"


def _shown(activation: object) -> str:
    return activation if isinstance(activation, str) else shown(activation)


def why_not_first(first: nn.Module) -> str | None:
    """None where a first module does its forward and nothing else, with the helpers of its class."""
    reason = why_not_unwatched(first)
    if reason is not None:
        return reason
    replaced = [name for name in _first_blocks[original_class(first)].helpers if name in first.__dict__]
    return f"has its {replaced[0]} replaced on the instance" if replaced else None


# ---- which step is which ---------------------------------------------------------------------------------------------


def _steps(module: nn.Module, name: str) -> _Steps | None:
    """The block that the module's list of children is, by their classes; None where it is another one."""
    held = module._modules.get(name)
    if held is None or type(held) not in _LISTS or "forward" in held.__dict__:
        return None
    keys, children = tuple(held._modules), tuple(held._modules.values())
    if len(children) < 2 or None in children:
        return None
    names = {"first": f"{name}.{keys[0]}"}
    first: Any = children[0]
    up, activation, gate, rest = first, children[1], None, 1
    if is_projection(first):
        names |= {"up": f"{name}.{keys[0]}", "activation": f"{name}.{keys[1]}"}
        rest = 2
        if isinstance(activation, (nn.Dropout, nn.Identity)):
            return None
    elif is_first_block(original_class(first)):
        block = _first_blocks[original_class(first)]
        up, gate = getattr(first, block.up), block.gate
        activation = _activation(first, block)
        names |= {"up": f"{name}.{keys[0]}.{block.up}", "activation": f"{name}.{keys[0]}.{block.activation}"}
    else:
        return None
    found: dict[str, Any] = {"hidden": None, "down": None, "last": None}
    for index in range(rest, len(keys)):
        child = children[index]
        role = "down"
        if isinstance(child, nn.Dropout):
            role = "hidden" if found["down"] is None else "last"
        if found[role] is not None:
            return None
        found[role], names[role] = child, f"{name}.{keys[index]}"
    if found["down"] is None:
        return None
    owner = None if rest == 2 else first
    return _Steps(owner, up, activation, gate, found["hidden"], found["down"], found["last"], names)


def begins(first: nn.Module, name: str, tail: tuple[Step, ...]) -> Block | None:
    """The block that a first module of this name and what follows it are."""
    if not is_first_block(original_class(first)):
        return None
    block = _first_blocks[original_class(first)]
    activation = _activation(first, block)
    if activation_name(activation) is None:
        return None
    step = Activated(activation) if isinstance(activation, str) else Named(f"{name}.{block.activation}")
    return Block(f"{name}.{block.up}", step, tail, halves=block.gate, within=name)


def _activation(first: nn.Module, block: _First) -> Any:
    if block.kind == "child":
        return getattr(first, block.activation)
    if block.kind == "kernel":
        return block.activation
    chosen = getattr(first, block.activation)
    return _GELU.get(chosen, f"gelu of the form {chosen!r}")


# ---- the first module ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _First:
    """A class that is act(up(x)), or the product of a half of up(x) and the other under the activation."""

    up: str
    kind: str
    """Of the activation: the name of a "child", of a "kernel", or of the attribute that F.gelu takes its form from."""
    activation: str
    gate: str | None
    helpers: tuple[str, ...]
    methods: dict[str, Any]


_first_blocks: dict[type, _First] = {}
_others: dict[type, tuple[object, ...]] = {}
"""Classes that are no such block, and what was read of them."""


@constant
def is_first_block(kind: type[nn.Module]) -> bool:
    """Whether `_first_blocks` has this class. Where a method of it was replaced, it is read again."""
    known = _first_blocks.get(kind)
    if known is not None and all(getattr(kind, name, None) is method for name, method in known.methods.items()):
        return True
    _first_blocks.pop(kind, None)
    names = getattr(getattr(kind.forward, "__code__", None), "co_names", ())
    methods = (kind.forward, *(inspect.getattr_static(kind, name, None) for name in names))
    if _others.get(kind) == methods:
        return False
    found = _read_first(kind) if calls_forward_as_it_is(kind) else None
    if found is None:
        _others[kind] = methods
        return False
    _first_blocks[kind] = found
    return True


_FORM = "approximate"
"""What F.gelu calls the form that it takes: classes call the attribute so that they hand on to it."""
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def _read_first(kind: type[nn.Module]) -> _First | None:
    as_it_is = _reading(kind)
    if as_it_is is not None:
        return as_it_is
    forms = [_reading(kind, form) for form in _GELU]
    first = forms[0]
    if first is None or inspect.getattr_static(kind, _FORM, None) is not None:
        return None
    expected = [replace(first, activation=name) for name in _GELU.values()]
    return replace(first, kind="form", activation=_FORM) if forms == expected else None


def _reading(kind: type[nn.Module], form: str | None = None) -> _First | None:
    """The block that a class is, where its attribute `approximate`, if a form is given, holds that."""
    spelling = spelling_of(kind, without_options=True, texts=None if form is None else {_FORM: form})
    found = None if spelling is None or len(spelling.inputs) != 1 else _act_of_linear(spelling.expression)
    if spelling is None or found is None:
        return None
    helpers = tuple(name for name in spelling.methods if name != "forward")
    return _First(*found, helpers, dict(spelling.methods))


def _act_of_linear(expression: Any) -> tuple[str, str, str, str | None] | None:
    match expression:
        case Op("mul", (Call(Own(up), (Input(0),)) as z, Op("sigmoid", (Op("mul", factors, ()),), ())), ()):
            return (up, "kernel", "quick_gelu", None) if factors in ((1.702, z), (z, 1.702)) else None
    block = first_half(expression)
    if block is None:
        return None
    step = block.activation
    kind = "child" if isinstance(step, Named) else "kernel"
    return block.up, kind, step.name, block.halves


# ---- the forward that calls the list ---------------------------------------------------------------------------------


def read(original: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward hands its input through a list of children, one after the other."""
    forward = inspect.getattr_static(original, "forward", None)
    names = argument_names(forward, without_options=True)
    if not isinstance(forward, types.FunctionType) or len(names) != 1 or has_effects(forward):
        return None
    found = {_list_called(forward, length) for length in _LENGTHS}
    name = found.pop() if len(found) == 1 else None
    if name is None or inspect.getattr_static(original, name, None) is not None:
        return None
    attributes = {
        "forward": _in_order(forward),
        "fastattn_list": name,
        "fastattn_input": names[0],
        "fastattn_methods": {"forward": forward},
    }
    return Reading(InOrder, _recipe, attributes)


def _in_order(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(self: InOrder, *args: Any, **kwargs: Any) -> Any:
        note_call(self)
        given = args[0] if len(args) == 1 and not kwargs else kwargs.get(self.fastattn_input)
        more = len(args) + len(kwargs) > 1 or given is None
        y = "it is given more than its input" if more else self.fastattn_run(given)
        if isinstance(y, str):
            note_fallback(self, y)
            return self.fastattn_original.forward(self, *args, **kwargs)
        return y

    return run


class _Given:
    """Stands for a tensor: nothing can be done with it but hand it on."""

    def __bool__(self) -> bool:
        raise TypeError("of a stand-in nothing is known")


class _Child:
    """Stands for a child: notes in which order it is called."""

    def __init__(self, calls: list[tuple[object, object, object]], most: int) -> None:
        self._calls, self._most = calls, most

    def __call__(self, x: object) -> _Given:
        if len(self._calls) == self._most:  # a loop that waits for something else may have no end
            raise RuntimeError("called more often than once each")
        result = _Given()
        self._calls.append((self, x, result))
        return result


class _Holder:
    """Stands for the module: its attribute, of whatever name, is what may be asked of a list and not changed, and a
    second one it has not."""

    def __init__(self, children: list[_Child]) -> None:
        self.__dict__["_children"], self.__dict__["_asked"] = children, set()

    def __getattr__(self, name: str) -> tuple[_Child, ...]:
        asked: set[str] = self.__dict__["_asked"]
        asked.add(name)
        if len(asked) > 1:
            raise AttributeError(name)
        return tuple(self.__dict__["_children"])


def _list_called(forward: types.FunctionType, length: int) -> str | None:
    """The name of the list whose children a forward calls in their order, each with what the one before gave."""
    calls: list[tuple[object, object, object]] = []
    children = [_Child(calls, length) for _ in range(length)]
    holder, given = _Holder(children), _Given()
    scope = {"__builtins__": {"len": len}}
    try:
        result = types.FunctionType(forward.__code__, scope, forward.__name__)(holder, given)
    except Exception:
        # Whatever a forward does that stand-ins cannot follow means the same: it is not one of these.
        return None
    expected, x = [], given
    for child, (_, _, y) in zip(children, calls, strict=False):
        expected.append((child, x, y))
        x = y
    asked: set[str] = holder.__dict__["_asked"]
    return asked.pop() if calls == expected and len(calls) == length and result is x and len(asked) == 1 else None


# ---- what swap and plan ask ------------------------------------------------------------------------------------------


def _recipe(swapped: type[Swapped]) -> Recipe:
    name: str = swapped.fastattn_list  # type: ignore[attr-defined]

    def children(module: nn.Module) -> list[Child]:
        steps = _steps(module, name)
        assert steps is not None
        names = steps.names
        found: list[Child] = [(names["up"], "ffns", why_not_projection), (names["down"], "ffns", why_not_projection)]
        if steps.first is not None:
            found.append((names["first"], "ffns", why_not_unwatched))
        if isinstance(steps.activation, nn.Module):
            found.append((names["activation"], "ffns", why_not_activation))
        if steps.hidden is not None:
            found.append((names["hidden"], "ffns", why_not_dropout))
        return found

    def misfit(module: nn.Module) -> str | None:
        steps = _steps(module, name)
        if steps is None:
            return f"its {name} are not those of a feed-forward block"
        return why_no_linear(steps.names["up"], steps.up) or why_no_linear(steps.names["down"], steps.down)

    def refuse(module: nn.Module) -> list[str]:
        steps = _steps(module, name)
        assert steps is not None
        known = activation_name(steps.activation) is not None
        return [] if known else [f"the activation {_shown(steps.activation)} has no kernel"]

    return Recipe(swapped, kernels={"ffns": "ffn or gated_ffn"}, children=children, misfit=misfit, refuse=refuse)
