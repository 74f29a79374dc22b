"""DeBERTa-v2 and v3 of transformers: attention whose scores also compare contents with distances.

DisentangledSelfAttention   q, k, v as linears; attention with the distances' scores as a bias, and the model's mask

The original projects every distance that the model knows and compares all of them with every token; here those alone
that occur between the tokens there are. Its scores of contents are the kernel's, those of distances stay a tensor. The
other parts of a layer are recognised by `norm` and `feedforward`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastattn.functional import attention
from fastattn.masks.cache import Cache, stream_of
from fastattn.nn.checks import why_not_dropout, why_not_head_dim, why_not_input, why_not_linear
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.sublayers import child_reason
from fastattn.swap.code import is_copy
from fastattn.swap.originals import original
from fastattn.swap.reading import Reading, ReadMethods, why_not_as_read
from fastattn.swap.recipe import Recipe, always
from fastattn.swap.recipes.eager_mask import can_be_read, compact_seen
from fastattn.swap.recipes.linear import linear, split_heads
from fastattn.swap.swapped import Swapped


class DisentangledSelfAttention(ReadMethods):
    """hidden_states (B, S, hidden) -> ((B, S, hidden), None).

    attention_mask: (B, 1, S, S), 0 where a key is hidden; relative_pos: integers (1, S, S), the distance from key to
    query or its bucket; rel_embeddings: (distances, hidden). Asked for attention weights (output_attentions=True) it
    runs the original, which forms them.
    """

    # What the original holds.
    attention_head_size: int
    dropout: nn.Dropout
    pos_att_type: list[str]
    pos_dropout: nn.Module
    pos_ebd_size: int
    relative_attention: bool
    share_att_key: bool

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        note_call(self)
        reason = _why_not(self, hidden_states, output_attentions, query_states, relative_pos)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(  # type: ignore[misc, no-any-return]
                hidden_states, attention_mask, output_attentions, query_states, relative_pos, rel_embeddings
            )
        query, key, value = (
            split_heads(linear(self, name, x, "linears"), self.attention_head_size)
            for name, x in (
                ("query_proj", hidden_states if query_states is None else query_states),
                ("key_proj", hidden_states),
                ("value_proj", hidden_states),
            )
        )
        # Of contents, and of each way to compare contents with distances.
        terms = 1 + ("c2p" in self.pos_att_type) + ("p2c" in self.pos_att_type)
        scale = 1.0 / math.sqrt(query.shape[3] * terms)
        bias = None
        if self.relative_attention and terms > 1:
            assert relative_pos is not None and rel_embeddings is not None
            bias = _bias(self, query, key, _distances(self, relative_pos), self.pos_dropout(rel_embeddings), scale)
        out = attention(
            query,
            key,
            value,
            mask=compact_seen(attention_mask),
            bias=bias,
            scale=scale,
            dropout_p=self.dropout.p if self.dropout.training else 0.0,
            backend=self.fastattn_backend,
        )
        return out.transpose(1, 2).flatten(2), None


def _why_not(
    module: DisentangledSelfAttention,
    hidden_states: Tensor,
    output_attentions: bool,
    query_states: Tensor | None,
    relative_pos: Tensor | None,
) -> str | None:
    if output_attentions:
        return "the attention weights are asked for (output_attentions=True)"
    length = hidden_states.shape[1]
    if query_states is not None and query_states.shape[1] != length:
        return "it has other queries than keys"
    if module.relative_attention and (relative_pos is None or relative_pos.numel() != length * length):
        return "its distances are not given, or differ between samples"
    return (
        why_not_as_read(module)
        or why_not_input(hidden_states, module.fastattn_backend)
        or child_reason("dropout", why_not_dropout(module.dropout))
        or why_not_head_dim(module.attention_head_size)
    )


# ---- scores of distances ---------------------------------------------------------------------------------------------


class _Distances(NamedTuple):
    """Rows `first` to `end` of the embeddings hold all distances that occur. forth and back: int64 (S, S), the rows,
    counted from the first, of the distance from key to query and from query to key."""

    first: int
    end: int
    forth: Tensor
    back: Tensor


def _distances(module: DisentangledSelfAttention, relative_pos: Tensor) -> _Distances:
    span = module.pos_ebd_size
    if not can_be_read(relative_pos):
        return _Distances(0, 2 * span, *_rows(relative_pos, span))
    bounds, forth, back = _remembered.get(
        (span, stream_of(relative_pos.device)), (relative_pos,), lambda: _occurring(relative_pos, span)
    )
    first, end = bounds.tolist()
    return _Distances(first, end, forth, back)


_remembered = Cache(entries=8, size=1 << 28)
"""All layers of a model get the same distances."""


def _occurring(relative_pos: Tensor, span: int) -> tuple[Tensor, Tensor, Tensor]:
    """First and end, and the rows counted from the first."""
    forth, back = _rows(relative_pos, span)
    first = torch.minimum(forth.amin(), back.amin())
    end = torch.maximum(forth.amax(), back.amax()) + 1
    return torch.stack([first, end]).cpu(), forth - first, back - first


def _rows(relative_pos: Tensor, span: int) -> tuple[Tensor, Tensor]:
    distance = relative_pos.reshape(relative_pos.shape[-2:]).long()
    return (distance + span).clamp(0, 2 * span - 1), (span - distance).clamp(0, 2 * span - 1)


def _bias(
    module: DisentangledSelfAttention,
    query: Tensor,
    key: Tensor,
    distances: _Distances,
    embeddings: Tensor,
    scale: float,
) -> Tensor:
    """(B, H, S, S): each query with its distance to each key, and each key with its distance to each query."""
    names = ("key_proj", "query_proj") if module.share_att_key else ("pos_key_proj", "pos_query_proj")
    bias: Tensor | None = None
    for kind, name, contents in (("c2p", names[0], query), ("p2c", names[1], key)):
        if kind not in module.pos_att_type:
            continue
        place = distances.forth if kind == "c2p" else distances.back
        first, end = distances.first, distances.end
        if why_not_linear(getattr(module, name)) is not None:
            # It is called, and may look at all that it is given, as a hook does, or the range of a quantised linear's
            # input: it gets what the original gives it.
            first, end, place = 0, 2 * module.pos_ebd_size, place + first
        projected = linear(module, name, embeddings[None, first:end], "linears") * scale
        projected = split_heads(projected, module.attention_head_size)
        scores = contents @ projected.transpose(2, 3)
        scores = scores.gather(3, place.expand(*scores.shape[:3], -1))
        scores = scores if kind == "c2p" else scores.transpose(2, 3)
        bias = scores if bias is None else bias + scores
    assert bias is not None
    return bias


# ---- which classes ---------------------------------------------------------------------------------------------------


_METHODS = {
    name: original("models.deberta_v2.modeling_deberta_v2", f"DisentangledSelfAttention.{name}")
    for name in ("forward", "transpose_for_scores", "disentangled_attention_bias")
}


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose methods are copies of this one's."""
    methods = {name: getattr(module_class, name, None) for name in _METHODS}
    if not all(is_copy(methods[name], _METHODS[name]) for name in _METHODS):
        return None
    return Reading(DisentangledSelfAttention, _recipe, {"fastattn_methods": methods})


def _recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(
        swapped,
        kernels={"attention": "attention", "linears": "linear (q, k, v, distances)"},
        takes=(
            "self",
            "hidden_states",
            "attention_mask",
            "output_attentions",
            "query_states",
            "relative_pos",
            "rel_embeddings",
        ),
        children=always(
            *((name, "linears", why_not_linear) for name in ("query_proj", "key_proj", "value_proj")),
            ("dropout", "attention", why_not_dropout),
        ),
        core="attention",
    )
