"""Bugs that shipped in well-known attention kernels, one test each, by name. Truth is plain torch in float64."""

from __future__ import annotations

import math

import pytest
import torch

import fastattn
from fastattn.biases import ALiBi, Dense, RelativeBias
from fastattn.masks import Causal, KeyLengths, SlidingWindow

DTYPES = [torch.float32, torch.bfloat16]


def qkv(len_q, len_k, dtype=torch.float32, batch=2, heads=3, dim=32):
    return [torch.randn(batch, heads, n, dim, dtype=dtype, requires_grad=True) for n in (len_q, len_k, len_k)]


def plain(q, k, v, seen, bias=0.0):
    """out and lse in float64; rows that see nothing are 0 and -inf."""
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    scores = scores.masked_fill(~seen, -math.inf)
    dead = ~seen.any(dim=-1, keepdim=True)
    weights = scores.masked_fill(dead, 0.0).softmax(dim=-1).masked_fill(dead, 0.0)
    return weights @ v.double(), torch.logsumexp(scores.masked_fill(dead, 0.0), dim=-1).masked_fill(
        dead[..., 0], -math.inf
    )


def agree(got, want, dtype=torch.float32):
    tolerance = 2e-5 if dtype is torch.float32 else 3e-2
    assert not got.isnan().any()
    assert torch.allclose(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def compare(q, k, v, seen, dtype=torch.float32, bias=None, **options):
    """Output and the gradients of q, k and v."""
    out = fastattn.attention(q, k, v, bias=bias, **options)
    want, _ = plain(q, k, v, seen, 0.0 if bias is None else bias.double())
    grad = torch.randn_like(want)
    agree(out, want, dtype)
    for got, true in zip(
        torch.autograd.grad(out, (q, k, v), grad.to(out.dtype)), torch.autograd.grad(want, (q, k, v), grad), strict=True
    ):
        agree(got, true, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [64, 192, 320])
def test_nan_gradient_at_half_a_tile_with_a_mask(backend, length, dtype):
    """Lengths with S % 128 == 64 left the second half of the last tile unwritten, and its NaN reached dK and dV."""
    q, k, v = qkv(length, length, dtype, batch=1)
    seen = torch.rand(1, 1, length, length) < 0.5
    compare(q, k, v, seen.expand(1, 3, -1, -1), dtype, mask=seen, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_gradients_of_keys_with_one_query(backend, dtype):
    """Rows past Sq = 1 held garbage that 0 * inf turned into NaN in dK and dV."""
    q, k, v = qkv(1, 77, dtype)
    compare(q, k, v, torch.ones(2, 3, 1, 77, dtype=torch.bool), dtype, mask=Causal(), backend=backend)


@pytest.mark.parametrize("make", [Dense, RelativeBias, ALiBi], ids=lambda make: make.__name__)
def test_only_the_bias_needs_a_gradient(backend, make):
    """The backward crashed, or did not run, where neither q, k nor v required a gradient."""
    q, k, v = (t.detach() for t in qkv(10, 12))
    shape = {Dense: (1, 3, 10, 12), RelativeBias: (3, 5), ALiBi: (3,)}[make]
    tensor = torch.randn(shape, requires_grad=True)
    out = fastattn.attention(q, k, v, bias=make(tensor), backend=backend)
    want, _ = plain(q, k, v, torch.ones(2, 3, 10, 12, dtype=torch.bool), make(tensor).to_dense(2, 3, 10, 12).double())
    for found in (out, want):
        assert found.requires_grad
    grads = [torch.autograd.grad(found.square().sum(), tensor)[0] for found in (out, want)]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-4)


def test_backward_without_a_causal_mask(backend):
    """A backward written for causal=True ran for causal=False too: the forward was right, the gradients were not."""
    q, k, v = qkv(130, 130)
    compare(q, k, v, torch.ones(2, 3, 130, 130, dtype=torch.bool), backend=backend)
    later = fastattn.attention(q, k, v, backend=backend)[:, :, 0].sum()  # the first query, and keys after it
    assert torch.autograd.grad(later, v)[0][:, :, 1:].abs().max() > 0


@pytest.mark.parametrize("left, right", [(0, 0), (1, 0), (0, 1), (63, 0), (64, 64), (None, 2), (5, None)])
def test_off_by_one_windows(backend, left, right):
    """Both ends of a window belong to it: exactly left + 1 + right keys in the middle of the sequence."""
    length = 200
    q, k, v = qkv(length, length, batch=1)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    seen = torch.ones(length, length, dtype=torch.bool)
    seen &= j >= i - (length if left is None else left)
    seen &= j <= i + (length if right is None else right)
    compare(q, k, v, seen.expand(1, 3, -1, -1), mask=SlidingWindow(left, right), backend=backend)


@pytest.mark.parametrize("len_q, len_k", [(3, 70), (70, 3), (1, 65), (129, 64)])
@pytest.mark.parametrize("align", ["bottom-right", "top-left"])
def test_alignment_of_queries_and_keys_of_different_lengths(backend, len_q, len_k, align):
    """The last query sits at the last key unless asked otherwise; with Sq > Skv the first ones see nothing."""
    q, k, v = qkv(len_q, len_k)
    offset = len_k - len_q if align == "bottom-right" else 0
    seen = torch.arange(len_k) <= torch.arange(len_q)[:, None] + offset
    compare(q, k, v, seen.expand(2, 3, -1, -1), mask=Causal(align), backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_on_fully_masked_rows(backend, dtype):
    """softmax of a row of -inf is 0 / 0. Here such a row gives 0, LSE -inf, and gradient 0 to all."""
    q, k, v = qkv(9, 9, dtype)
    seen = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    seen[0, :, 4] = False
    seen[1] = False
    compare(q, k, v, seen.expand(2, 3, -1, -1), dtype, mask=seen, backend=backend)
    out, lse = fastattn.attention(q, k, v, mask=seen, return_lse=True, backend=backend)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all() and (lse[0, :, 4] == -math.inf).all()
    assert all((g[1] == 0).all() for g in torch.autograd.grad(out.sum() + lse[0, :, 0].sum(), (q, k, v)))


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_in_padded_keys(backend, garbage):
    """What is stored behind a sequence's end is multiplied by zero weights, and 0 * NaN is NaN."""
    q, k, v = (t.detach() for t in qkv(20, 50))
    clean = [t.clone().requires_grad_() for t in (q, k, v)]
    with torch.no_grad():
        for t in (k, v):
            t[0, :, 30:] = garbage
            t[1, :, 1:] = garbage
    dirty = [t.requires_grad_() for t in (q, k, v)]
    mask = KeyLengths([30, 1])
    for got, want in zip(
        *(
            (out, *torch.autograd.grad(out.square().sum(), inputs))
            for inputs in (dirty, clean)
            for out in (fastattn.attention(*inputs, mask=mask, backend=backend),)
        ),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_strides_beyond_32_bits(backend):
    """Offsets of a tensor with more than 2^31 elements overflowed an int. The memory in between is never touched."""
    far = 2**31 + 64
    buffer = torch.empty(far + 4096, dtype=torch.bfloat16)
    wide = buffer.as_strided((2, 2, 9, 16), (far, 1024, 16, 1))
    wide.copy_(torch.randn(2, 2, 9, 16))
    near = wide.contiguous()
    for got, want in zip(
        fastattn.attention(wide, wide, wide, mask=Causal(), return_lse=True, backend=backend),
        fastattn.attention(near, near, near, mask=Causal(), return_lse=True, backend=backend),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_expanded_masks_and_biases_beyond_32_bits(backend):
    """The same for a mask and a bias that are expanded over queries, whose batch entries lie 2^31 elements apart."""
    far = 2**31 + 64
    q, k, v = qkv(9, 9)
    seen = torch.empty(far + 64, dtype=torch.bool).as_strided((2, 1, 9, 9), (far, 0, 0, 1))
    bias = torch.empty(far + 64, dtype=torch.float32).as_strided((2, 1, 9, 9), (far, 0, 0, 1))
    seen[:, :, :1] = torch.rand(2, 1, 1, 9) < 0.6
    bias[:, :, :1] = torch.randn(2, 1, 1, 9)
    compare(q, k, v, seen.expand(2, 3, -1, -1), bias=bias, mask=seen, backend=backend)


def test_the_gradient_of_the_lse(backend):
    """Autograd formulas that returned LSE without its gradient, so that losses over it trained on nothing."""
    q, k, v = qkv(11, 13)
    seen = torch.rand(2, 3, 11, 13) < 0.8
    _, lse = fastattn.attention(q, k, v, mask=seen, return_lse=True, backend=backend)
    _, want = plain(q, k, v, seen)
    grad = torch.randn(2, 3, 11)
    found = [torch.autograd.grad(x, (q, k), grad.to(x.dtype)) for x in (lse, want)]
    for got, true in zip(*found, strict=True):
        assert got.abs().max() > 0
        agree(got, true)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_of_finfo_min_is_no_mask_of_infinities(backend, dtype):
    """Folding log2(e) into finfo.min overflows to -inf. A row of finfo.min is uniform attention, not an empty one."""
    q, k, v = qkv(6, 8, dtype)
    mask = torch.zeros(2, 1, 6, 8, dtype=dtype)
    mask[:, :, 2] = torch.finfo(dtype).min
    mask[:, :, 3, :4] = torch.finfo(dtype).min
    out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    agree(out[:, :, 2], v.mean(dim=2), dtype)
    assert lse.isfinite().all()
    seen = torch.ones(2, 3, 6, 8, dtype=torch.bool)
    seen[:, :, 3, :4] = False
    want, _ = plain(q, k, v, seen)
    agree(out[:, :, 3], want[:, :, 3], dtype)
