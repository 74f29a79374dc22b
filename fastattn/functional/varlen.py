"""`attention_varlen`: attention within the sequences of a packed batch, which has no padding."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from fastattn import biases
from fastattn.functional.attention import (
    check_agreement,
    check_heads,
    check_qkv,
    complete,
    lower_mask_and_bias,
)
from fastattn.functional.checks import check_cu_seqlens, is_batched
from fastattn.masks import Mask
from fastattn.masks.arguments import whole
from fastattn.masks.lowered import PackedSize
from fastattn.ops.attention import attend
from fastattn.packed import Packed


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    mask: Mask | Tensor | None = ...,
    bias: biases.Bias | Tensor | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    mask: Mask | Tensor | None = ...,
    bias: biases.Bias | Tensor | None = ...,
    scale: float | None = ...,
    softcap: float | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    dropout_seed: Tensor | None = ...,
    return_lse: Literal[True],
    deterministic: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    mask: Mask | Tensor | None = None,
    bias: biases.Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` within each sequence of a packed batch: what a padded batch of these sequences gives, without the
    padding.

    Args:
        q, k, v: (Tq, Hq, D), (Tk, Hkv, D) and (Tk, Hkv, Dv), the sequences one behind the other; dtypes, heads and head
            dims as in `attention`.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,) on q's device: sequence b owns rows cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] of q, and keys likewise. Not decreasing. Rows in no sequence give 0 and -inf.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths, which nothing but the amount of work depends on; a
            longer sequence is cut off there. None: read from cu_seqlens, which waits for the device.
        mask, bias, dropout_p, dropout_seed: as in `attention` for a padded batch with B entries, Sq = max_seqlen_q and
            Skv = max_seqlen_k, in coordinates within each sequence: tensors are indexed so, and positional masks and
            biases align with each sequence's own end, dropout draws the same elements. Masks that need sparse blocks
            (dilated, random, predicates) read the lengths on the host.
        scale, softcap, sinks, return_lse, deterministic, backend: as in `attention`.

    Returns:
        out (Tq, Hq, Dv) in q's dtype; with return_lse also lse (Hq, Tq), as in `attention`.

    Raises:
        What `attention` raises, and TypeError or ValueError for wrong cu_seqlens.
    """
    q, k, v = check_qkv(q, k, v)
    packed = _check_packing(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    size = PackedSize(packed, q.shape[1])
    lowered, added = lower_mask_and_bias(mask, bias, size, q)
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    out, lse = attend(
        *complete(
            q, k, v, lowered, added, packed, scale, softcap, sinks, dropout_p, dropout_seed, deterministic, backend
        )
    )
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


def _check_packing(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> Packed:
    """Where the sequences lie, once all tensors agree."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(
                f"{name} has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}: pass (tokens, heads, head_dim); "
                "a padded batch goes to fastattn.attention"
            )
    check_agreement(q, k, v)
    _, heads_q, dim = q.shape
    tokens_k, heads_kv, dim_k = k.shape
    if dim_k != dim:
        raise ValueError(f"k has head dim {dim_k} but q {dim}: pass k of shape (Tk, Hkv, {dim})")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"v has {v.shape[0]} tokens and {v.shape[1]} heads but k {tokens_k} and {heads_kv}: pass v of shape "
            f"({tokens_k}, {heads_kv}, Dv)"
        )
    check_heads(heads_q, heads_kv, dim, v.shape[2])
    lengths = []
    for side, cu_seqlens, longest in (("q", cu_seqlens_q, max_seqlen_q), ("k", cu_seqlens_k, max_seqlen_k)):
        check_cu_seqlens(f"cu_seqlens_{side}", cu_seqlens, "q", q)
        lengths.append(_longest(f"max_seqlen_{side}", cu_seqlens, longest))
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k has {cu_seqlens_k.shape[0]} numbers but cu_seqlens_q {cu_seqlens_q.shape[0]}: pass one more "
            "than there are sequences in both"
        )
    return Packed(cu_seqlens_q, cu_seqlens_k, *lengths)


def _longest(name: str, cu_seqlens: Tensor, given: int | None) -> int:
    if given is None:
        if is_batched(cu_seqlens):
            raise ValueError(
                f"{name}=None reads on the host the lengths that vmap maps: pass the longest sequence's length"
            )
        return int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
    number = whole(given)
    if number is None:
        raise TypeError(f"{name}={given!r} is a {type(given).__name__}: pass the longest sequence's length, or None")
    if number < 0:
        raise ValueError(f"{name}={number} is negative: pass the longest sequence's length, or None")
    return number
