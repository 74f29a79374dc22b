"""Autocast: attention and linears cast as torch's do, norms follow torch's rule for the device."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastattn

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_attention_casts_as_torch_does(backend, dtype, given):
    if given == torch.float64:
        backend = "reference"
    q, k, v = (torch.randn(1, 2, 4, 8).to(given).requires_grad_() for _ in range(3))
    with torch.autocast("cpu", dtype=dtype):
        out = fastattn.attention(q, k, v, backend=backend)
        expected = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype == expected.dtype
    tolerance = 4 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    out.sum().backward()
    assert q.grad.dtype == given


def test_attention_keeps_a_finite_bias_finite(backend):
    q, k, v = (torch.randn(1, 2, 4, 8) for _ in range(3))
    bias = torch.full((4, 4), torch.finfo(torch.float32).min)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastattn.attention(q, k, v, bias=bias, backend=backend)
    torch.testing.assert_close(out.float(), v.mean(2, keepdim=True).expand(out.shape), rtol=0.02, atol=0.02)


def test_attention_takes_a_bias_of_the_other_half_dtype(backend):
    q, k, v = (torch.randn(1, 2, 4, 8).bfloat16() for _ in range(3))
    bias = torch.randn(4, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.float16):
        out = fastattn.attention(q, k, v, bias=bias, backend=backend)
    assert out.dtype == torch.float16
    torch.testing.assert_close(
        out, fastattn.attention(q.half(), k.half(), v.half(), bias=bias.float(), backend=backend)
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_linears_cast_as_torch_does(backend, dtype, given):
    if given == torch.float64:
        backend = "reference"
    x, w, b = (torch.randn(s).to(given).requires_grad_() for s in ((3, 8), (6, 8), (6,)))
    w2, w3 = torch.randn(8, 6).to(given), torch.randn(6, 8).to(given)
    with torch.autocast("cpu", dtype=dtype):
        y = fastattn.linear_act(x, w, b, "relu", backend=backend)
        expected = F.relu(F.linear(x, w, b))
        blocks = (
            fastattn.ffn(x, w, b, w2, None, backend=backend),
            fastattn.gated_ffn(x, w, w3, w2, backend=backend),
        )
    assert y.dtype == expected.dtype and all(block.dtype == expected.dtype for block in blocks)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert x.grad.dtype == w.grad.dtype == b.grad.dtype == given


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_norms_cast_nothing_on_the_cpu_as_torch(backend, given):
    x, weight = torch.randn(3, 8).to(given), torch.randn(8).to(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, rms = fastattn.layer_norm(x, weight, backend=backend), fastattn.rms_norm(x, weight, backend=backend)
        assert y.dtype == F.layer_norm(x, (8,), weight).dtype
        assert rms.dtype == F.rms_norm(x, (8,), weight).dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: its autocast casts norms to float32")
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_norms_cast_to_float32_on_cuda_as_torch(given):
    x, weight = (torch.randn(s, device="cuda").to(given) for s in ((3, 8), (8,)))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, rms = fastattn.layer_norm(x, weight), fastattn.rms_norm(x, weight)
        assert y.dtype == F.layer_norm(x, (8,), weight).dtype
        assert rms.dtype == F.rms_norm(x, (8,), weight).dtype


def test_the_reference_computes_in_full_precision_inside_autocast():
    q, k, v = (torch.randn(1, 1, 16, 32).bfloat16() for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fastattn.attention(q, k, v, backend="reference")
    assert torch.equal(inside, fastattn.attention(q, k, v, backend="reference"))
