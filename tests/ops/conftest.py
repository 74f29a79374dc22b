"""One small call of every kind, as fixtures for the operator tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.biases import ALiBi, RelativeBias, T5Bias
from fastattn.masks import (
    Causal,
    Dilated,
    GlobalTokens,
    KeyLengths,
    KeyMask,
    PerHead,
    PrefixLM,
    SlidingWindow,
    Strided,
)

SEED = torch.tensor([5])
SEEN = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1, 1]]).bool()
RANGES = torch.tensor([[0, 3], [1, 7], [2, 4], [5, 5], [0, 7]], dtype=torch.int32).view(1, 1, 5, 2)
BLOCKS = PerHead([Strided(3), KeyMask(SEEN) | Causal(), Dilated(2, 2), Causal()]) & KeyLengths([5, 7])
CU_SEQLENS = torch.tensor([[0, 4, 5], [0, 7, 9]], dtype=torch.int32)
QKV = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6))
FFN = ((2, 3, 12), (20, 12), (20,), (10, 20), (10,))


class Case(NamedTuple):
    """function(*tensors) with `shapes`, all differentiable."""

    name: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]

    def draw(self) -> list[Tensor]:
        return [torch.randn(shape, requires_grad=True) for shape in self.shapes]


def _attention(**kwargs):
    return lambda q, k, v: fastattn.attention(q, k, v, **kwargs)


CASES = [
    Case("attention", _attention(), QKV),
    Case("attention causal", _attention(mask=Causal()), QKV),
    Case("attention lengths", _attention(mask=KeyLengths(torch.tensor([3, 7])) & SlidingWindow(3, 1)), QKV),
    Case("attention key mask", _attention(mask=KeyMask(SEEN)), QKV),
    Case("attention bool", _attention(mask=SEEN[:1, None, None]), QKV),
    Case("attention ranges", _attention(mask=RANGES, return_lse=True), QKV),
    Case("attention intervals", _attention(mask=(SlidingWindow(1, 1) | GlobalTokens(1)) & PrefixLM(2)), QKV),
    Case("attention blocks", _attention(mask=BLOCKS.lower(2, 4, 5, 7, torch.device("cpu"))), QKV),
    Case("attention dropout", _attention(dropout_p=0.3, dropout_seed=SEED), QKV),
    Case(
        "attention bias",
        lambda q, k, v, b: fastattn.attention(q, k, v, bias=b, softcap=5.0, return_lse=True),
        (*QKV, (4, 1, 7)),
    ),
    Case("attention table", lambda q, k, v, t: fastattn.attention(q, k, v, bias=RelativeBias(t)), (*QKV, (4, 5))),
    Case(
        "attention T5",
        lambda q, k, v, w: fastattn.attention(q, k, v, bias=T5Bias(w, max_distance=6), mask=Causal(), scale=1.0),
        (*QKV, (8, 4)),
    ),
    Case(
        "attention ALiBi",
        lambda q, k, v, s: fastattn.attention(q, k, v, bias=ALiBi(s, "top-left"), return_lse=True),
        (*QKV, (4,)),
    ),
    Case(
        "attention_varlen",
        lambda q, k, v, s: fastattn.attention_varlen(
            q, k, v, CU_SEQLENS[0], CU_SEQLENS[1], max_seqlen_q=4, max_seqlen_k=7, mask=SlidingWindow(2, 0), sinks=s
        ),
        ((5, 4, 8), (9, 2, 8), (9, 2, 6), (4,)),
    ),
    Case("attention float mask", lambda q, k, v, m: fastattn.attention(q, k, v, mask=m), (*QKV, (2, 1, 5, 7))),
    Case("attention sinks", lambda q, k, v, s: fastattn.attention(q, k, v, sinks=s), (*QKV, (4,))),
    Case("layer_norm", fastattn.layer_norm, ((2, 3, 8), (8,), (8,))),
    Case("rms_norm", lambda x, w: fastattn.rms_norm(x, w, offset=1.0), ((2, 3, 8), (8,))),
    Case(
        "layer_norm residual",
        lambda x, w, b, r: fastattn.layer_norm(x, w, b, residual=r, return_residual=True),
        ((2, 3, 8), (8,), (8,), (2, 3, 8)),
    ),
    Case(
        "rms_norm dropout",
        lambda x, r: fastattn.rms_norm(x, residual=r, dropout_p=0.3, dropout_seed=SEED, return_residual=True),
        ((2, 3, 8), (2, 3, 8)),
    ),
    Case("linear", fastattn.linear_act, FFN[:3]),
    Case("linear_act", lambda x, w, b: fastattn.linear_act(x, w, b, "gelu"), FFN[:3]),
    Case("linear_act no bias", lambda x, w: fastattn.linear_act(x, w, None, "silu"), FFN[:2]),
    Case("ffn", fastattn.ffn, FFN),
    Case("ffn dropout", lambda *a: fastattn.ffn(*a, dropout_p=0.3, dropout_seed=SEED), FFN),
    Case("gated_ffn", fastattn.gated_ffn, (FFN[0], FFN[1], FFN[1], FFN[3])),
    Case(
        "gated_ffn biases",
        lambda x, g, u, d, a, b, c: fastattn.gated_ffn(x, g, u, d, "gelu_tanh", a, b, c),
        (FFN[0], FFN[1], FFN[1], FFN[3], FFN[2], FFN[2], FFN[4]),
    ),
    Case(
        "gated_ffn dropout",
        lambda x, g, u, d: fastattn.gated_ffn(x, g, u, d, dropout_p=0.3, dropout_seed=SEED),
        (FFN[0], FFN[1], FFN[1], FFN[3]),
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param
