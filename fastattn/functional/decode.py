"""`attention_decode`: attention of new tokens over a key-value cache, contiguous or paged."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn import biases
from fastattn.biases.lowered import NO_BIAS, LoweredBias, hide, hide_keys
from fastattn.functional.attention import MAX_HEAD_DIM, check_scores, check_sinks, lower_mask_and_bias
from fastattn.functional.checks import (
    check_device,
    check_int32,
    check_shape,
    check_tensor,
    is_batched,
    resolve_backend,
)
from fastattn.masks import LoweredMask, Mask, lowering
from fastattn.masks.lowered import NOTHING_HIDDEN, Index, SequenceSize, Size, replaced
from fastattn.ops.decode import attention_decode_forward, check_lengths, room_of
from fastattn.ops.library import invoke, would_be_differentiated


@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = ...,
    mask: Mask | Tensor | None = ...,
    bias: biases.Bias | Tensor | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = ...,
    mask: Mask | Tensor | None = ...,
    bias: biases.Bias | Tensor | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    bias: biases.Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of the newest tokens over the keys and values in a cache; formulas as `attention`. Inference
    only.

    Args:
        q: (B, Hq, Sq, D), the queries of the last Sq tokens of each sequence; float32, bfloat16 or float16.
        k_cache, v_cache: (B, Hkv, S, D) and (B, Hkv, S, Dv) of q's dtype, S the room in the cache; or with a
            block_table pages (pages, page_size, Hkv, D) and (pages, page_size, Hkv, Dv). Hq % Hkv == 0. The new tokens'
            keys and values are in it already.
        cache_lengths: (B,) int32, how many keys of each sequence are in use, the new ones included; what lies behind
            them may be anything, NaN too. Not read on the host, unless `mask` says so or the tensors lie there.
        block_table: (B, n) int32, the pages of each sequence in order; entries past its length may be anything. With it
            S is n * page_size.
        mask: which keys a query sees beyond the cache's length. Query i sits at position cache_length - Sq + i. An
            object of `fastattn.masks`, Causal() with more than one new token; a bool tensor, True is visible, or a
            float tensor, added to the scores, that broadcasts to (B, Hq, Sq, S); int32 key ranges (1|B, 1|Hq, Sq, 2).
            Tensors, and those of mask objects, count keys by their place in the cache. Windows, key ranges and key
            masks and their intersections need no lengths on the host, other objects read them. None: every key in the
            cache. What a hidden key holds does not matter, NaN neither.
        bias: a float tensor that broadcasts to (B, Hq, Sq, S), of q's dtype or float32, indexed by place in the cache,
            where -inf hides a key; or an object of `fastattn.biases`, whose distances are from the query's position.
        scale, softcap, sinks, return_lse, backend: as in `attention`. Autocast casts nothing here.

    Returns:
        out (B, Hq, Sq, Dv) in q's dtype, (B, Sq, Hq, Dv) in memory; with return_lse also lse (B, Hq, Sq), natural log,
        float32, without the sink. A query that sees no key gets 0 and -inf.

    Raises:
        TypeError, ValueError: a wrong argument, or one that requires a gradient; the text names it and the remedy.
        NotSupported: the backend asked for does not run this call; the text says why.
        NotImplementedError: under vmap over cache_lengths, for a mask object that reads them.
    """
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, tensor)
    _check_inference(q, k_cache, v_cache, mask, bias, sinks)
    room = _check_shapes(q, k_cache, v_cache, cache_lengths, block_table)
    size = Size(q.shape[0], q.shape[1], q.shape[2], room)
    scale, cap = check_scores(q, scale, softcap)
    if sinks is not None:
        check_sinks(sinks, q)
    lowered, added = NOTHING_HIDDEN, NO_BIAS
    if mask is not None or bias is not None:
        lowered, added = _lower(mask, bias, size, q, cache_lengths)
    out, lse = invoke(
        attention_decode_forward,
        q,
        k_cache,
        v_cache,
        cache_lengths,
        block_table,
        lowered.band_left,
        lowered.band_right,
        lowered.intervals,
        added.dense,
        added.table,
        added.first,
        added.slopes,
        sinks,
        scale,
        cap,
        resolve_backend(backend),
    )
    return (out, lse) if return_lse else out


def _check_inference(q: Tensor, k: Tensor, v: Tensor, mask: object, bias: object, sinks: Tensor | None) -> None:
    tensor = bias.tensor if isinstance(bias, biases.Bias) else bias
    if would_be_differentiated(q, k, v, *(t for t in (mask, tensor, sinks) if isinstance(t, Tensor))):
        raise ValueError(
            "attention_decode has no gradient, and one of q, k_cache, v_cache, mask, bias or sinks requires one: "
            "call it under torch.no_grad(), or use fastattn.attention"
        )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor | None) -> int:
    """The room S per sequence, once the tensors agree."""
    for name, tensor in (("q", q), ("k_cache", k), ("v_cache", v)):
        if tensor.dim() != 4:
            form = (
                "(pages, page_size, Hkv, D)"
                if table is not None and name != "q"
                else "(batch, heads, length, head_dim)"
            )
            raise ValueError(f"{name} has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}: pass {form}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype} but q {q.dtype}: keep the cache in q's dtype")
        check_device(name, tensor, "q", q)
    check_int32("cache_lengths", lengths, "q", q)
    if table is not None:
        check_int32("block_table", table, "q", q)
    batch, heads_q, _, dim = q.shape
    check_shape("cache_lengths", lengths, (batch,), "the number of keys in use per sequence")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"v_cache has shape {tuple(v.shape)} beside k_cache of {tuple(k.shape)}: all but the last dimension agree"
        )
    if table is None and k.shape[0] != batch:
        raise ValueError(f"k_cache has a batch of {k.shape[0]} but q of {batch}: pass one cache entry per sequence")
    if table is not None and (table.dim() != 2 or table.shape[0] != batch):
        raise ValueError(f"block_table has shape {tuple(table.shape)}: pass ({batch}, pages per sequence)")
    if k.shape[3] != dim:
        raise ValueError(f"k_cache has head dim {k.shape[3]} but q {dim}: pass keys of q's head dim")
    heads_kv = k.shape[1 if table is None else 2]
    if heads_kv == 0 or heads_q % heads_kv != 0:
        raise ValueError(
            f"q has {heads_q} heads, which is no multiple of the {heads_kv} heads of k_cache: pass Hq % Hkv == 0"
        )
    for name, value in (("q", dim), ("v_cache", v.shape[3])):
        if not 1 <= value <= MAX_HEAD_DIM:
            raise ValueError(f"{name} has head dim {value}: pass 1 to {MAX_HEAD_DIM}")
    return room_of(k, table)


def _lower(
    mask: Mask | LoweredMask | Tensor | None,
    bias: biases.Bias | Tensor | None,
    size: Size,
    q: Tensor,
    cache_lengths: Tensor,
) -> tuple[LoweredMask, LoweredBias]:
    """Band and intervals about the positions of the newest tokens, and the bias with whatever these cannot say."""
    lowered, added = lower_mask_and_bias(None if isinstance(mask, Mask) else mask, bias, size, q)
    if added.top_left:
        raise ValueError(f"bias={bias!r} sits at the top left: new tokens are the last ones, leave align out")
    if isinstance(mask, Mask):
        return _lower_object(mask, added, size, q, cache_lengths)
    if not _is_about_positions(lowered, size.len_k - size.len_q):
        raise ValueError(
            "mask is a LoweredMask with blocks, or with a band that is not about the last key: pass the mask object"
        )
    return hide_keys(lowered, added, size.len_q, size.len_k, q.device)


def _lower_object(
    mask: Mask, added: LoweredBias, size: Size, q: Tensor, cache_lengths: Tensor
) -> tuple[LoweredMask, LoweredBias]:
    """As `_lower`; where positions in a full cache do not tell, by the length of each sequence."""
    _, _, len_q, room = size
    from_the_end = "top-left" not in _parts(mask)
    if from_the_end:
        whole = lowering.lower(mask, size, q.device)
        if _is_about_positions(whole, room - len_q) and whole.intervals is None:
            return hide_keys(whole, added, len_q, room, q.device)
    if is_batched(cache_lengths):
        raise NotImplementedError(
            f"mask={mask!r} reads cache_lengths on the host, which vmap maps: pass a window, a bool tensor or "
            "key ranges, or call attention_decode with one batch of all entries"
        )
    lengths = cache_lengths.tolist()
    check_lengths(min(lengths, default=0), max(lengths, default=0), room)
    if any(isinstance(part, Tensor) for part in _parts(mask)):  # made for the whole cache
        mask.check(size, q.device)
        return LoweredMask(), replaced(added, dense=hide(added.dense, _by_place(mask, size, lengths, q.device)))
    forms = [lowering.lower(mask, Size(*size[:3], length), q.device) for length in lengths]
    if from_the_end and forms and all(_has_no_keys(form, n - len_q) for form, n in zip(forms, lengths, strict=True)):
        return replaced(forms[0], intervals=_stack_intervals(forms, size)), added
    seen = torch.zeros(size, dtype=torch.bool, device=q.device)
    for b, length in enumerate(lengths):
        seen[b, ..., :length] = mask.to_dense(*size[:3], length, q.device)[b]
    return LoweredMask(), replaced(added, dense=hide(added.dense, seen))


def _by_place(mask: Mask, size: Size, lengths: list[int], device: torch.device) -> Tensor:
    """Which places in the cache are seen, a bool tensor that broadcasts to `size`: the mask's tensors count keys by
    their place in it, its positions from the end of each sequence."""
    entry, head, query, key = (torch.arange(n, device=device) for n in size)
    seen = []
    for b, length in enumerate(lengths):
        own = SequenceSize(size, size.len_q, length)
        part = mask.rule(Index(entry[b].view(1, 1, 1, 1), head.view(-1, 1, 1), query.view(-1, 1), key, own))
        seen.append(part[(None,) * (4 - part.dim())])
    return torch.cat(seen) if seen else torch.zeros(size, dtype=torch.bool, device=device)


def _parts(mask: Mask) -> list[Any]:
    """What the mask and those in it are built from."""
    parts = []
    for part in mask.parts():
        for each in part if isinstance(part, tuple) else (part,):
            parts += _parts(each) if isinstance(each, Mask) else [each]
    return parts


def _is_about_positions(form: LoweredMask, offset: int) -> bool:
    """Whether a band about that offset, intervals and places in the cache say what is hidden, not blocks of queries."""
    has_band = form.band_left is not None or form.band_right is not None
    return form.blocks is None and (not has_band or form.band_offset == offset)


def _has_no_keys(form: LoweredMask, offset: int) -> bool:
    """Whether nothing but a band about that offset and intervals hides keys."""
    keys = (form.key_start, form.key_end, form.key_bits, form.dense)
    return _is_about_positions(form, offset) and all(t is None for t in keys)


def _stack_intervals(forms: list[LoweredMask], size: Size) -> Tensor | None:
    """The intervals of one form per sequence as (R, B, Hq, Sq, 2); those that a form has fewer of are empty."""
    given = [form.intervals for form in forms]
    most = max(0 if t is None else t.shape[0] for t in given)
    if most == 0:
        return None
    stacked = []
    for b, t in enumerate(given):
        assert t is not None  # the number of intervals is a matter of the mask, not of the length
        own = t.expand(-1, *size[:3], 2)[:, b : b + 1]
        stacked.append(torch.cat((own, own.new_zeros(most - own.shape[0], *own.shape[1:]))))
    return torch.cat(stacked, dim=1)
