"""Feed-forward blocks of any spelling.

LinearAct            act(linear(x)), the first half of BERT's block
FeedForward          linear(act(linear(x)))
GatedFeedForward     linear(act(linear(x)) * linear(x)), the two inner linears apart (Llama) or one, cut in halves (GLM)
                     or cut by a child that makes the product, as GEGLU and SwiGLU do in a sequence

with dropout, as a child or a function, before and behind the last linear or not at all, or, while it drops nothing,
before the activation; and with a LayerNorm or RMSNorm of torch, which is called, before all. What a class's forward
computes is read by `fastattn.swap.expression`; the functions below say which expressions these kernels stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.functional import ffn, gated_ffn, linear_act
from fastattn.nn.activations import shown
from fastattn.nn.checks import MAX_DROPOUT, full_name, why_not_dropout, why_not_input, why_not_unwatched
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.fused import original_class
from fastattn.swap.expression import Call, Expression, Input, Op, Own, Spelling, spelling_of
from fastattn.swap.reading import FLAGGED, ReadForward, Reading, attribute, spelled_as, why_not_as_read
from fastattn.swap.recipe import Child, Recipe
from fastattn.swap.recipes.activations import (
    activation_name,
    activation_of,
    cut_in_halves,
    glu_activation,
    glu_gate,
    why_not_activation,
    why_not_glu,
)
from fastattn.swap.recipes.linear import is_projection, projection, why_not_projection
from fastattn.swap.swapped import Swapped


@dataclass(frozen=True)
class Named:
    """A step that a child of this name does: a linear, an activation or a dropout, told apart by the child's class."""

    name: str


@dataclass(frozen=True)
class Activated:
    """A step that a function of torch does; `name` is the kernel's."""

    name: str


@dataclass(frozen=True)
class Dropped:
    """F.dropout(x, p, training=self.training), p an attribute or a constant."""

    p: str | float


Step = Named | Activated | Dropped


@dataclass(frozen=True)
class Block:
    """What a class calls the parts of its block. `tail` is what follows the activation or the product."""

    up: str
    activation: Named | Activated
    tail: tuple[Step, ...] = ()
    gate: str | None = None
    """The linear under the activation of a gated block."""
    halves: str | None = None
    """One linear, `up`, does both, its output is cut in halves, and this one ("first" or "second") is under the
    activation."""
    norm: str | None = None
    """The norm of the input, if there is one."""
    early: Named | None = None
    """A dropout between the first linear and the activation."""
    glu: bool = False
    """The activation is a child that cuts the halves and multiplies them."""
    within: str | None = None
    """A child that does the first linear and the activation, which are named by paths through it."""

    @property
    def is_gated(self) -> bool:
        return self.gate is not None or self.halves is not None


def _as_in(module: nn.Module, block: Block) -> Block:
    """The block in this module: which of the names in a chain of children is the norm, which a dropout, and which makes
    a product of halves, is told by the children."""
    step = block.activation
    if not isinstance(step, Named) or block.is_gated or not block.tail:
        return block
    child, after = _child(module, step.name), block.tail[0]
    if not isinstance(after, Dropped):
        if block.norm is None and _is_norm(_child(module, block.up)):
            return _as_in(module, replace(block, norm=block.up, up=step.name, activation=after, tail=block.tail[1:]))
        if block.early is None and isinstance(child, nn.Dropout):
            return _as_in(module, replace(block, early=step, activation=after, tail=block.tail[1:]))
    gate = glu_gate(type(child))
    return block if gate is None else replace(block, halves=gate, glu=True)


def _is_norm(child: object) -> bool:
    """Whether the child is exactly torch's LayerNorm or RMSNorm, or stands for it: calling it twice is as calling it
    once."""
    return original_class(child) in (nn.LayerNorm, nn.RMSNorm)


class _Tail(NamedTuple):
    """dropout, last linear, dropout."""

    hidden: Step | None
    down: str
    last: Step | None


def _tail(module: nn.Module, steps: tuple[Step, ...]) -> _Tail | None:
    """Which step is which, by the class of the module's children; None where the steps are others. An nn.Identity, as
    timm puts it where a norm may stand, is none."""
    hidden: Step | None = None
    last: Step | None = None
    down: str | None = None
    for step in steps:
        child = _child(module, step.name) if isinstance(step, Named) else None
        if type(child) is nn.Identity and why_not_unwatched(child) is None:
            continue
        if isinstance(step, Dropped) or isinstance(child, nn.Dropout):
            if (hidden if down is None else last) is not None:
                return None
            if down is None:
                hidden = step
            else:
                last = step
        elif down is None and isinstance(step, Named):
            down = step.name
        else:
            return None
    return None if down is None else _Tail(hidden, down, last)


def _child(module: Any, path: str) -> Any:
    """The attribute `path`, most often a child: nn.Module looks for those last. Or one of a child, by a path with
    dots."""
    child = module._modules.get(path)
    if child is not None:
        return child
    for name in path.split("."):
        module = getattr(module, name)
    return module


# ---- the forwards ----------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """What one call of the operator takes; the children have passed the checks."""

    up: nn.Module
    gate: nn.Module | None
    down: nn.Module | None
    activation: str
    dropout_p: float
    last: Step | None
    halves: str | None


class _ReadBlock(ReadForward):
    """A block in one call of the operator, or, where a check has something against a child, the original forward."""

    fastattn_block: ClassVar[Block | None]
    """None where the module is none with the flags that it has now."""

    def fastattn_forward(self, *inputs: Any) -> Tensor:
        note_call(self)
        (x,) = inputs
        block = _block_now(self)
        z, call = x, FLAGGED if block is None else self.fastattn_reason(block)
        if block is not None and call is None:
            z = x if block.norm is None else _child(self, block.norm)(x)
            call = why_not_input(z, self.fastattn_backend) or _call(self, block, z)
        if not isinstance(call, _Call):
            note_fallback(self, str(call))
            return super().forward(x)  # type: ignore[misc, no-any-return]
        return _drop(self, call.last, self.fastattn_run(z, call))

    def fastattn_call(self, x: Tensor) -> _Call | str:
        """The call of the operator that all of the block is for this input, or why it must not be one."""
        block = _block_now(self)
        if block is None:
            return FLAGGED
        if block.norm is not None:
            return f"{block.norm} stands before the block"
        return self.fastattn_reason(block) or why_not_input(x, self.fastattn_backend) or _call(self, block, x)

    def fastattn_reason(self, block: Block) -> str | None:
        """Why the original must run, whatever the input is."""
        return why_not_as_read(self) or _why_not_norm(self, block)

    def fastattn_run(self, x: Tensor, call: _Call) -> Tensor:
        """The block without its last dropout."""
        raise NotImplementedError


def _block_now(module: _ReadBlock) -> Block | None:
    as_read = module.fastattn_block
    return None if as_read is None else _as_in(module, as_read)


class LinearAct(_ReadBlock):
    """act(up(x)), x (..., K)."""

    def fastattn_run(self, x: Tensor, call: _Call) -> Tensor:
        return linear_act(x, *projection(call.up), call.activation, backend=self.fastattn_backend)


class FeedForward(_ReadBlock):
    """down(dropout(act(up(x)))), x (..., K). Gated where the activation is a child that multiplies halves."""

    def fastattn_run(self, x: Tensor, call: _Call) -> Tensor:
        assert call.down is not None
        if call.halves is not None:
            return _run_gated(self, x, call)
        return ffn(
            x,
            *projection(call.up),
            *projection(call.down),
            call.activation,
            dropout_p=call.dropout_p,
            backend=self.fastattn_backend,
        )


class GatedFeedForward(_ReadBlock):
    """down(dropout(act(gate(x)) * up(x))), x (..., K)."""

    def fastattn_run(self, x: Tensor, call: _Call) -> Tensor:
        return _run_gated(self, x, call)


def _run_gated(module: _ReadBlock, x: Tensor, call: _Call) -> Tensor:
    assert call.down is not None
    up, up_bias = projection(call.up)
    down, down_bias = projection(call.down)
    if call.gate is not None:
        gate, gate_bias = projection(call.gate)
    else:
        (gate, up), (gate_bias, up_bias) = halves_of(up, up_bias, call.halves)
    biases, backend = (gate_bias, up_bias, down_bias), module.fastattn_backend
    return gated_ffn(x, gate, up, down, call.activation, *biases, dropout_p=call.dropout_p, backend=backend)


def halves_of(weight: Tensor, bias: Tensor | None, gate: str | None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Two weights and two biases of one linear, those of the half under the activation first."""
    weights, biases = weight.chunk(2), (None, None) if bias is None else bias.chunk(2)
    return (weights, biases) if gate == "first" else (weights[::-1], biases[::-1])


def _drop(module: nn.Module, step: Step | None, y: Tensor) -> Tensor:
    """A last dropout as the original does it."""
    if step is None:
        return y
    if isinstance(step, Dropped):
        return F.dropout(y, attribute(module, step.p), module.training)
    return _child(module, step.name)(y)  # type: ignore[no-any-return]


# ---- checks ----------------------------------------------------------------------------------------------------------


def _why_not_norm(module: nn.Module, block: Block) -> str | None:
    if block.norm is None:
        return None
    child = _child(module, block.norm)
    reason = why_not_unwatched(child) if _is_norm(child) else f"is a {full_name(child)}"
    return None if reason is None else f"{block.norm} {reason}"


def _call(module: nn.Module, block: Block, x: Tensor) -> _Call | str:
    """The call that the block is, or why it must not be one; asked every time."""
    tail = _tail(module, block.tail)
    if tail is None and not isinstance(module, LinearAct):
        return "its children are no longer those of a feed-forward block"
    dtype = None if torch.is_autocast_enabled(x.device.type) else x.dtype
    linears: list[nn.Module | None] = []
    for name in (block.up, block.gate, None if tail is None else tail.down):
        linear = None if name is None else _child(module, name)
        reason = None if linear is None else why_not_projection(linear) or _why_not_of(dtype, linear)
        if reason is not None:
            return f"{name} {reason}"
        linears.append(linear)
    up, gate, down = linears
    assert up is not None
    if gate is not None and projection(gate)[0].shape[0] != projection(up)[0].shape[0]:
        return f"{block.gate} and {block.up} have different numbers of features"
    if block.halves is not None and projection(up)[0].shape[0] % 2:
        return f"{block.up} has an odd number of features"
    activation = _activation(module, block)
    if activation is None:
        name = block.activation.name
        return f"{name} {(why_not_glu if block.glu else why_not_activation)(_child(module, name))}"
    dropout_p = dropout_rate(module, None if tail is None else tail.hidden)
    if isinstance(dropout_p, str):
        return dropout_p
    if block.early is not None:
        early_p = dropout_rate(module, block.early)
        if early_p != 0.0:
            return early_p if isinstance(early_p, str) else f"{block.early.name} drops before the activation"
    return _Call(up, gate, down, activation, dropout_p, None if tail is None else tail.last, block.halves)


def _why_not_of(dtype: torch.dtype | None, linear: nn.Module) -> str | None:
    """A linear of another dtype than the input's; None casts."""
    weight: Any = linear._parameters["weight"]
    if dtype is None or weight.dtype is dtype:
        return None
    return f"is {str(weight.dtype).removeprefix('torch.')}, not the input's dtype"


def _activation(module: nn.Module, block: Block) -> str | None:
    step = block.activation
    if isinstance(step, Activated):
        return step.name
    child = _child(module, step.name)
    if block.glu:
        return glu_activation(type(child)) if why_not_glu(child) is None else None
    return activation_name(child)


def dropout_rate(module: nn.Module, step: Step | None) -> float | str:
    """The share that a dropout step drops in this call, or why the kernel cannot."""
    if step is None:
        return 0.0
    if isinstance(step, Dropped):
        rate = float(attribute(module, step.p)) if module.training else 0.0
        return rate if rate <= MAX_DROPOUT else f"{step.p} is {rate}"
    child = _child(module, step.name)
    reason = why_not_dropout(child)
    if reason is not None:
        return f"{step.name} {reason}"
    return float(child.p) if child.training else 0.0


# ---- what swap and plan ask ------------------------------------------------------------------------------------------


def _linears(block: Block, tail: _Tail | None) -> tuple[str, ...]:
    names = (block.gate, block.up, None if tail is None else tail.down)
    return tuple(dict.fromkeys(name for name in names if name is not None))


def _children(module: nn.Module, block: Block) -> Iterable[Child]:
    """The children that the operator stands for."""
    block = _as_in(module, block)
    tail = _tail(module, block.tail)
    if block.within is not None:
        yield block.within, "ffns", why_not_unwatched
    for name in _linears(block, tail):
        yield name, "ffns", why_not_projection
    if isinstance(block.activation, Named):
        yield block.activation.name, "ffns", why_not_glu if block.glu else why_not_activation
    if tail is not None and isinstance(tail.hidden, Named):
        yield tail.hidden.name, "ffns", why_not_dropout


def misfit(module: nn.Module, as_read: Block) -> str | None:
    """Why the children are not what the names stand for: linears, adapted or quantised ones too, and an activation."""
    block = _as_in(module, as_read)
    if block.norm is not None and not _is_norm(norm := _child(module, block.norm)):
        return f"{block.norm} is {_named(norm)}, not torch's LayerNorm or RMSNorm"
    tail = _tail(module, block.tail)
    if tail is None and (as_read.tail or isinstance(module, nn.Sequential)):
        return "its children are not those of a feed-forward block"
    for name in _linears(block, tail):
        reason = why_no_linear(name, _child(module, name))
        if reason is not None:
            return reason
    if isinstance(block.activation, Activated):
        return None
    return _why_no_activation(block.activation.name, _child(module, block.activation.name))


def why_no_linear(name: str, child: object) -> str | None:
    names_features = hasattr(child, "in_features") and hasattr(child, "out_features")
    if is_projection(child) or (isinstance(child, nn.Module) and names_features):
        return None
    return f"{name} is {_named(child)}, not a linear"


def _why_no_activation(name: str, act: object) -> str | None:
    if not callable(act) or isinstance(act, (nn.Dropout, nn.Identity)):
        return f"{name} is {_named(act)}, not an activation"
    learns = isinstance(act, nn.Module) and next(act.parameters(), None) is not None
    return f"{name} is {_named(act)}, which has parameters" if learns else None


def _named(child: object) -> str:
    return f"a {full_name(child)}" if isinstance(child, nn.Module) else f"a {type(child).__name__}"


def refuse(module: nn.Module, block: Block) -> list[str]:
    block = _as_in(module, block)
    if isinstance(block.activation, Activated) or block.glu:
        return []
    function = _child(module, block.activation.name)
    if activation_name(function) is not None:
        return []
    return [f"the activation {shown(function)} has no kernel"]


# ---- which classes ---------------------------------------------------------------------------------------------------


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward is one of these."""
    found = spelling_of(module_class)
    if found is None or len(found.inputs) != 1:
        return None
    block = block_of(found.expression)
    return None if block is None else feed_forward(found, block)


def feed_forward(spelling: Spelling, block: Block, plain: type[FeedForward] = FeedForward) -> Reading:
    """The reading of a class whose forward is known to be this block; `plain` stands for one that is not gated."""
    mixin, kernel = (GatedFeedForward, "gated_ffn") if block.is_gated else (plain, "ffn")
    if not block.tail:
        mixin, kernel = LinearAct, "linear_act"

    return Reading(
        mixin,
        lambda swapped: recipe_of_blocks(swapped, kernel, lambda module: block),
        {"fastattn_block": block, **spelled_as(spelling)},
    )


def recipe_of_blocks(swapped: type[Swapped], kernel: str, block_in: Callable[[nn.Module], Block | None]) -> Recipe:
    """The recipe of modules each of which is a block, or, where there is None, another thing."""

    def of(module: nn.Module) -> Block:
        block = block_in(module)
        assert block is not None
        return block

    return Recipe(
        swapped,
        kernels={"ffns": kernel},
        children=lambda module: _children(module, of(module)),
        misfit=lambda module: FLAGGED if (block := block_in(module)) is None else misfit(module, block),
        refuse=lambda module: refuse(module, of(module)),
        named=lambda module: "gated_ffn" if _as_in(module, of(module)).is_gated else kernel,
    )


# ---- which expressions -----------------------------------------------------------------------------------------------


def block_of(expression: Expression) -> Block | None:
    """The block that an expression spells, or None."""
    tail: list[Step] = []
    inner: Any = expression
    while True:
        found = _gated(inner, tuple(tail)) or _plain(inner, tuple(tail))
        if found is not None:
            return found
        step = _step(inner)
        if step is None:
            return None
        tail.insert(0, step[0])
        inner = step[1]


def _plain(expression: Any, tail: tuple[Step, ...]) -> Block | None:
    """act(up(x)) before the tail."""
    step = _step(expression)
    if step is None or isinstance(step[0], Dropped):
        return None
    match step[1]:
        case Call(Own(up), (z,)):
            # In a chain of children the norm cannot be told from the others yet.
            norm = _normed(z) if isinstance(step[0], Activated) or z == Input(0) else None
            return None if norm is None else Block(up, step[0], tail, norm=norm.child)
    return None


def first_half(expression: Expression) -> Block | None:
    """A block without what follows act(up(x)), or the product of the halves of up(x) of which one is under the
    activation."""
    block = _plain(expression, ()) or _gated(expression, (Named(""),))
    return None if block is None or block.norm is not None or block.gate is not None else block


class _Normed(NamedTuple):
    child: str | None


def _normed(z: Any) -> _Normed | None:
    """The child that makes z of the input, or none where z is the input; None for any other z."""
    match z:
        case Input(0):
            return _Normed(None)
        case Call(Own(norm), (Input(0),)):
            return _Normed(norm)
    return None


def _gated(expression: Any, tail: tuple[Step, ...]) -> Block | None:
    """act(gate(x)) * up(x), in this order or the other, before the tail."""
    match expression:
        case Op("mul", (first, second), ()) if tail:
            for under, beside in ((first, second), (second, first)):
                step = _step(under)
                if step is None or isinstance(step[0], Dropped):
                    continue
                match step[1], beside:
                    case Call(Own(gate), (z,)), Call(Own(up), (other,)) if z == other:
                        if gate == up and isinstance(step[0], Named):
                            return None  # the child may have overwritten what stands beside it
                        norm = _normed(z)
                        if norm is not None:
                            return Block(up, step[0], tail, gate, norm=norm.child)
                    case Op("getitem", (whole, int(i))), Op("getitem", (other, int(j))) if whole == other:
                        halved = _halved(whole)
                        norm = None if halved is None else _normed(halved[1])
                        if halved is not None and norm is not None and {i, j} == {0, 1}:
                            half = "second" if i else "first"
                            return Block(halved[0], step[0], tail, halves=half, norm=norm.child)
    return None


def _halved(expression: Any) -> tuple[str, Any] | None:
    """The linear whose output is cut in halves along its features, and its input."""
    match cut_in_halves(expression):
        case Call(Own(name), (z,)):
            return name, z
    return None


def _step(expression: Any) -> tuple[Step, Any] | None:
    """The last step of a chain, and what it is done to."""
    found = activation_of(expression)
    if found is not None:
        return Activated(found[0]), found[1]
    match expression:
        case Call(Own(name), (inner,)):
            return Named(name), inner
        case Op("dropout", (inner,), (("p", p), ("training", Own("training")))):
            return (Dropped(p.name if isinstance(p, Own) else float(p)), inner) if isinstance(p, (Own, float)) else None
    return None
