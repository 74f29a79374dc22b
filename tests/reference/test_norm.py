"""The reference norms against torch's in float64, and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastattn.reference import norm
from fastattn.reference.philox import dropout_scale, keep_mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_against_torch(dtype):
    x, weight, bias = torch.randn(3, 5, 24).to(dtype), torch.randn(24), torch.randn(24)
    if dtype == torch.float64:
        weight, bias = weight.double(), bias.double()
    y = norm(x, weight, bias, eps=1e-3)
    expected = F.layer_norm(x.double(), (24,), weight.double(), bias.double(), 1e-3)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_against_torch(offset):
    x, weight = torch.randn(7, 24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)
    expected = F.rms_norm(x, (24,), weight + offset, 1e-6)
    torch.testing.assert_close(norm(x, weight, kind="rms", eps=1e-6, offset=offset), expected)


def test_residual_and_dropout_come_before_the_norm():
    x, residual = torch.randn(4, 40, dtype=torch.float64), torch.randn(4, 40, dtype=torch.float64)
    seed, p = torch.tensor([11]), 0.3
    y, z = norm(x, residual=residual, dropout_p=p, dropout_seed=seed, return_residual=True)
    expected = x * keep_mask(seed, p, 1, 4, 40)[0].double() * dropout_scale(p) + residual
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(y, F.layer_norm(expected, (40,)))


def test_the_sum_is_promoted_and_the_result_is_not():
    x, residual = torch.randn(2, 8).bfloat16(), torch.randn(2, 8)
    y, z = norm(x, residual=residual, return_residual=True)
    assert (y.dtype, z.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(z, x.float() + residual)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_gradients_by_finite_differences(kind):
    tensors = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (6,), (6,), (3, 6))]
    seed = torch.tensor([5])

    def call(x, weight, bias, residual):
        return norm(
            x,
            weight,
            bias,
            kind=kind,
            offset=0.5,
            residual=residual,
            dropout_p=0.25,
            dropout_seed=seed,
            return_residual=True,
        )

    assert torch.autograd.gradcheck(call, tensors)
