"""BERT of transformers and its copies (RoBERTa, XLM-R, Electra, ...): whole layers, and their self-attention.

BertLayer            the whole layer as one call, in inference and where every child is plain; else its children
BertSelfAttention    q, k and v as linears; attention through the interface, on the config that swap copied

The other parts of a layer are recognised by `norm` (BertSelfOutput, BertOutput) and `feedforward` (BertIntermediate).
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert
from transformers.utils import output_capturing

from fastattn.functional import encoder_layer
from fastattn.integrations import transformers as interface
from fastattn.masks import Causal
from fastattn.nn.checks import full_name, why_not_dropout, why_not_input, why_not_linear, why_not_unwatched
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.norm import why_not_layer_norm
from fastattn.ops.library import tracks_gradients
from fastattn.swap.code import is_copy
from fastattn.swap.reading import ReadForward, Reading, why_not_as_read
from fastattn.swap.recipe import PARTS, Recipe, always, parameters
from fastattn.swap.recipes.activations import activation_name
from fastattn.swap.recipes.feedforward import Block, LinearAct, Named
from fastattn.swap.recipes.interface import note_interface
from fastattn.swap.recipes.linear import linear, split_heads
from fastattn.swap.recipes.norm import ResidualNorm
from fastattn.swap.recognised import recipe_for
from fastattn.swap.swapped import Swapped

# transformers 5.24 renamed the argument, and hands the others on to the cache.
_CACHE = "cache" if "cache" in parameters(modeling_bert.BertSelfAttention.forward) else "past_key_values"


class BertSelfAttention(Swapped):
    """Self-attention. hidden_states (B, S, hidden) -> ((B, S, hidden), attention weights or None)."""

    # What the original holds.
    config: Any
    layer_idx: int | None
    dropout: nn.Dropout
    scaling: float
    is_causal: bool
    attention_head_size: int
    num_attention_heads: int
    all_head_size: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        note_call(self)
        note_interface(self)
        projected = (linear(self, name, hidden_states, "linears") for name in ("query", "key", "value"))
        query, key, value = (split_heads(x, self.attention_head_size) for x in projected)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
            key, value = own.update(key, value, self.layer_idx, **({"kwargs": kwargs} if _CACHE == "cache" else {}))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_bert.eager_attention_forward
        )
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return out.reshape(*hidden_states.shape[:-1], -1).contiguous(), weights


class _Parts(NamedTuple):
    """Classes that do what BERT's of these names do: the attention blocks as they are, the others swapped."""

    blocks: tuple[tuple[type[nn.Module], object], ...]
    """With their forwards."""
    attentions: tuple[type[nn.Module], ...]
    residuals: tuple[type[nn.Module], ...]
    intermediates: tuple[type[nn.Module], ...]


class BertLayer(Swapped):
    """A layer. hidden_states (B, S, hidden) -> (B, S, hidden).

    One operator runs it where CPU tensors go through in inference and every child would do nothing but the plain
    operation. In training, with a cache, a cross-attention, attention weights asked for and so on its children are
    called, each on its own kernels.
    """

    fastattn_parts: ClassVar[_Parts]
    """The classes in the file of the original that a layer may be built of."""
    chunk_size_feed_forward: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        note_call(self)
        cache = past_key_values if cache is None else cache
        if encoder_hidden_states is None and cache is None and _wants_one_call(self, hidden_states, kwargs):
            whole = _whole_layer(self)
            if isinstance(whole, str):
                note_fallback(self, whole)
            elif whole.serves(hidden_states, attention_mask):
                for child in whole.swapped:
                    note_call(child)
                return whole.run(hidden_states, attention_mask, self.fastattn_backend)
        return super().forward(  # type: ignore[misc, no-any-return]
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **{_CACHE: cache},
            **kwargs,
        )


# ---- the layer as one call -------------------------------------------------------------------------------------------

_IDLE_ARGUMENTS = frozenset({"position_ids", "use_cache", "output_hidden_states", "return_dict"})
"""Keyword arguments of a layer that its computation does not read."""


def _wants_one_call(layer: BertLayer, x: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether this call of the layer can be one call of the operator, its children allowing."""
    for name, value in kwargs.items():
        if name not in _IDLE_ARGUMENTS and not (name == "output_attentions" and not value):
            return False
    return (
        why_not_input(x) is None
        and x.is_cpu  # elsewhere no native backend has the operator yet, and the children are faster
        and not torch.is_autocast_enabled("cpu")
        and not tracks_gradients(x)
        and layer.chunk_size_feed_forward == 0
        and "feed_forward_chunk" not in layer.__dict__
    )


class _WholeLayer(NamedTuple):
    """What the operator needs of a layer whose children are all plain."""

    swapped: tuple[BertSelfAttention, Swapped, Swapped, Swapped]
    """The swapped children whose work the one call does."""
    dropouts: tuple[nn.Dropout, nn.Dropout]
    norms: tuple[nn.LayerNorm, nn.LayerNorm]
    activation: str
    tensors: tuple[Tensor | None, ...]
    """The weights and biases in the order of `encoder_layer`."""

    def serves(self, x: Tensor, mask: Tensor | None) -> bool:
        """In inference, with fastattn's attention, all in one dtype and with a mask that hides keys."""
        attention = self.swapped[0]
        dtype = x.dtype
        return (
            attention.config._attn_implementation == interface.NAME
            and not (attention.training and attention.dropout.p > 0.0)
            and not any(dropout.training and dropout.p > 0.0 for dropout in self.dropouts)
            and (mask is None or (mask.dim() == 4 and (mask.dtype is torch.bool or mask.dtype is torch.int32)))
            and attention.all_head_size == x.shape[-1]
            and all(t is None or (t.dtype is dtype and t.is_cpu) for t in self.tensors)
            and not tracks_gradients(*self.tensors)
        )

    def run(self, x: Tensor, mask: Tensor | None, backend: str | None) -> Tensor:
        attention = self.swapped[0]
        causal = mask is None and x.shape[1] > 1 and attention.is_causal  # as the attention function reads None
        return encoder_layer(
            x,
            *self.tensors,  # type: ignore[arg-type]
            heads=attention.num_attention_heads,
            activation=self.activation,
            eps1=self.norms[0].eps,
            eps2=self.norms[1].eps,
            mask=_CAUSAL if causal else mask,
            scale=attention.scaling,
            backend=backend,
        )


_CAUSAL = Causal("top-left")


def _whole_layer(layer: BertLayer) -> _WholeLayer | str:
    """The parts of the layer, or in words which child is more or other than the plain operation.

    Asked on every call: it reads the dictionaries of the modules, attributes of a module take far longer.
    """
    children = layer._modules
    block, intermediate, output = children["attention"], children["intermediate"], children["output"]
    known = layer.fastattn_parts
    if not any([type(block) is kind and kind.forward is forward for kind, forward in known.blocks]):
        return f"attention is a {full_name(block)}"
    attention, mix = block._modules["self"], block._modules["output"]
    for name, child, kinds in (
        ("attention.self", attention, known.attentions),
        ("attention.output", mix, known.residuals),
        ("intermediate", intermediate, known.intermediates),
        ("output", output, known.residuals),
    ):
        if isinstance(child, ReadForward):
            reason = why_not_as_read(child)
            if reason is not None:
                return f"{name}: {reason}"
        if type(child) not in kinds:
            return f"{name} is a {full_name(child)}"
    swapped = (attention, mix, intermediate, output)
    projections, mixed, grown, shrunk = (child._modules for child in swapped)
    for name, child in zip(_CONTAINERS, (block, *swapped), strict=True):
        reason = why_not_unwatched(child)
        if reason is not None and not (child is attention and _only_idle_hooks(child)):
            return f"{name} {reason}"
    linears = (
        projections["query"],
        projections["key"],
        projections["value"],
        mixed["dense"],
        grown["dense"],
        shrunk["dense"],
    )
    norms, dropouts = (mixed["LayerNorm"], shrunk["LayerNorm"]), (mixed["dropout"], shrunk["dropout"])
    for names, found, check in (
        (_LINEARS, linears, why_not_linear),
        (_NORMS, norms, why_not_layer_norm),
        (_DROPOUTS, dropouts, why_not_dropout),
    ):
        for name, child in zip(names, found, strict=True):
            reason = check(child)
            if reason is not None:
                return f"{name} {reason}"
    activation = activation_name(grown["intermediate_act_fn"])
    if activation is None:
        return "intermediate.intermediate_act_fn has no kernel"
    q, k, v, o, up, down, first, second = (
        (child._parameters["weight"], child._parameters["bias"]) for child in (*linears, *norms)
    )
    return _WholeLayer(swapped, dropouts, norms, activation, (*q, *k, *v, *o, *first, *up, *down, *second))


_CONTAINERS = ("attention", "attention.self", "attention.output", "intermediate", "output")
_LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")
_DROPOUTS = ("attention.output.dropout", "output.dropout")


def _only_idle_hooks(attention: nn.Module) -> bool:
    """Whether all that watches the attention are hooks by which transformers collects outputs, none of which does.

    transformers installs them for good the first time that a model is asked for hidden states or attention weights.
    """
    if torch.compiler.is_compiling():
        return False
    hooks = attention._forward_hooks
    if not hooks or attention._forward_pre_hooks or attention._backward_hooks or attention._backward_pre_hooks:
        return False
    if any(getattr(hook, "__qualname__", "") != _COLLECTING_HOOK for hook in hooks.values()):
        return False
    collected = output_capturing._active_collector.get()
    return collected is None or "attentions" not in collected


_COLLECTING_HOOK = "install_output_capuring_hook.<locals>.output_capturing_hook"


# ---- which classes ---------------------------------------------------------------------------------------------------


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward is a copy of one of these."""
    if is_copy(module_class.forward, _ATTENTION):
        return Reading(BertSelfAttention, _attention_recipe)
    if _is_layer(module_class):
        siblings = _siblings(module_class)
        return Reading(BertLayer, _layer_recipe, {"fastattn_parts": _parts_of(siblings)}, siblings)
    return None


def _is_layer(module_class: type[nn.Module]) -> bool:
    chunk = vars(module_class).get("feed_forward_chunk")
    return is_copy(module_class.forward, _LAYER) and is_copy(chunk, _CHUNK)


# As they are when this file is imported: another library may replace them later.
_ATTENTION, _BLOCK = modeling_bert.BertSelfAttention.forward, modeling_bert.BertAttention.forward
_LAYER, _CHUNK = modeling_bert.BertLayer.forward, modeling_bert.BertLayer.feed_forward_chunk


def _siblings(layer_class: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    """The classes of modules, but layers, in the file of a layer's class."""
    found = vars(sys.modules[layer_class.__module__]).values()
    modules = (each for each in found if isinstance(each, type) and issubclass(each, nn.Module))
    return tuple(each for each in modules if not _is_layer(each))


def _parts_of(siblings: tuple[type[nn.Module], ...]) -> _Parts:
    """What of a file's classes its layers may be built of."""
    parts: dict[str, list[Any]] = {name: [] for name in _Parts._fields}
    for sibling in siblings:
        if is_copy(sibling.forward, _BLOCK):
            parts["blocks"].append((sibling, sibling.forward))
        recipe = recipe_for(sibling)
        if recipe is None:
            continue
        swapped: Any = recipe.swapped
        if issubclass(swapped, BertSelfAttention):
            parts["attentions"].append(swapped)
        elif issubclass(swapped, ResidualNorm) and swapped.fastattn_children == ("dense", "dropout", "LayerNorm"):
            parts["residuals"].append(swapped)
        elif issubclass(swapped, LinearAct) and swapped.fastattn_block == _INTERMEDIATE:
            parts["intermediates"].append(swapped)
    return _Parts(**{name: tuple(classes) for name, classes in parts.items()})


_INTERMEDIATE = Block("dense", Named("intermediate_act_fn"))


def _attention_recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(
        swapped,
        kernels={"attention": "attention", "linears": "linear (q, k, v)"},
        takes=("self", "hidden_states", "attention_mask", _CACHE, "kwargs"),
        children=always(*((name, "linears", why_not_linear) for name in ("query", "key", "value"))),
        interface=True,
    )


def _layer_recipe(swapped: type[Swapped]) -> Recipe:
    known: _Parts = swapped.fastattn_parts  # type: ignore[attr-defined]

    def refuse(module: nn.Module) -> list[str]:
        """Why the layer can never be one call."""
        layer: Any = module
        reasons = []
        for name, child, kinds in (
            ("attention.self", layer.attention.self, known.attentions),
            ("attention.output", layer.attention.output, known.residuals),
            ("intermediate", layer.intermediate, known.intermediates),
            ("output", layer.output, known.residuals),
        ):
            recipe = recipe_for(type(child)) if not isinstance(child, Swapped) else None
            if (type(child) if recipe is None else recipe.swapped) not in kinds:
                reasons.append(f"{name} is a {full_name(child)}, which works otherwise than BERT's")
            elif recipe is not None:
                reasons += recipe.refuse(child)
        return reasons

    return Recipe(
        swapped,
        kernels=dict.fromkeys(PARTS, "encoder_layer"),
        takes=(
            "self",
            "hidden_states",
            "attention_mask",
            "encoder_hidden_states",
            "encoder_attention_mask",
            _CACHE,
            "kwargs",
        ),
        refuse=refuse,
        whole=True,
    )
