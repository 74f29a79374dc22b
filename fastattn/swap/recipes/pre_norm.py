"""Layers that normalise first, as one call in inference: those of CLIP, SigLIP and ViT, and their many copies in the
text and vision towers of other models.

    h = x + attention(norm(x)), y = h + mlp(norm(h))

The attention, the norms and the block are recognised and swapped on their own, too; they run where the one call cannot
(`whole_layer`). What a model of small layers spends on the calls between its kernels is what this saves.

Times as fast as the original's layers, float32, one image or text, or eight of 77 tokens; one run for all three, 2
cores of an AMD EPYC (Zen 5), torch 2.13.0, 2026-11-27:

                  ViT of 64 features   of 192   of 768   CLIP's text encoder, 16 tokens   77 tokens   8 x 77
    parts alone                 1.08     1.60     2.09                             1.83        1.88     2.07
    one call                    1.67     1.95     2.23                             2.18        2.06     2.23
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from fastattn.nn.checks import why_not_dropout, why_not_linear, why_not_unwatched
from fastattn.nn.counting import note_call
from fastattn.nn.norm import why_not_layer_norm
from fastattn.swap.code import is_copy
from fastattn.swap.originals import original
from fastattn.swap.reading import Reading, classes_beside
from fastattn.swap.recipe import PARTS, Recipe, parameters
from fastattn.swap.recipes.feedforward import FeedForward, dropout_rate
from fastattn.swap.recipes.linear import projection
from fastattn.swap.recipes.whole_layer import WholeLayer, run_whole, wants_one_call, why_not_unwatched_attention
from fastattn.swap.recognised import recipe_for
from fastattn.swap.swapped import Swapped


class _Layer(NamedTuple):
    """What a layer's forward calls its children."""

    attention: str
    norms: tuple[str, str]
    mlp: str
    dropout: str | None = None
    """Of both branches' results."""


class _Attention(NamedTuple):
    """What an attention's forward calls its parts, beside q_proj, k_proj, v_proj, head_dim and is_causal."""

    out: str
    scale: str
    dropout: str
    takes_is_causal: bool
    """Whether it hands is_causal on as it is given."""


class PreNormLayer(Swapped):
    """A layer. hidden_states (B, S, hidden) -> (B, S, hidden)."""

    fastattn_layer: ClassVar[_Layer]
    fastattn_attentions: ClassVar[dict[type[nn.Module], tuple[object, _Attention]]]
    """The swapped attentions of the original's file that the operator stands for, with the forwards that were read."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        note_call(self)
        is_causal = kwargs.get("is_causal")
        others = {name: value for name, value in kwargs.items() if name != "is_causal"}
        if wants_one_call(hidden_states, others):
            whole = _whole_layer(self, hidden_states, is_causal)
            y = None if whole is None else run_whole(self, whole, hidden_states, attention_mask)
            if y is not None:
                return y
        return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc, no-any-return]


def _whole_layer(layer: PreNormLayer, x: Tensor, is_causal: bool | None) -> WholeLayer | None:
    """The parts of the layer; None where a child is more or other than the plain operation. Asked on every call.

    That is no fallback of the layer: the children are called, and each says of itself what it cannot do.
    """
    children, names = layer._modules, layer.fastattn_layer
    attention: Any = children[names.attention]
    mlp = children[names.mlp]
    forward, known = layer.fastattn_attentions.get(type(attention), (None, None))
    if known is None or type(attention).fastattn_original.forward is not forward or not isinstance(mlp, FeedForward):
        return None
    block = mlp.fastattn_call(x)
    if isinstance(block, str) or block.halves is not None:
        return None
    last_p = dropout_rate(mlp, block.last)
    projections = [attention._modules[name] for name in ("q_proj", "k_proj", "v_proj", known.out)]
    norms: Any = [children[name] for name in names.norms]
    dropout: Any = None if names.dropout is None else children[names.dropout]
    if (
        isinstance(last_p, str)
        or block.down is None
        or why_not_unwatched_attention(attention) is not None
        or why_not_unwatched(mlp) is not None
        or any([why_not_linear(each) is not None for each in projections])
        or any([why_not_layer_norm(norm) is not None for norm in norms])
        or (dropout is not None and why_not_dropout(dropout) is not None)
    ):
        return None
    q, k, v, o, first, second = (
        (each._parameters["weight"], each._parameters["bias"]) for each in (*projections, *norms)
    )
    return WholeLayer(
        attention,
        (attention, mlp, *projections, *norms),
        heads=q[0].shape[0] // attention.head_dim,
        scale=getattr(attention, known.scale),
        activation=block.activation,
        norm_first=True,
        norms=(norms[0], norms[1]),
        is_causal=attention.is_causal if is_causal is None or not known.takes_is_causal else is_causal,
        drops=block.dropout_p > 0.0
        or last_p > 0.0
        or (attention.training and getattr(attention, known.dropout) > 0.0)
        or (dropout is not None and dropout.training and dropout.p > 0.0),
        tensors=(*q, *k, *v, *o, *first, *projection(block.up), *projection(block.down), *second),
    )


# ---- which classes ---------------------------------------------------------------------------------------------------


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward is a copy of one of these."""
    if parameters(module_class.forward) != _TAKES:
        return None
    layer = next((each for forward, each in _LAYERS if is_copy(module_class.forward, forward)), None)
    if layer is None:
        return None
    siblings = _siblings(module_class)
    attentions = _attentions_of(siblings)
    if not attentions:
        return None
    return Reading(PreNormLayer, _recipe, {"fastattn_layer": layer, "fastattn_attentions": attentions}, siblings)


_TAKES = ("self", "hidden_states", "attention_mask", "kwargs")


_LAYERS = (
    (
        original("models.clip.modeling_clip", "CLIPEncoderLayer.forward"),
        _Layer("self_attn", ("layer_norm1", "layer_norm2"), "mlp"),
    ),
    (
        original("models.vit.modeling_vit", "ViTLayer.forward"),
        _Layer("attention", ("layernorm_before", "layernorm_after"), "mlp", "dropout"),
    ),
)
_ATTENTIONS = (
    (
        original("models.clip.modeling_clip", "CLIPAttention.forward"),
        _Attention("out_proj", "scale", "dropout", takes_is_causal=True),
    ),
    (
        original("models.siglip.modeling_siglip", "SiglipAttention.forward"),
        _Attention("out_proj", "scale", "dropout", takes_is_causal=False),
    ),
    (
        original("models.vit.modeling_vit", "ViTAttention.forward"),
        _Attention("o_proj", "scaling", "attention_dropout", takes_is_causal=True),
    ),
)


def _attributes(forward: Any) -> set[str]:
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return set() if code is None else set(code.co_names)


def _siblings(layer_class: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    """The classes of modules in the file of a layer's class that ask the attention interface."""
    return tuple(each for each in classes_beside(layer_class) if "ALL_ATTENTION_FUNCTIONS" in _attributes(each.forward))


_EAGER = "eager_attention_forward"


def _attentions_of(siblings: Iterable[type[nn.Module]]) -> dict[type[nn.Module], tuple[object, _Attention]]:
    found: dict[type[nn.Module], tuple[object, _Attention]] = {}
    for sibling in siblings:
        for forward, attention in _ATTENTIONS:
            # With fastattn's attention named by the config nobody calls the eager one, of which there are many.
            recipe = recipe_for(sibling) if is_copy(sibling.forward, forward, ignoring_global=_EAGER) else None
            if recipe is not None:
                found[recipe.swapped] = (sibling.forward, attention)
    return found


def _recipe(swapped: type[Swapped]) -> Recipe:
    layer: _Layer = swapped.fastattn_layer  # type: ignore[attr-defined]
    attentions = swapped.fastattn_attentions  # type: ignore[attr-defined]

    def misfit(module: nn.Module) -> str | None:
        """Why the children are not what the names stand for: each of them is swapped alone then."""
        children = module._modules
        attention, mlp = children.get(layer.attention), children.get(layer.mlp)
        if _swapped_class(attention) not in attentions or not issubclass(_swapped_class(mlp), FeedForward):
            return "its attention or its feed-forward block is another one"
        norms = [children.get(name) for name in layer.norms]
        known = all(norm is not None and why_not_layer_norm(norm) is None for norm in norms)
        return None if known else "its norms are others"

    def refuse(module: nn.Module) -> list[str]:
        """Why the layer can never be one call."""
        reasons = []
        for name in (layer.attention, layer.mlp):
            child = module._modules[name]
            recipe = None if child is None or isinstance(child, Swapped) else recipe_for(type(child))
            reasons += [] if recipe is None or child is None else [f"{name}: {each}" for each in recipe.refuse(child)]
        return reasons

    return Recipe(
        swapped,
        kernels=dict.fromkeys(PARTS, "encoder_layer"),
        takes=_TAKES,
        misfit=misfit,
        refuse=refuse,
        whole=True,
    )


def _swapped_class(child: nn.Module | None) -> type[nn.Module]:
    """The class that a child is swapped to, or has been."""
    if child is None or isinstance(child, Swapped):
        return type(child)
    recipe = recipe_for(type(child))
    return type(child) if recipe is None or recipe.misfit(child) is not None else recipe.swapped
