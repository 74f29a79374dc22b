"""A whole layer of a model as one call of `encoder_layer`: what the recipes that do so have in common.

One operator runs the layer where CPU tensors go through in inference and every child would do nothing but the plain
operation. In training, with a cache, attention weights asked for and so on its children are called, each on its own
kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.functional import encoder_layer
from fastattn.integrations.torch_attention import is_replaced
from fastattn.integrations.transformers import NAME
from fastattn.integrations.transformers_versions import is_collecting_hook, weights_are_collected
from fastattn.masks import Causal
from fastattn.nn.checks import why_not_head_dim, why_not_unwatched
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.fused import Fused
from fastattn.nn.whole_layer import fits, may_be_one_call
from fastattn.ops.library import tracks_gradients
from fastattn.swap.reading import why_not_as_read
from fastattn.swap.swapped import Swapped

_IDLE_ARGUMENTS = frozenset({"position_ids", "use_cache", "output_hidden_states", "return_dict"})
"""Keyword arguments of a layer that its computation does not read."""


def wants_one_call(x: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a call of a layer can be one call of the operator, its children allowing."""
    for name, value in kwargs.items():
        if name not in _IDLE_ARGUMENTS and not (name == "output_attentions" and not value):
            return False
    return may_be_one_call(x) and not tracks_gradients(x)


class WholeLayer(NamedTuple):
    """What the operator needs of a layer whose children are all plain."""

    attention: Any
    """The child whose config names the attention to run."""
    counted: tuple[nn.Module, ...]
    """The children whose work the one call does; those of them that are swapped count it as theirs."""
    heads: int
    scale: float
    activation: str
    norm_first: bool
    norms: tuple[nn.LayerNorm, nn.LayerNorm]
    is_causal: bool
    """Whether the attention is causal where it is given no mask."""
    drops: bool
    """Whether some dropout is active."""
    tensors: tuple[Tensor | None, ...]
    """The weights and biases in the order of `encoder_layer`."""

    def serves(self, x: Tensor, mask: Tensor | None) -> bool:
        """In inference, with fastattn's attention, all in one dtype and with a mask that hides keys."""
        features = x.shape[-1]
        return (
            self.attention.config._attn_implementation == NAME
            and (not is_replaced() or getattr(self.attention, "fastattn_forms_weights", False))
            and not self.drops
            and (mask is None or (mask.dim() == 4 and (mask.dtype is torch.bool or mask.dtype is torch.int32)))
            and all([t is not None and t.shape[0] == features for t in self.tensors[:6:2]])  # as many heads of k and v
            and why_not_head_dim(features // self.heads) is None
            and fits(x, self.tensors)
        )

    def run(self, x: Tensor, mask: Tensor | None, backend: str | None) -> Tensor:
        """The layer, with a missing mask read as the attention function reads it."""
        return encoder_layer(
            x,
            *self.tensors,  # type: ignore[arg-type]
            heads=self.heads,
            activation=self.activation,
            norm_first=self.norm_first,
            eps1=self.norms[0].eps,
            eps2=self.norms[1].eps,
            mask=_CAUSAL if mask is None and x.shape[1] > 1 and self.is_causal else mask,
            scale=self.scale,
            backend=backend,
        )


_CAUSAL = Causal("top-left")


def run_whole(layer: Swapped, found: WholeLayer | str, x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The layer in one call, or None where its children are to be called: because of what was found of them in words,
    which counts as a fallback, or because of the input."""
    if isinstance(found, str):
        note_fallback(layer, found)
        return None
    if not found.serves(x, mask):
        return None
    children = [child for child in found.counted if isinstance(child, Fused)]
    if any([child.fastattn_backend != layer.fastattn_backend for child in children]):
        return None
    if hasattr(found.attention, "fastattn_methods") and why_not_as_read(found.attention) is not None:
        return None  # the other children were asked when the layer was looked at
    for child in children:
        note_call(child)
    return found.run(x, mask, layer.fastattn_backend)


def why_not_unwatched_attention(attention: nn.Module) -> str | None:
    """As `why_not_unwatched`, but for the hooks by which transformers collects outputs while none of them does.

    transformers installs them for good the first time that a model is asked for hidden states or attention weights.
    """
    reason = why_not_unwatched(attention)
    return None if reason is None or _only_idle_hooks(attention) else reason


def _only_idle_hooks(attention: nn.Module) -> bool:
    if torch.compiler.is_compiling():
        return False
    hooks = attention._forward_hooks
    if not hooks or attention._forward_pre_hooks or attention._backward_hooks or attention._backward_pre_hooks:
        return False
    if not all(map(is_collecting_hook, hooks.values())):
        return False
    return not weights_are_collected(attention)
