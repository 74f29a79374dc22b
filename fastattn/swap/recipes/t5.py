"""T5 of transformers and its copies (mT5, LongT5, Switch, Pop2Piano, ...): their forwards branch on the weights' dtype.

T5LayerNorm               rms_norm; the result has the weight's dtype
T5DenseActDense           ffn
T5DenseGatedActDense      gated_ffn; both run the original where `wo` has a dtype of its own, as in half checkpoints
"""

from __future__ import annotations

from types import FunctionType

from torch import nn

from fastattn.swap.code import is_copy
from fastattn.swap.expression import Input, Spelling, argument_names
from fastattn.swap.originals import original
from fastattn.swap.reading import Reading
from fastattn.swap.recipes.feedforward import Block, Named, feed_forward
from fastattn.swap.recipes.norm import NormNames, spelled_norm

_NORM, _DENSE, _GATED = (
    original("models.t5.modeling_t5", f"{name}.forward")
    for name in ("T5LayerNorm", "T5DenseActDense", "T5DenseGatedActDense")
)
_TAIL = (Named("dropout"), Named("wo"))


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward is a copy of one of these."""
    forward = module_class.forward
    if not isinstance(forward, FunctionType) or argument_names(forward) != ("hidden_states",):
        return None
    spelling = Spelling(Input(0), ("hidden_states",), {"forward": forward})
    if is_copy(forward, _NORM):
        return spelled_norm(spelling, NormNames("variance_epsilon", "weight", 0.0, "weight"))
    if is_copy(forward, _DENSE):
        return feed_forward(spelling, Block("wi", Named("act"), _TAIL))
    if is_copy(forward, _GATED):
        return feed_forward(spelling, Block("wi_1", Named("act"), _TAIL, gate="wi_0"))
    return None
