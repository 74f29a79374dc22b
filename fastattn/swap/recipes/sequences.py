"""nn.Sequential that is a feed-forward block: its children in their order, and nothing else.

Sequential(linear, activation, dropout, linear, dropout)     with the dropouts or without; a norm of torch before all
Sequential(Sequential(linear, activation), dropout, linear)  as in F5-TTS
Sequential(first, dropout, linear)                           first a module that is act(linear(x)), or a product of
                                                             halves of linear(x), as in latent-diffusion
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fastattn.nn.checks import why_not_unwatched
from fastattn.nn.fused import original_class
from fastattn.swap.expression import Input, Spelling
from fastattn.swap.reading import Reading, spelled_as
from fastattn.swap.recipe import Recipe
from fastattn.swap.recipes.feedforward import Block, FeedForward, Named, misfit, recipe_of_blocks, refuse
from fastattn.swap.recipes.in_order import begins, why_not_first
from fastattn.swap.swapped import Swapped

_FORWARD: Any = nn.Sequential.forward


class Sequence(FeedForward):
    """down(dropout(act(up(x)))), x (..., K)."""

    def fastattn_reason(self, block: Block) -> str | None:
        return super().fastattn_reason(block) or _why_not_within(self, block)


def _why_not_within(module: nn.Module, block: Block) -> str | None:
    if block.within is None:
        return None
    child: Any = module._modules[block.within]
    reason = why_not_unwatched(child) if original_class(child) is nn.Sequential else why_not_first(child)
    return None if reason is None else f"{block.within} {reason}"


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class of sequences."""
    if module_class.forward is not _FORWARD or module_class.__iter__ is not nn.Sequential.__iter__:
        return None
    spelling = Spelling(Input(0), ("input",), {"forward": _FORWARD})
    return Reading(Sequence, _recipe, {"fastattn_block": property(_block_of), **spelled_as(spelling)})


def _recipe(swapped: type[Swapped]) -> Recipe:
    recipe = recipe_of_blocks(swapped, "ffn", _block_of)

    def no_block(module: nn.Module) -> str | None:
        block = _block_of(module)
        return misfit(module, block) or "; ".join(refuse(module, block)) or None

    # Sequences are about that nobody took for blocks: those without a kernel are no business of a swap, either.
    return replace(recipe, misfit=no_block)


def _block_of(module: nn.Module) -> Block:
    """The children in their order. Of fewer than two there is no block: the names then stand for no children."""
    names = tuple(module._modules)
    first = module._modules[names[0]] if names else None
    kind = None if first is None else original_class(first)
    if first is not None and kind is nn.Sequential:
        inner = tuple(first._modules)
        if len(inner) == 2 and all(first._modules[name] is not None for name in inner):
            up, activation = (f"{names[0]}.{name}" for name in inner)
            return Block(up, Named(activation), tuple(Named(name) for name in names[1:]), within=names[0])
    elif first is not None and not kind.__module__.startswith("torch."):  # torch has none
        found = begins(first, names[0], tuple(Named(name) for name in names[1:]))
        if found is not None:
            return found
    up, activation, *_ = *names, "", ""
    return Block(up, Named(activation), tuple(Named(name) for name in names[2:]))
