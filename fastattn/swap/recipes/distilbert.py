"""DistilBERT's feed-forward block, which may cut its input into chunks, and its copies."""

from __future__ import annotations

from types import FunctionType

from torch import nn

from fastattn.swap.code import is_copy
from fastattn.swap.expression import Input, Spelling, argument_names
from fastattn.swap.originals import original
from fastattn.swap.reading import Reading
from fastattn.swap.recipes.feedforward import Block, FeedForward, Named, feed_forward

_METHODS = ("forward", "ff_chunk")
_ORIGINALS = {name: original("models.distilbert.modeling_distilbert", f"FFN.{name}") for name in _METHODS}
_BLOCK = Block("lin1", Named("activation"), (Named("lin2"), Named("dropout")))


class ChunkedFeedForward(FeedForward):
    """lin2(act(lin1(x))) of the whole input, unless chunks of it are asked for."""

    def fastattn_reason(self, block: Block) -> str | None:
        if self.chunk_size_feed_forward != 0:
            return "its input is cut into chunks"
        return super().fastattn_reason(block)


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose methods are copies of DistilBERT's."""
    methods = {name: getattr(module_class, name, None) for name in _METHODS}
    if not all(is_copy(method, _ORIGINALS[name]) for name, method in methods.items()):
        return None
    own = {name: method for name, method in methods.items() if isinstance(method, FunctionType)}
    spelling = Spelling(Input(0), argument_names(own["forward"]), own)
    return feed_forward(spelling, _BLOCK, ChunkedFeedForward)
