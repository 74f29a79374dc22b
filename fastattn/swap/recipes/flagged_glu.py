"""Feed-forward blocks whose forward asks the module how they are spelled, as timm's GluMlp and litgpt's GemmaMLP:

    first, second = fc1(x).chunk(2, dim=self.chunk_dim)
    fc2(first * act(second) if self.gate_last else act(first) * second)

    fc3(F.gelu(fc1(x), approximate=self.config.gelu_approximate) * fc2(x))

Each value of the flags is a block of `feedforward`; which one a module is, is asked at every call.

Time of the original GluMlp over that of the swapped one, and of one with its linears swapped alone over that, one
thread, in turns, median; one core of an AMD EPYC (Zen 5, AVX-512), a virtual machine, torch 2.13.0, 2026-11-27:
                                         float32           bfloat16
    257 rows, 192 -> 2 x 512 -> 192    2.06, 1.18        1.02, 1.00
              384 -> 2 x 1,024         2.17, 1.08        1.18, 1.18
              1,024 -> 2 x 2,816       2.22, 1.04        1.15, 1.16
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastattn.swap.expression import Spelling, spellings_of
from fastattn.swap.reading import Reading, spelled_as
from fastattn.swap.recipe import Recipe
from fastattn.swap.recipes.feedforward import Block, FeedForward, GatedFeedForward, block_of, recipe_of_blocks
from fastattn.swap.swapped import Swapped


def _block_of(module: nn.Module, blocks: tuple[tuple[Spelling, Block], ...]) -> Block | None:
    """The block that the module is with the flags that it has now."""
    seen: dict[str, Any] = {}
    for spelling, block in blocks:
        if spelling.holds_for(module, seen):
            return block
    return None


def read(original: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward is a block, as its flags say: gated with any that is read, or with none."""
    blocks = [
        (spelling, block)
        for spelling in spellings_of(original)
        if len(spelling.inputs) == 1 and (block := block_of(spelling.expression)) is not None and block.tail
    ]
    if not blocks:
        return None
    is_gated = any(block.is_gated for _, block in blocks)
    found = tuple(each for each in blocks if each[1].is_gated == is_gated)
    mixin, kernel = (GatedFeedForward, "gated_ffn") if is_gated else (FeedForward, "ffn")

    def recipe(swapped: type[Swapped]) -> Recipe:
        return recipe_of_blocks(swapped, kernel, lambda module: _block_of(module, found))

    attributes = spelled_as(found[0][0])
    attributes["fastattn_methods"] = {name: each for one, _ in found for name, each in one.methods.items()}
    attributes["fastattn_block"] = property(lambda module: _block_of(module, found))
    return Reading(mixin, recipe, attributes)
