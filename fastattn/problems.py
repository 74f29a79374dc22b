"""What a call asks for, without its tensors: the frozen descriptions that a backend accepts or refuses.

A problem covers the forward and, where `requires_grad` is set, the backward: a backend that lacks the backward refuses
the forward too. Problems are hashable, so a choice of backend is remembered per problem.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch

FEW_QUERIES = 8
"""Up to which kernels for decoding compute a plain call of attention: see fastattn.backends.few."""


class _Shown:
    """Shown without the fields that are at their defaults, most of them False."""

    def __repr__(self) -> str:
        named = ((f.name, getattr(self, f.name), f.default) for f in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value, own in named if value != own)})"


@dataclass(frozen=True, repr=False)
class AttentionProblem(_Shown):
    """One attention call. Lengths, heads and head dims in elements; `intervals` is the number of intervals per
    query, 0 where there are none; the other fields of the mask say which parts its lowered form has. `bias` is the
    dtype of a dense bias; `table` and `slopes` are biases by distance. A `packed` batch has the sizes of a padded one:
    the number of sequences and the most queries and keys that one may have."""

    device_type: str
    dtype: torch.dtype
    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    len_k: int
    dim_qk: int
    dim_v: int
    key_range: bool = False
    band: bool = False
    intervals: int = 0
    dense_mask: bool = False
    key_bits: bool = False
    blocks: bool = False
    bias: torch.dtype | None = None
    table: bool = False
    slopes: bool = False
    bias_requires_grad: bool = False
    table_requires_grad: bool = False
    slopes_requires_grad: bool = False
    packed: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    requires_grad: bool = False
    deterministic: bool = False

    @property
    def op(self) -> str:
        return "attention"


@dataclass(frozen=True, repr=False)
class DecodeProblem(_Shown):
    """One attention call over a key-value cache; `len_k` is the cache's room per sequence, `bias` a dense bias' dtype,
    `intervals` their number per query."""

    device_type: str
    dtype: torch.dtype
    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    len_k: int
    dim_qk: int
    dim_v: int
    paged: bool = False
    band: bool = False
    intervals: int = 0
    bias: torch.dtype | None = None
    table: bool = False
    slopes: bool = False
    softcap: bool = False
    sinks: bool = False

    @property
    def op(self) -> str:
        return "attention_decode"


@dataclass(frozen=True, repr=False)
class NormProblem(_Shown):
    """One layer or RMS norm over `rows` rows of `width` elements; a dtype of None means that the tensor is absent."""

    device_type: str
    dtype: torch.dtype
    kind: Literal["layer", "rms"]
    rows: int
    width: int
    weight_dtype: torch.dtype | None = None
    bias_dtype: torch.dtype | None = None
    residual_dtype: torch.dtype | None = None
    dropout: bool = False
    requires_grad: bool = False

    @property
    def op(self) -> str:
        return "norm"


@dataclass(frozen=True, repr=False)
class LinearProblem(_Shown):
    """One linear layer with activation, or a feed-forward block; `hidden_features` is 0 for linear_act."""

    op: Literal["linear_act", "ffn", "gated_ffn"]
    device_type: str
    dtype: torch.dtype
    weight_dtype: torch.dtype
    activation: str
    rows: int
    in_features: int
    hidden_features: int
    out_features: int
    dropout: bool = False
    requires_grad: bool = False


@dataclass(frozen=True, repr=False)
class EncoderLayerProblem(_Shown):
    """One transformer encoder layer in inference; `packed` rows count as one batch entry of length `len`."""

    device_type: str
    dtype: torch.dtype
    batch: int
    len: int
    heads: int
    features: int
    hidden_features: int
    activation: str
    norm_first: bool = False
    packed: bool = False
    key_range: bool = False
    band: bool = False
    intervals: int = 0
    dense_mask: bool = False
    key_bits: bool = False
    blocks: bool = False

    @property
    def op(self) -> str:
        return "encoder_layer"


Problem = AttentionProblem | DecodeProblem | NormProblem | LinearProblem | EncoderLayerProblem
