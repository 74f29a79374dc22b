"""TransformerEncoderLayer and TransformerEncoder: torch.nn's, on fastattn's kernels."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.transformer import _detect_is_causal_mask, _get_seq_len

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.attention_masks import read_masks, why_not_masks
from fastattn.nn.checks import why_not_helpers, why_not_unwatched
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.fused import Fused, stands_for
from fastattn.nn.sublayers import add_and_normalise, feed_forward, normalise
from fastattn.nn.whole_layer import WholeLayer, whole_layer
from fastattn.ops.library import is_differentiated

_HELPERS = {name: getattr(nn.TransformerEncoderLayer, name) for name in ("_sa_block", "_ff_block")}


class TransformerEncoderLayer(Fused, nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer: arguments, attributes, initialisation and state_dict are torch's, and so are the
    results, those of its inference fast path included.

        norm last    h = norm1(src + dropout1(self_attn(src)))    out = norm2(h + dropout2(ff(h)))
        norm first   h = src + dropout1(self_attn(norm1(src)))    out = h + dropout2(ff(norm2(h)))
        ff(x) = linear2(dropout(activation(linear1(x))))

    src (S, B, E), with batch_first (B, S, E), without a batch (S, E); float32, bfloat16 or float16; in inference also a
    nested tensor of (S_i, E), as torch's fast path takes it. src_mask (S, S) or (B*H, S, S) and src_key_padding_mask
    (B, S): bool, where True is *not* attended to, or float, which is added. Returns src's shape.

    A query that sees no key gets attention 0 (see `MultiheadAttention`). is_causal=True says that src_mask is the
    causal mask; without a src_mask it is an error in training and without effect in inference, as in torch.

    relu, gelu and silu, as functions or modules, run inside the feed-forward kernel; another callable is called. A
    child that is not plain (hooked, replaced, quantised, sharded) is called too, and both are counted. A layer whose
    _sa_block or _ff_block is not torch's runs torch's forward, which calls them.
    """

    fastattn_original = nn.TransformerEncoderLayer

    __signature__ = inspect.signature(nn.TransformerEncoderLayer)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention  # made and initialised by torch, so with torch's random numbers

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        note_call(self)
        if src.is_nested:
            result = self._nested(src) if src_mask is None and src_key_padding_mask is None else None
            if result is not None:
                return result
            note_fallback(self, "the input is a nested tensor")
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        reason = why_not_helpers(self, _HELPERS)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if not stands_for(self.self_attn, nn.MultiheadAttention):
            src_mask, src_key_padding_mask = additive_masks(src, src_mask, src_key_padding_mask, "src_mask")
        whole = None if self.training and is_causal and src_mask is None else whole_layer(self, src)
        if whole is not None:
            is_causal = is_causal and src_mask is not None
            result = self._run(whole, src, src_mask, src_key_padding_mask, is_causal)
            if result is not None:
                return result
        elif is_causal and src_mask is None and not self.training and not is_differentiated(src, *self.parameters()):
            is_causal = False
        if self.norm_first:
            normal = normalise(self, src, "norm1")
            attended = self._attend(normal, src_mask, src_key_padding_mask, is_causal)
            normal, hidden = add_and_normalise(self, attended, src, "dropout1", "norm2")
            return hidden + self.dropout2(feed_forward(self, normal))
        attended = self._attend(src, src_mask, src_key_padding_mask, is_causal)
        hidden, _ = add_and_normalise(self, attended, src, "dropout1", "norm1")
        return add_and_normalise(self, feed_forward(self, hidden), hidden, "dropout2", "norm2")[0]

    def _run(
        self,
        whole: WholeLayer,
        src: Tensor,
        src_mask: Tensor | None,
        src_key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor | None:
        """The layer as one operator; None for masks that it does not take: those that add to the scores."""
        first = self.self_attn.batch_first
        x = src.unsqueeze(0) if src.dim() == 2 else src if first else src.transpose(0, 1)
        batch, length = x.shape[:2]
        heads = self.self_attn.num_heads
        if why_not_masks(src_mask, src_key_padding_mask, src, (batch, heads, length, length)) is not None:
            return None
        causal = is_causal and src_key_padding_mask is None
        masks = read_masks(src_mask, src_key_padding_mask, heads=heads, causal=causal, extra_keys=0)
        if masks.bias is not None:
            return None
        out = whole.run(x, mask=masks.visible())
        return out.squeeze(0) if src.dim() == 2 else out if first else out.transpose(0, 1)

    def _nested(self, src: Tensor) -> Tensor | None:
        """A strided nested tensor through the layer, its rows packed as they lie."""
        if type(src) is not Tensor or src.layout is not torch.strided or src.requires_grad or not src.is_contiguous():
            return None
        sizes = src._nested_tensor_size()
        rows = src.values().view(-1, self.self_attn.embed_dim)
        whole = whole_layer(self, rows)
        if whole is None:
            return None
        out = whole.run(rows, cu_seqlens=row_bounds(sizes[:, 0]))
        strides, offsets = src._nested_tensor_strides(), src._nested_tensor_storage_offsets()
        return torch._nested_view_from_buffer(out.view(-1), sizes, strides, offsets)

    def _attend(self, x: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool) -> Tensor:
        output: Tensor = self.self_attn(
            x, x, x, attn_mask=mask, key_padding_mask=key_padding_mask, need_weights=False, is_causal=is_causal
        )[0]
        return output


class TransformerEncoder(Fused, nn.TransformerEncoder):
    """nn.TransformerEncoder: arguments, attributes and state_dict are torch's, and so are the results.

    src (S, B, E), with batch_first layers (B, S, E), without a batch (S, E). mask (S, S) or (B*H, S, S) and
    src_key_padding_mask (B, S) as in `TransformerEncoderLayer`. Returns src's shape.

    Under the conditions in which torch goes over to nested tensors (inference with a src_key_padding_mask and no mask,
    padding behind, enable_nested_tensor, ...) only rows that are not padding are computed, and padded rows are 0 before
    `norm`.
    """

    fastattn_original = nn.TransformerEncoder

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        note_call(self)
        added, added_padding = additive_masks(src, mask, src_key_padding_mask, "mask")
        is_causal = _detect_is_causal_mask(added, is_causal, _get_seq_len(src, self.layers[0].self_attn.batch_first))
        if not all([stands_for(layer, nn.TransformerEncoderLayer) for layer in self.layers]):
            mask, src_key_padding_mask = added, added_padding
        padding = None
        if self._drops_padding(src, mask, src_key_padding_mask):
            assert src_key_padding_mask is not None
            padding = _padding_behind(src_key_padding_mask)
            src_key_padding_mask = padding
        output = None if padding is None else self._encode_rows(src, padding)
        if output is None:
            output = src
            for layer in self.layers:
                output = layer(output, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask)
            if padding is not None:
                output = output.masked_fill(padding.unsqueeze(-1), 0.0)
        return output if self.norm is None else self.norm(output)

    def _encode_rows(self, src: Tensor, padding: Tensor) -> Tensor | None:
        """All layers on the rows that are not padding, packed; None where a layer has to be called."""
        if torch.compiler.is_compiling():  # the number of rows is a value, on which a graph would break
            return None
        layers = [None if _is_called(layer) else whole_layer(layer, src) for layer in self.layers]
        if any(whole is None for whole in layers):
            return None
        kept = ~padding
        index = kept.flatten().nonzero().squeeze(1)
        rows, bounds = src.flatten(0, 1).index_select(0, index), row_bounds(kept.sum(dim=1))
        for layer, whole in zip(self.layers, layers, strict=True):
            assert whole is not None
            note_call(layer)
            rows = whole.run(rows, cu_seqlens=bounds)
        return src.new_zeros(src.shape).flatten(0, 1).index_copy_(0, index, rows).view(src.shape)

    def _drops_padding(self, src: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None) -> bool:
        """Whether torch goes over to nested tensors here, by the conditions of its forward; they show in the padded
        rows of the output. Unlike torch's, a float mask that does more than hide keys is not taken for padding."""
        first = self.layers[0]
        if (
            key_padding_mask is None
            or mask is not None
            or not torch.backends.mha.get_fastpath_enabled()
            or not getattr(self, "use_nested_tensor", False)
            or first.training
            or src.is_nested
            or src.dim() != 3
            or torch.is_autocast_enabled()
        ):
            return False
        if getattr(self, "mask_check", True) and (
            torch.compiler.is_compiling()
            or not torch._nested_tensor_from_mask_left_aligned(src, key_padding_mask.logical_not())
        ):
            return False
        if key_padding_mask.is_floating_point() and not (key_padding_mask.isneginf() | (key_padding_mask == 0)).all():
            return False
        attention = first.self_attn
        modules = (attention.out_proj, first.norm1, first.norm2, first.linear1, first.linear2)
        tensors = [src, attention.in_proj_weight, attention.in_proj_bias]
        tensors += [tensor for module in modules for tensor in (module.weight, module.bias)]
        if torch.overrides.has_torch_function(tensors) or src.device.type not in ("cpu", "cuda", "xpu"):
            return False
        return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _is_called(layer: nn.Module) -> bool:
    """Whether the layer's own forward has to run."""
    return why_not_unwatched(layer) is not None or why_not_helpers(layer, _HELPERS) is not None


def additive_masks(
    src: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None, mask_name: str
) -> tuple[Tensor | None, Tensor | None]:
    """Both masks in the float form in which torch's layers hand them on, with torch's errors and warnings."""
    key_padding_mask = F._canonical_mask(
        mask=key_padding_mask,
        mask_name="src_key_padding_mask",
        other_type=F._none_or_dtype(mask),
        other_name=mask_name,
        target_type=src.dtype,
    )
    mask = F._canonical_mask(
        mask=mask, mask_name=mask_name, other_type=None, other_name="", target_type=src.dtype, check_other=False
    )
    return mask, key_padding_mask


def row_bounds(lengths: Tensor) -> Tensor:
    """int32 (B + 1): where packed sequences of these lengths begin and end."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _padding_behind(key_padding_mask: Tensor) -> Tensor:
    """Bool (B, S): as many keys hidden as in the mask, all of them behind, as torch's nested tensors place them."""
    lengths = key_padding_mask.logical_not().sum(dim=1, keepdim=True)
    return torch.arange(key_padding_mask.shape[1], device=key_padding_mask.device) >= lengths
