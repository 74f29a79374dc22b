"""The reference attention against an element-by-element loop and torch's own in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastattn import masks
from fastattn.reference import attention
from fastattn.reference.philox import dropout_scale, keep_mask


def loop_attention(q, k, v, seen, bias, scale, softcap, sinks, factor):
    """Scalars only: one query, one key, one feature at a time."""
    batch, heads, len_q, dim = q.shape
    group, len_k, dim_v = heads // k.shape[1], k.shape[2], v.shape[3]
    out = torch.zeros(batch, heads, len_q, dim_v, dtype=torch.float64)
    lse = torch.full((batch, heads, len_q), -math.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(len_q):
                weights = {}
                for j in range(len_k):
                    if not seen[b, h, i, j]:
                        continue
                    s = scale * sum(float(q[b, h, i, d]) * float(k[b, h // group, j, d]) for d in range(dim))
                    if softcap:
                        s = softcap * math.tanh(s / softcap)
                    weights[j] = math.exp(s + float(bias[b, h, i, j]))
                if not weights:
                    continue
                total = sum(weights.values())
                lse[b, h, i] = math.log(total)
                total += math.exp(float(sinks[h])) if sinks is not None else 0.0
                for j, weight in weights.items():
                    for d in range(dim_v):
                        out[b, h, i, d] += weight / total * float(factor[b, h, i, j]) * float(v[b, h // group, j, d])
    return out, lse


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_against_a_scalar_loop(softcap, with_sinks, dropout_p):
    batch, heads, heads_kv, len_q, len_k = 2, 4, 2, 3, 5
    q = torch.randn(batch, heads, len_q, 6, dtype=torch.float64)
    k = torch.randn(batch, heads_kv, len_k, 6, dtype=torch.float64)
    v = torch.randn(batch, heads_kv, len_k, 4, dtype=torch.float64)
    bias = torch.randn(heads, 1, len_k, dtype=torch.float64)
    sinks = torch.randn(heads, dtype=torch.float64) if with_sinks else None
    seen = torch.rand(batch, heads, len_q, len_k) < 0.7
    seen[0, 1, 2] = False
    seed = torch.tensor([4321])
    factor = torch.ones(batch, heads, len_q, len_k)
    if dropout_p:
        keep = keep_mask(seed, dropout_p, batch * heads, len_q, len_k).view(factor.shape)
        factor = keep.double() * dropout_scale(dropout_p)
    out, lse = attention(
        q,
        k,
        v,
        mask=seen,
        bias=bias,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=seed,
        return_lse=True,
    )
    full = bias.expand(batch, heads, len_q, len_k)
    expected, expected_lse = loop_attention(q, k, v, seen, full, 6**-0.5, softcap, sinks, factor)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_torch(dtype, causal):
    q, k, v = (torch.randn(2, 4, 9, 8).to(dtype) for _ in range(3))
    out = attention(q, k, v, mask=masks.Causal() if causal else None)
    wide = [t.double() for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*wide, is_causal=causal)
    assert out.dtype == dtype
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=max(tolerance, 1e-14))


def test_grouped_heads_equal_repeated_ones():
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    expected = F.scaled_dot_product_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    torch.testing.assert_close(attention(q, k, v), expected)


def test_gradients_by_finite_differences():
    q = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 1, 4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 2, 1, 4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor([3])

    def call(q, k, v, bias, sinks):
        return attention(
            q,
            k,
            v,
            mask=masks.SlidingWindow(1, 0),
            bias=bias,
            softcap=3.0,
            sinks=sinks,
            dropout_p=0.25,
            dropout_seed=seed,
            return_lse=True,
        )

    assert torch.autograd.gradcheck(call, (q, k, v, bias, sinks))


def test_float_mask_adds_to_the_bias():
    q, k, v = (torch.randn(1, 2, 4, 8, dtype=torch.float64) for _ in range(3))
    mask, bias = torch.randn(4, 4, dtype=torch.float64), torch.randn(2, 1, 4, dtype=torch.float64)
    assert torch.equal(attention(q, k, v, mask=mask, bias=bias), attention(q, k, v, bias=mask + bias))


def test_int_mask_is_key_ranges():
    q, k, v = (torch.randn(2, 1, 3, 8) for _ in range(3))
    ranges = torch.tensor([[0, 1], [1, 3], [2, 2]], dtype=torch.int32).view(1, 1, 3, 2)
    seen = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    assert torch.equal(attention(q, k, v, mask=ranges), attention(q, k, v, mask=seen))
    assert torch.equal(attention(q, k, v, mask=ranges)[:, :, 2], torch.zeros(2, 1, 8))
