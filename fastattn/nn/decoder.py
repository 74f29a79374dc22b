"""TransformerDecoderLayer: torch.nn's, on fastattn's kernels."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.checks import why_not_helpers
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.fused import Fused
from fastattn.nn.sublayers import add_and_normalise, feed_forward, normalise

_HELPERS = {name: getattr(nn.TransformerDecoderLayer, name) for name in ("_sa_block", "_mha_block", "_ff_block")}


class TransformerDecoderLayer(Fused, nn.TransformerDecoderLayer):
    """nn.TransformerDecoderLayer: arguments, attributes, initialisation and state_dict are torch's, and so are the
    results.

        norm last    a = norm1(tgt + dropout1(self_attn(tgt)))    b = norm2(a + dropout2(multihead_attn(a, memory)))
                     out = norm3(b + dropout3(ff(b)))
        norm first   the same with every norm at the beginning of its block instead
        ff(x) = linear2(dropout(activation(linear1(x))))

    tgt (T, B, E) and memory (S, B, E), with batch_first (B, T, E) and (B, S, E), without a batch (T, E) and (S, E);
    float32, bfloat16 or float16. tgt_mask (T, T) or (B*H, T, T), memory_mask (T, S) or (B*H, T, S),
    tgt_key_padding_mask (B, T), memory_key_padding_mask (B, S): bool, where True is *not* attended to, or float, which
    is added. tgt_is_causal and memory_is_causal say that the mask of that name, which must be given, is the causal one.
    Returns tgt's shape.

    Activations, children that are not plain, methods that are replaced and queries that see no key: as in
    `TransformerEncoderLayer`.
    """

    fastattn_original = nn.TransformerDecoderLayer

    __signature__ = inspect.signature(nn.TransformerDecoderLayer)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for attention in (self.self_attn, self.multihead_attn):
            attention.__class__ = MultiheadAttention  # made and initialised by torch, so with torch's random numbers

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        note_call(self)
        reason = why_not_helpers(self, _HELPERS)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        cross = (memory_mask, memory_key_padding_mask, memory_is_causal)
        if self.norm_first:
            normal = normalise(self, tgt, "norm1")
            attended = _attend(self.self_attn, normal, normal, *own)
            normal, x = add_and_normalise(self, attended, tgt, "dropout1", "norm2")
            attended = _attend(self.multihead_attn, normal, memory, *cross)
            normal, x = add_and_normalise(self, attended, x, "dropout2", "norm3")
            return x + self.dropout3(feed_forward(self, normal))
        x, _ = add_and_normalise(self, _attend(self.self_attn, tgt, tgt, *own), tgt, "dropout1", "norm1")
        x, _ = add_and_normalise(self, _attend(self.multihead_attn, x, memory, *cross), x, "dropout2", "norm2")
        return add_and_normalise(self, feed_forward(self, x), x, "dropout3", "norm3")[0]


def _attend(
    attention: nn.Module,
    x: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    output: Tensor = attention(
        x,
        memory,
        memory,
        attn_mask=mask,
        key_padding_mask=key_padding_mask,
        is_causal=is_causal,
        need_weights=False,
    )[0]
    return output
