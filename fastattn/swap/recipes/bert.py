"""BERT of transformers and its copies (RoBERTa, XLM-R, Electra, ...): whole layers, and their self-attention.

BertLayer            the whole layer as one call, in inference and where every child is plain; else its children
BertSelfAttention    q, k and v as linears; attention through the interface, on the config that swap copied

The other parts of a layer are recognised by `norm` (BertSelfOutput, BertOutput) and `feedforward` (BertIntermediate).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert

from fastattn.nn.checks import full_name, why_not_dropout, why_not_linear, why_not_unwatched
from fastattn.nn.counting import note_call
from fastattn.nn.norm import why_not_layer_norm
from fastattn.swap.code import is_copy
from fastattn.swap.originals import original
from fastattn.swap.reading import ReadForward, Reading, classes_beside, why_not_as_read
from fastattn.swap.recipe import PARTS, Recipe, always, parameters
from fastattn.swap.recipes.activations import activation_name
from fastattn.swap.recipes.feedforward import Block, LinearAct, Named
from fastattn.swap.recipes.interface import gives_weights, note_interface, why_not_transformers
from fastattn.swap.recipes.linear import linear, split_heads
from fastattn.swap.recipes.norm import ResidualNorm
from fastattn.swap.recipes.whole_layer import WholeLayer, run_whole, wants_one_call, why_not_unwatched_attention
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
    """A layer. hidden_states (B, S, hidden) -> (B, S, hidden). In one call where `whole_layer` allows it and neither a
    cache nor a cross-attention is there."""

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
        is_encoding = encoder_hidden_states is None and cache is None and _takes_all_rows(self)
        if is_encoding and wants_one_call(hidden_states, kwargs):
            y = run_whole(self, _whole_layer(self), hidden_states, attention_mask)
            if y is not None:
                return y
        return super().forward(  # type: ignore[misc, no-any-return]
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **{_CACHE: cache},
            **kwargs,
        )


# ---- the layer as one call -------------------------------------------------------------------------------------------


def _takes_all_rows(layer: BertLayer) -> bool:
    """Whether the feed-forward block takes all rows at once."""
    return layer.chunk_size_feed_forward == 0 and "feed_forward_chunk" not in layer.__dict__


def _whole_layer(layer: BertLayer) -> WholeLayer | str:
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
        reason = why_not_unwatched_attention(child) if child is attention else why_not_unwatched(child)
        if reason is not None:
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
    return WholeLayer(
        attention,
        swapped,
        heads=attention.num_attention_heads,
        scale=attention.scaling,
        activation=activation,
        norm_first=False,
        norms=norms,
        is_causal=attention.is_causal,
        drops=(attention.training and attention.dropout.p > 0.0)
        or any([dropout.training and dropout.p > 0.0 for dropout in dropouts]),
        tensors=(*q, *k, *v, *o, *first, *up, *down, *second),
    )


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


# ---- which classes ---------------------------------------------------------------------------------------------------


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward is a copy of one of these."""
    if is_copy(module_class.forward, _ATTENTION):
        return Reading(BertSelfAttention, _attention_recipe)
    if _is_layer(module_class):
        siblings = _siblings(module_class)
        methods = {"feed_forward_chunk": vars(module_class)["feed_forward_chunk"]}
        attributes = {"fastattn_parts": _parts_of(siblings), "fastattn_methods": methods}
        return Reading(BertLayer, _layer_recipe, attributes, siblings)
    return None


def _is_layer(module_class: type[nn.Module]) -> bool:
    chunk = vars(module_class).get("feed_forward_chunk")
    return is_copy(module_class.forward, _LAYER) and is_copy(chunk, _CHUNK)


_ATTENTION, _BLOCK, _LAYER, _CHUNK = (
    original("models.bert.modeling_bert", path)
    for path in (
        "BertSelfAttention.forward",
        "BertAttention.forward",
        "BertLayer.forward",
        "BertLayer.feed_forward_chunk",
    )
)


def _siblings(layer_class: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    """The classes of modules, but layers, in the file of a layer's class."""
    return tuple(each for each in classes_beside(layer_class) if not _is_layer(each))


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
        refuse=why_not_transformers,
        interface=True,
        weighs=gives_weights,
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
