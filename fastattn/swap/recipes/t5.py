"""T5 of transformers and its copies (mT5, LongT5, Switch, Pop2Piano, ...): their forwards branch on the weights' dtype.

T5LayerNorm               rms_norm; the result has the weight's dtype
T5DenseActDense           ffn
T5DenseGatedActDense      gated_ffn; both run the original where `wo` has a dtype of its own, as in half checkpoints
"""

from __future__ import annotations

from torch import nn
from transformers.models.t5 import modeling_t5

from fastattn.swap.code import is_copy
from fastattn.swap.reading import Reading
from fastattn.swap.recipes.feedforward import Block, Named, feed_forward
from fastattn.swap.recipes.norm import NormNames, spelled_norm

_TAIL = (Named("dropout"), Named("wo"))


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward is a copy of one of these."""
    if is_copy(module_class.forward, modeling_t5.T5LayerNorm.forward):
        return spelled_norm(module_class, NormNames("variance_epsilon", "weight", 0.0, "weight"))
    if is_copy(module_class.forward, modeling_t5.T5DenseActDense.forward):
        return feed_forward(module_class, Block("wi", Named("act"), _TAIL))
    if is_copy(module_class.forward, modeling_t5.T5DenseGatedActDense.forward):
        return feed_forward(module_class, Block("wi_1", Named("act"), _TAIL, "wi_0"))
    return None
