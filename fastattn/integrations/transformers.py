"""fastattn as an attention implementation of Hugging Face transformers.

    from fastattn.integrations import transformers as fastattn_transformers
    fastattn_transformers.register()
    model.set_attn_implementation("fastattn")

Two functions are registered under one name, and belong together: `attention_forward` runs the attention,
`attention_mask` builds what it is given as a mask. Read against transformers 5.23 and 5.24 (masking_utils.py,
integrations/sdpa_attention.py); what older ones do otherwise: `transformers_versions`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import dispatch
from fastattn.functional import attention
from fastattn.functional.checks import is_batched
from fastattn.functional.plain import AS_FAST, on_torch, torch_is_as_fast
from fastattn.graphs import constant
from fastattn.integrations import why_not_transformers
from fastattn.integrations.mask_readers import masks_of_others
from fastattn.integrations.torch_attention import REPLACED, added_mask, chosen_keys, is_replaced, torch_attention
from fastattn.masks import Causal
from fastattn.nn.checks import why_no_kernels, why_not_head_dim
from fastattn.nn.counting import note_choice, note_fallback
from fastattn.nn.fused import Fused

try:
    from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay
    from transformers.utils import logging
    from transformers.utils.import_utils import is_torchdynamo_exporting

    from fastattn.integrations.transformers_versions import (
        bidirectional_mask_function,
        eager_mask,
        is_tracing,
        padding_mask,
        sdpa_mask,
        sliding_window_bidirectional_overlay,
        taking_positions,
        weights_are_collected,
    )
except ImportError as error:
    raise ImportError(f"fastattn.integrations.transformers: {why_not_transformers() or error}") from error

NAME = "fastattn"

logger = logging.get_logger(__name__)


def register() -> None:
    """Makes attn_implementation="fastattn" known to transformers, with its mask function; again, it changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, taking_positions(attention_mask))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    head_mask: Tensor | None = None,
    cache: object | None = None,
    sinks: object | None = None,
    block_indices: object | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of the transformers contract.

    query (B, Hq, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv), any strides; Hq % Hkv == 0, heads are not
    repeated. attention_mask: None, bool (4-D, True = visible), float (4-D, added to the scores) or int32
    (1|B, 1|Hq, Lq, 2) half-open key ranges. Without a mask and with Lq > 1 the attention is causal, aligned top-left,
    when `is_causal`, or else the module's attribute of that name (True where it has none), says so; with Lq == 1 every
    key is visible. softcap, s_aux (one sink logit per head) and position_bias (broadcastable to (B, Hq, Lq, Lk), added
    to the scores) are those of fastattn.attention. indices (B, Lq, n): the keys that an indexer chose for each query,
    which sees no other (DeepSeek-V3.2). head_mask (), (Hq) or (1|B, Hq, 1, 1): what transformers 4 multiplies each
    head's weights by. Other keyword arguments are ignored, as every attention function of transformers does.

    Head dims over 256, which no kernel takes, run on torch's attention; of a swapped module that is a fallback.

    Returns (out (B, Lq, Hq, Dv) contiguous in query's dtype, None). Attention weights are not formed: asked for
    (output_attentions=True) they are missing, with one warning, as with "sdpa"; but a swapped module whose original
    forms them runs its original's function, a fallback.
    Raises ValueError for a paged cache (`cache=`), for a mask that is not 4-D, for one sink per query (`sinks=`), and
    for chosen blocks of keys (`block_indices=`).
    """
    _check_known(attention_mask, cache, sinks, block_indices)
    own = module if isinstance(module, Fused) else None
    ran_eager = own is not None and own.fastattn_forms_weights
    if ran_eager and _is_head_mask(attention_mask, query, key):
        head_mask, attention_mask = attention_mask, None
    if own is not None and ran_eager and (kwargs.get("output_attentions") or weights_are_collected(own)):
        given = {"is_causal": is_causal, "softcap": softcap, "s_aux": s_aux, "position_bias": position_bias}
        given |= {"indices": indices, "head_mask": head_mask}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return _eagerly(own, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if kwargs.get("output_attentions"):
        logger.warning_once(
            "The `fastattn` attention does not form attention weights: `output_attentions=True` gives none. "
            'Set the attention to "eager" to get them.'
        )
    query, key, value = _same_batch(query, key, value)
    mask: Tensor | Causal | None = attention_mask
    if attention_mask is None and query.shape[2] > 1 and _is_causal(module, is_causal):
        mask = Causal("top-left")
        key, value, position_bias = _without_unfilled(query.shape[2], key, value, position_bias)
    if indices is not None:
        mask = chosen_keys(mask, indices, key.shape[2])
    backend = None if own is None else own.fastattn_backend
    reason = why_not_head_dim(max(query.shape[3], value.shape[3])) or why_no_kernels(query, backend)
    if own is not None and not ran_eager and is_replaced():
        reason = f"torch's {REPLACED} was replaced"
    if reason is not None:
        _note_torch(own, reason)
        out = torch_attention(query, key, value, mask, position_bias, scaling, softcap or 0.0, s_aux, dropout)
        return _result(out, head_mask)
    is_plain = (mask is None or isinstance(mask, Causal)) and position_bias is None and s_aux is None
    is_plain = is_plain and not softcap and dropout == 0.0
    if is_plain and torch_is_as_fast(query, key, value, mask is not None, scaling, backend):
        if own is not None:
            note_choice(own, AS_FAST)
        return _result(on_torch(query, key, value, mask is not None, scaling), head_mask)
    out = attention(
        query,
        key,
        value,
        mask=mask,
        bias=position_bias,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout_p=dropout,
        backend=backend,
    )
    return _result(out, head_mask)


def _check_known(
    attention_mask: Tensor | None, cache: object | None, sinks: object | None, block_indices: object | None
) -> None:
    """ValueError for what some model gives its attention and no kernel takes."""
    if sinks is not None:
        raise ValueError(
            "sinks: the fastattn attention takes one sink per head (s_aux), not one per query; load the model with "
            'attn_implementation="eager"'
        )
    if block_indices is not None:
        raise ValueError(
            "block_indices: the fastattn attention does not know the blocks of keys that this model chooses; load the "
            'model with attn_implementation="sdpa"'
        )
    if cache is not None:
        raise ValueError(
            f"cache: the fastattn attention does not read paged caches (got {type(cache).__name__}); "
            'load the model with attn_implementation="sdpa" for continuous batching'
        )
    if attention_mask is not None and attention_mask.ndim != 4:
        raise ValueError(
            f"attention_mask: expected None or a 4-D tensor, got shape {tuple(attention_mask.shape)}; "
            'the mask must be built for the implementation "fastattn", "sdpa" or "eager" (config._attn_implementation '
            "of the model that builds it), or be given as (batch, heads or 1, queries, keys)"
        )


def _is_head_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> bool:
    """Of a model that ran "eager": ViT and its copies in transformers 4 hand a head mask on where a mask belongs, and
    multiply by it."""
    if mask is None or not mask.is_floating_point() or mask.ndim != 4 or key.shape[2] == 1:
        return False
    return mask.shape[1] == query.shape[1] and mask.shape[2:] == (1, 1)


def _result(out: Tensor, head_mask: Tensor | None) -> tuple[Tensor, None]:
    if head_mask is not None:  # of the weights, after the softmax
        out = out * head_mask.view(1 if head_mask.ndim <= 1 else head_mask.shape[0], -1, 1, 1)
    return out.transpose(1, 2).contiguous(), None


def eager_function(attention: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The function that a class of attention runs where its config names "eager"."""
    forward: Any = inspect.unwrap(attention.forward)
    found: Callable[..., tuple[Tensor, Tensor]] | None = forward.__globals__.get("eager_attention_forward")
    return found


def _eagerly(
    own: Fused, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Causal | None, **given: Any
) -> tuple[Tensor, Tensor]:
    """The original's function, which forms the weights, with the mask that it takes."""
    note_fallback(own, "the attention weights are asked for (output_attentions=True)")
    eager = eager_function(own.fastattn_original)
    assert eager is not None, "fastattn_forms_weights is set where there is one"
    if mask is None and query.shape[2] > 1 and _is_causal(own, given.get("is_causal")):
        mask = Causal("top-left")
    return eager(own, query, key, value, added_mask(mask, query, key.shape[2]), **given)


def _note_torch(own: Fused | None, reason: str) -> None:
    """Counts and says, once, that torch's attention runs instead of a kernel."""
    if own is not None:
        note_fallback(own, reason)
    else:
        dispatch.forbid_fallback("attention", "torch", reason)
        dispatch.note_fallback("attention", NAME, "torch", reason)


def _is_causal(module: nn.Module, asked: bool | None) -> bool:
    return asked if asked is not None else getattr(module, "is_causal", True)


def _without_unfilled(
    len_q: int, key: Tensor, value: Tensor, position_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The keys up to the last query: in an empty static cache those past it are not filled, and no query sees them."""
    if key.shape[2] <= len_q:
        return key, value, position_bias
    return key[:, :, :len_q], value[:, :, :len_q], None if position_bias is None else position_bias[..., :len_q]


def _same_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Expands a batch of one (learned queries shared by all samples) to the others' batch, as torch's SDPA does."""
    if query.shape[0] == key.shape[0] == value.shape[0]:
        return query, key, value
    batch = max(query.shape[0], key.shape[0], value.shape[0])
    query, key, value = (x.expand(batch, -1, -1, -1) if x.shape[0] == 1 else x for x in (query, key, value))
    return query, key, value


# ---- the mask function -----------------------------------------------------------------------------------------------


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor | None = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function of the transformers contract: what `attention_forward` will be given as its mask.

    attention_mask: bool (B, keys seen so far), True = a real token. Query i stands at position i + q_offset, key j at
    j + kv_offset; mask_function says which positions see which. q_offset None: the queries stand where cache_position
    says (transformers up to 5.3).

    Returns, in this order of preference:
      None                               where nothing is hidden, or is_causal alone says what is;
      bool (B, 1, 1, Lk)                 bidirectional attention with padding, wherever the padding lies;
      int32 (B, 1, Lq, 2) key ranges     causal and sliding-window attention, with no padding or padding at the ends;
      bool (B, 1, Lq, Lk)                transformers' own sdpa mask, for everything else.

    Everything else is: a mask function that is not recognised exactly (packed sequences, chunks, user overlays),
    padding in the middle, a caller that asks for a mask it can combine with another (both skip flags off).
    Whether padding lies at the ends is read from the tensor (one host read per forward, as transformers' sdpa mask
    does), and in bidirectional attention, on the CPU alone, whether there is any; while a graph is traced or captured,
    and under torch.vmap, neither can be read, and a padded causal mask is then the dense one.
    """
    dense = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": False,
        "use_vmap": use_vmap,
        "device": device,
        "cache_position": cache_position,
    }
    config = kwargs.get("config")
    masks, others = _masks_of(config), masks_of_others(config)
    if "eager" in (masks, others):
        return eager_mask(**{**dense, **kwargs})
    if others is not None:
        skips = {
            "allow_is_causal_skip": allow_is_causal_skip,
            "allow_is_bidirectional_skip": allow_is_bidirectional_skip,
        }
        return sdpa_mask(**{**dense, **skips})
    may_skip = allow_is_causal_skip or allow_is_bidirectional_skip
    padding = attention_mask
    if use_vmap or not may_skip or q_offset is None or (padding is not None and padding.ndim != 2):
        return sdpa_mask(**dense)
    keys = None if padding is None else padding_mask(padding.to(torch.bool), kv_length, kv_offset)
    if mask_function is bidirectional_mask_function:
        if masks == "explicit":
            keys = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device) if keys is None else keys
        elif keys is not None and allow_is_bidirectional_skip and _is_known_to_be_all_real(keys):
            keys = None
        return None if keys is None else keys[:, None, None, :]

    window = _window(mask_function)
    if window is None:
        return sdpa_mask(**dense)
    if keys is not None:
        if is_tracing(keys) or is_batched(keys):
            return sdpa_mask(**dense)
        all_real, at_the_ends = _read_padding(keys)
        if not at_the_ends:
            return sdpa_mask(**dense)
        keys = None if all_real else keys
    if keys is None and masks != "explicit" and _nothing_to_say(window, q_length, kv_length, q_offset, kv_offset):
        return None
    # One key: a dense mask is as small, and survives models that cut their masks to the key length.
    if kv_length == 1:
        return sdpa_mask(**dense)
    return _key_ranges(window, keys, batch_size, q_length, q_offset, kv_offset, device)


_Window = tuple[int | None, int]  # how far to the left (None: unbounded) and to the right of its position a query sees


def _window(mask_function: Callable[..., Any]) -> _Window | None:
    """The window of a plain causal or sliding-window mask function; None for any function that is not exactly one."""
    if mask_function is causal_mask_function:
        return None, 0
    # A function made inside a traced graph hides its closure from us.
    if torch.compiler.is_compiling() or getattr(mask_function, "__code__", None) is not _AND_CODE:
        return None
    parts = _captured(mask_function)
    if not isinstance(parts, tuple) or len(parts) != 2:
        return None
    overlay, base = parts
    code, size = getattr(overlay, "__code__", None), None
    if code is _SLIDING_CODE or code is _SLIDING_BOTH_CODE:
        size = _captured(overlay)
    if not isinstance(size, int):
        return None
    if code is _SLIDING_CODE and base is causal_mask_function:
        return size - 1, 0
    if code is _SLIDING_BOTH_CODE and base is bidirectional_mask_function:
        return size, size
    return None


_AND_CODE = and_masks(causal_mask_function).__code__
_SLIDING_CODE = sliding_window_overlay(1).__code__
_SLIDING_BOTH_CODE = sliding_window_bidirectional_overlay(1).__code__


def _captured(function: Callable[..., Any]) -> object:
    """The only variable that a mask function captured; None where it captured none or several."""
    closure = getattr(function, "__closure__", None)
    return closure[0].cell_contents if closure is not None and len(closure) == 1 else None


def _is_known_to_be_all_real(keys: Tensor) -> bool:
    """No padding at all, as far as can be told without waiting for a GPU. Transformers' sdpa skips such a mask,
    whatever its length: guided generation gives BART one that is longer than the input."""
    return keys.is_cpu and not is_tracing(keys) and not is_batched(keys) and bool(keys.all())


def _read_padding(keys: Tensor) -> tuple[bool, bool]:
    """(no padding at all, the real tokens of every row are contiguous) in one read of the device."""
    starts = (keys[:, 1:] & ~keys[:, :-1]).sum(-1) + keys[:, 0]
    all_real, contiguous = torch.stack([keys.all(), (starts <= 1).all()]).tolist()
    return all_real, contiguous


def _nothing_to_say(window: _Window, q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int) -> bool:
    """True where `attention_forward` without a mask sees exactly the window: offsets are then known numbers.

    Not while exporting: which of its two meanings (Lq == 1 or not) None has would be frozen into the graph.
    """
    if isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor) or is_torchdynamo_exporting():
        return False
    left, right = window
    offset = q_offset - kv_offset
    if left is not None and q_length - 1 + offset > left:
        return False
    if right == 0 and q_length > 1:
        return offset == 0
    return offset + right >= kv_length - 1


def _key_ranges(
    window: _Window,
    keys: Tensor | None,
    batch_size: int,
    q_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device | str,
) -> Tensor:
    """int32 (B, 1, Lq, 2): per query the first visible key and one past the last; empty where start >= end."""
    left, right = window
    position = torch.arange(q_length, device=device) + (q_offset - kv_offset)
    end = position + (right + 1)
    start = torch.zeros_like(position) if left is None else position - left
    if keys is not None:
        first = keys.to(torch.uint8).argmax(-1, keepdim=True)
        start = torch.maximum(start, first)
        end = torch.minimum(end, first + keys.sum(-1, keepdim=True))
    ranges = torch.stack([start, end], dim=-1).to(torch.int32)
    return ranges.reshape(-1, 1, q_length, 2).expand(batch_size, 1, q_length, 2)


def _masks_of(config: object | None) -> str:
    """Which masks the model of this config is known to handle: "compact", "explicit" or "eager".

    A model that supports sdpa takes a mask for what it is and knows that None may stand for one: "compact". One that
    supports flash or flex attention alone takes it so too, but need not say rightly what None means: "explicit", never
    None. Any other has only ever been run with eager's float masks: it may cut, pad or read them (NLLB-MoE's router,
    DeepSeek-V4's compressed keys), or take the name "fastattn" and still add the mask in an attention of its own
    (Bloom, GPT-1).
    """
    if getattr(config, "model_type", None) in _READ_THEIR_MASKS:
        return "eager"
    # Gemma 4 cuts its queries where layers share their keys, and only for "sdpa" knows that a missing mask cannot be.
    if getattr(config, "num_kv_shared_layers", 0):
        return "explicit"
    return "compact" if config is None else _masks_of_class(type(config))


_READ_THEIR_MASKS = {"doge"}  # which adds to them; up to transformers 5.18 it does not ask for dense ones


@constant
def _masks_of_class(config_class: type) -> str:
    known = _known_masks.get(config_class)
    if known is None:
        known = _known_masks[config_class] = _find_masks_of(config_class)
    return known


_known_masks: dict[type, str] = {}


def _find_masks_of(config_class: type) -> str:
    if config_class not in MODEL_MAPPING:
        return "compact"
    models = MODEL_MAPPING[config_class]
    models = models if isinstance(models, (list, tuple)) else (models,)
    if not any(model._can_set_attn_implementation() for model in models):
        warnings.warn(
            f"{models[0].__name__} never calls the attention interface of transformers: it runs its own attention, "
            "not fastattn's, and gets the eager mask.",
            stacklevel=2,
        )
        return "eager"
    if any(model._supports_sdpa for model in models):
        return "compact"
    is_opaque = any(model._supports_flash_attn or model._supports_flex_attn for model in models)
    return "explicit" if is_opaque else "eager"
