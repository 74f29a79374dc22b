"""Gated feed-forward blocks whose forward asks a flag, or the module, how their product is spelled, as timm's GluMlp:

    first, second = fc1(x).chunk(2, dim=self.chunk_dim)
    fc2(first * act(second) if self.gate_last else act(first) * second)

Each value of the flags is a block of `feedforward`; which one a module is, is asked at every call.

Time of the original over that of the swapped block, and of the block with its linears swapped alone over that, one
thread, in turns, median; one core of an AMD EPYC (Zen 5, AVX-512), a virtual machine, torch 2.13.0, 2026-11-27:
                                         float32           bfloat16
    257 rows, 192 -> 2 x 512 -> 192    2.06, 1.18        1.02, 1.00
              384 -> 2 x 1,024         2.17, 1.08        1.18, 1.18
              1,024 -> 2 x 2,816       2.22, 1.04        1.15, 1.16
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from fastattn.nn.counting import note_call, note_fallback
from fastattn.swap.expression import Call, Op, Own, Spelling, parts, spellings_of
from fastattn.swap.reading import FLAGGED, Reading, spelled_as
from fastattn.swap.recipe import Recipe
from fastattn.swap.recipes.feedforward import Block, GatedFeedForward, block_of, recipe_of_blocks
from fastattn.swap.swapped import Swapped


class FlaggedGatedFeedForward(GatedFeedForward):
    """down(dropout(act(gate(x)) * up(x))), x (..., K)."""

    fastattn_blocks: ClassVar[tuple[tuple[Spelling, str | None, Block], ...]]
    """One for each value of the flags, with the attribute that says along which dimension the halves lie."""

    def fastattn_forward(self, *inputs: Any) -> Tensor:
        if _block_of(self, self.fastattn_blocks) is not None:
            return super().fastattn_forward(*inputs)
        note_call(self)
        note_fallback(self, FLAGGED)
        return self.fastattn_original.forward(self, *inputs)  # type: ignore[no-any-return]


def _block_of(module: nn.Module, blocks: tuple[tuple[Spelling, str | None, Block], ...]) -> Block | None:
    """The block that the module is with the flags that it has now."""
    for spelling, dim, block in blocks:
        if spelling.holds_for(module) and (dim is None or _is_last(getattr(module, dim))):
            return block
    return None


def _is_last(dim: object) -> bool:
    return type(dim) is int and dim == -1


def read(original: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward is a gated block, as its flags say."""
    spellings = spellings_of(original)
    blocks: list[tuple[Spelling, str | None, Block]] = []
    for spelling in spellings:
        expression, dim = _cut_along_the_last(spelling.expression)
        block = block_of(expression) if len(spelling.inputs) == 1 else None
        if block is not None and block.is_gated:
            blocks.append((spelling, dim, block))
    if not blocks:
        return None
    found = tuple(blocks)

    def recipe(swapped: type[Swapped]) -> Recipe:
        return recipe_of_blocks(swapped, "gated_ffn", lambda module: _block_of(module, found))

    attributes = spelled_as(found[0][0])
    attributes["fastattn_methods"] = {name: each for one in spellings for name, each in one.methods.items()}
    attributes |= {"fastattn_blocks": found, "fastattn_block": property(lambda module: _block_of(module, found))}
    return Reading(FlaggedGatedFeedForward, recipe, attributes)


def _cut_along_the_last(expression: Any) -> tuple[Any, str | None]:
    """The expression where the attribute that it cuts halves along is -1, and the attribute, if there is one."""
    names = {
        dim.name
        for part in parts(expression)
        if isinstance(part, Op) and part.name == "chunk"
        for dim in (*part.operands[2:], *(value for name, value in part.options if name == "dim"))
        if isinstance(dim, Own)
    }
    if len(names) != 1:
        return expression, None
    (name,) = names
    return _with_dim(expression, name), name


def _with_dim(expression: Any, name: str) -> Any:
    if isinstance(expression, Call):
        return Call(expression.child, tuple(_with_dim(each, name) for each in expression.inputs))
    if isinstance(expression, Op):
        operands = tuple(_with_dim(each, name) for each in expression.operands)
        options = expression.options
        if expression.name == "chunk":
            operands = tuple(-1 if each == Own(name) else each for each in operands)
            options = tuple((key, -1 if value == Own(name) else value) for key, value in options)
        return Op(expression.name, operands, options)
    return expression
