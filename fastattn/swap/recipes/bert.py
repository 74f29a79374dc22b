"""BERT of transformers: whole layers, and their attention, projections, residual blocks and feed-forward.

BertLayer            the whole layer as one call, in inference and where every child is plain; else its children
BertSelfAttention    q, k and v as linears; attention through the interface, on the config that swap copied
BertCrossAttention   attention through the interface
BertSelfOutput       LayerNorm(dropout(linear(x)) + residual) as linear, then one fused dropout-add-LayerNorm
BertOutput           the same
BertIntermediate     act(linear(x)) as one kernel
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert
from transformers.utils import output_capturing

from fastattn.functional import encoder_layer, linear_act
from fastattn.integrations import transformers as interface
from fastattn.masks import Causal
from fastattn.nn.checks import full_name, why_not_dropout, why_not_input, why_not_linear, why_not_unwatched
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.norm import why_not_layer_norm
from fastattn.nn.sublayers import add_and_normalise, child_reason
from fastattn.ops.library import tracks_gradients
from fastattn.swap.recipe import PARTS, Recipe
from fastattn.swap.recipes.shared import InterfaceAttention, activation_name, note_interface
from fastattn.swap.swapped import Swapped


class BertSelfAttention(Swapped, modeling_bert.BertSelfAttention):
    """Self-attention. hidden_states (B, S, hidden) -> ((B, S, hidden), attention weights or None)."""

    fastattn_original = modeling_bert.BertSelfAttention

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        note_call(self)
        note_interface(self)
        query = self._heads(_linear(self, "query", hidden_states, "linears"))
        key = self._heads(_linear(self, "key", hidden_states, "linears"))
        value = self._heads(_linear(self, "value", hidden_states, "linears"))
        if past_key_values is not None:
            is_pair = isinstance(past_key_values, EncoderDecoderCache)
            cache = past_key_values.self_attention_cache if is_pair else past_key_values
            key, value = cache.update(key, value, self.layer_idx)
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

    def _heads(self, x: Tensor) -> Tensor:
        """(B, S, H*D) -> (B, H, S, D), a view."""
        return x.view(*x.shape[:-1], -1, self.attention_head_size).transpose(1, 2)


class BertCrossAttention(InterfaceAttention, modeling_bert.BertCrossAttention):
    """Cross-attention: the original forward, whose attention comes through the interface."""

    fastattn_original = modeling_bert.BertCrossAttention


class BertSelfOutput(Swapped, modeling_bert.BertSelfOutput):
    """LayerNorm(dropout(dense(hidden_states)) + input_tensor), both (B, S, hidden)."""

    fastattn_original = modeling_bert.BertSelfOutput

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        note_call(self)
        x = _linear(self, "dense", hidden_states, "linears")
        return add_and_normalise(self, x, input_tensor, "dropout", "LayerNorm")[0]


class BertOutput(Swapped, modeling_bert.BertOutput):
    """LayerNorm(dropout(dense(hidden_states)) + input_tensor); hidden_states (B, S, intermediate)."""

    fastattn_original = modeling_bert.BertOutput

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        note_call(self)
        x = _linear(self, "dense", hidden_states, "ffns")
        return add_and_normalise(self, x, input_tensor, "dropout", "LayerNorm")[0]


class BertIntermediate(Swapped, modeling_bert.BertIntermediate):
    """act(dense(hidden_states)): (B, S, hidden) -> (B, S, intermediate)."""

    fastattn_original = modeling_bert.BertIntermediate

    def forward(self, hidden_states: Tensor) -> Tensor:
        note_call(self)
        activation = activation_name(self.intermediate_act_fn)
        reason = why_not_input(hidden_states) or child_reason("dense", why_not_linear(self.dense))
        if activation is None:
            reason = reason or "intermediate_act_fn has no kernel"
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(hidden_states)
        dense = self.dense
        return linear_act(hidden_states, dense.weight, dense.bias, activation, backend=self.fastattn_backend)


class BertLayer(Swapped, modeling_bert.BertLayer):
    """A layer. hidden_states (B, S, hidden) -> (B, S, hidden).

    One operator runs it where CPU tensors go through in inference and every child would do nothing but the plain
    operation. In training, with a cache, a cross-attention, attention weights asked for and so on its children are
    called, each on its own kernels.
    """

    fastattn_original = modeling_bert.BertLayer

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        note_call(self)
        if encoder_hidden_states is None and past_key_values is None and _wants_one_call(self, hidden_states, kwargs):
            whole = _whole_layer(self)
            if isinstance(whole, str):
                note_fallback(self, whole)
            elif whole.serves(hidden_states, attention_mask):
                for child in whole.swapped:
                    note_call(child)
                return whole.run(hidden_states, attention_mask, self.fastattn_backend)
        return super().forward(
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
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

    swapped: tuple[BertSelfAttention, BertSelfOutput, BertIntermediate, BertOutput]
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
    if type(block) is not modeling_bert.BertAttention:
        return f"attention is a {full_name(block)}"
    attention, mix = block._modules["self"], block._modules["output"]
    for name, child, kind in (
        ("attention.self", attention, BertSelfAttention),
        ("attention.output", mix, BertSelfOutput),
        ("intermediate", intermediate, BertIntermediate),
        ("output", output, BertOutput),
    ):
        if type(child) is not kind:
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


# ---- what the forwards share -----------------------------------------------------------------------------------------


def _linear(module: Swapped, name: str, x: Tensor, part: str) -> Tensor:
    """The child nn.Linear `name` applied to x: by the kernel where it is plain, by calling it where it is not."""
    child = getattr(module, name)
    if part in module.fastattn_off:
        return child(x)
    reason = why_not_input(x) or child_reason(name, why_not_linear(child))
    if reason is not None:
        note_fallback(module, reason)
        return child(x)
    return linear_act(x, child.weight, child.bias, backend=module.fastattn_backend)


# ---- what swap and plan ask ------------------------------------------------------------------------------------------


def _refuse_intermediate(module: nn.Module) -> list[str]:
    if activation_name(module.intermediate_act_fn) is None:
        function = module.intermediate_act_fn
        name = getattr(function, "__name__", type(function).__name__)
        return [f"the activation {name} has no kernel"]
    return []


def _refuse_layer(module: nn.Module) -> list[str]:
    reasons = _refuse_intermediate(module.intermediate)
    for function, known in (
        (modeling_bert.BertAttention.forward, _ATTENTION_TAKES),
        (modeling_bert.BertLayer.feed_forward_chunk, ("self", "attention_output")),
    ):
        found = tuple(inspect.signature(function).parameters)
        if found != known:
            reasons.append(f"{function.__qualname__} takes {', '.join(found)}; the recipe knows {', '.join(known)}")
    return reasons


_ATTENTION_TAKES = (
    "self",
    "hidden_states",
    "attention_mask",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "past_key_values",
    "kwargs",
)
_PROJECTIONS = tuple((name, "linears", why_not_linear) for name in ("query", "key", "value"))
_NORM = (("LayerNorm", "norms", why_not_layer_norm), ("dropout", "norms", why_not_dropout))
_ALL_RECIPES = (
    Recipe(
        BertLayer,
        kernels=dict.fromkeys(PARTS, "encoder_layer"),
        takes=_ATTENTION_TAKES,
        refuse=_refuse_layer,
        whole=True,
    ),
    Recipe(
        BertSelfAttention,
        kernels={"attention": "attention", "linears": "linear (q, k, v)"},
        takes=("self", "hidden_states", "attention_mask", "past_key_values", "kwargs"),
        children=_PROJECTIONS,
        interface=True,
    ),
    Recipe(
        BertCrossAttention,
        kernels={"attention": "attention"},
        takes=("self", "hidden_states", "encoder_hidden_states", "attention_mask", "past_key_values", "kwargs"),
        interface=True,
    ),
    Recipe(
        BertSelfOutput,
        kernels={"linears": "linear", "norms": "dropout_add_layer_norm"},
        takes=("self", "hidden_states", "input_tensor"),
        children=(("dense", "linears", why_not_linear), *_NORM),
    ),
    Recipe(
        BertOutput,
        kernels={"ffns": "linear", "norms": "dropout_add_layer_norm"},
        takes=("self", "hidden_states", "input_tensor"),
        children=(("dense", "ffns", why_not_linear), *_NORM),
    ),
    Recipe(
        BertIntermediate,
        kernels={"ffns": "linear_act"},
        takes=("self", "hidden_states"),
        children=(("dense", "ffns", why_not_linear),),
        refuse=_refuse_intermediate,
    ),
)

RECIPES = {recipe.original: recipe for recipe in _ALL_RECIPES}
