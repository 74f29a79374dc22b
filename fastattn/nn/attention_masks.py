"""The masks of nn.MultiheadAttention, where True hides a key, as masks and biases of fastattn, where True shows it.

    attn_mask           (L, S) or (B*H, L, S), bool or float
    key_padding_mask    (B, S), or (S,) for unbatched input, bool or float

A bool mask becomes a mask and a float one a bias, in the shape it has: nothing is expanded to (B, H, L, S).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.masks import Causal, Dense, KeyMask, Mask
from fastattn.nn.checks import is_plain


@dataclass(frozen=True)
class AttentionMasks:
    """What hides keys in one call, for B sequences, H heads, L queries and S keys.

    hidden_pairs    bool (1|B, 1|H, L, S), True hides
    hidden_keys     bool (B, S), True hides
    bias            float (1|B, 1|H, 1|L, S), added to the scores; -inf hides
    causal          query i sees keys 0 to i; the others are None then
    """

    hidden_pairs: Tensor | None = None
    hidden_keys: Tensor | None = None
    bias: Tensor | None = None
    causal: bool = False

    def visible(self) -> Mask | None:
        """The mask for fastattn.attention."""
        if self.causal:
            return Causal("top-left")
        pairs = None if self.hidden_pairs is None else Dense(~self.hidden_pairs)
        keys = None if self.hidden_keys is None else KeyMask(~self.hidden_keys)
        if pairs is None or keys is None:
            return keys if pairs is None else pairs
        return pairs & keys

    def hidden(self) -> Tensor | None:
        """Both bool masks as one that broadcasts to (B, H, L, S), True hides. Not for causal ones."""
        keys = None if self.hidden_keys is None else self.hidden_keys[:, None, None, :]
        if self.hidden_pairs is None or keys is None:
            return keys if self.hidden_pairs is None else self.hidden_pairs
        return self.hidden_pairs | keys


def why_not_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, sizes: tuple[int, int, int, int]
) -> str | None:
    """None for masks of the shapes above that the kernels can take beside `query`, else the reason.

    query: two dimensions where there is no batch, or three. sizes: B, H, L, S.
    """
    batch, heads, len_q, len_k = sizes
    if attn_mask is not None:
        reason = _why_not_mask("attn_mask", attn_mask, query)
        if reason is not None:
            return reason
        if attn_mask.shape != ((len_q, len_k) if attn_mask.dim() == 2 else (batch * heads, len_q, len_k)):
            return "attn_mask is neither (L, S) nor (batch * heads, L, S)"
    if key_padding_mask is not None:
        reason = _why_not_mask("key_padding_mask", key_padding_mask, query)
        if reason is not None:
            return reason
        if key_padding_mask.shape != ((batch, len_k) if query.dim() == 3 else (len_k,)):
            return "key_padding_mask is not (batch, S)"
    return None


def read_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, *, heads: int, causal: bool, extra_keys: int
) -> AttentionMasks:
    """The masks of a call that `why_not_masks` had nothing against.

    causal: attn_mask is only a causal one. extra_keys: keys behind those that the masks know, which every query sees.
    """
    if causal:
        return AttentionMasks(causal=True)
    if attn_mask is not None:
        attn_mask = _longer(attn_mask, extra_keys)
        attn_mask = (
            attn_mask[None, None]
            if attn_mask.dim() == 2
            else attn_mask.unflatten(0, (attn_mask.shape[0] // heads, heads))
        )
    if key_padding_mask is not None:
        key_padding_mask = _longer(key_padding_mask, extra_keys)
        key_padding_mask = key_padding_mask[None] if key_padding_mask.dim() == 1 else key_padding_mask
    pairs, keys, biases = None, None, []
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            pairs = attn_mask
        else:
            biases.append(attn_mask)
    if key_padding_mask is not None:
        if key_padding_mask.dtype == torch.bool:
            keys = key_padding_mask
        else:
            biases.append(key_padding_mask[:, None, None, :])
    bias = None if not biases else biases[0] if len(biases) == 1 else biases[0] + biases[1]
    return AttentionMasks(pairs, keys, bias)


def _why_not_mask(name: str, mask: Tensor, query: Tensor) -> str | None:
    if not is_plain(mask):
        return f"{name} is a {type(mask).__name__}, not a plain tensor"
    if mask.device != query.device:
        return f"{name} lies on {mask.device.type} beside a query on {query.device.type}"
    dtype = mask.dtype
    if dtype in (torch.bool, torch.float32, query.dtype):
        return None
    if dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(query.device.type):
        return None
    return f"{name} is {str(dtype).removeprefix('torch.')}"


def _longer(mask: Tensor, extra_keys: int) -> Tensor:
    """The mask with keys appended that it neither hides nor adds to."""
    return F.pad(mask, (0, extra_keys)) if extra_keys else mask
