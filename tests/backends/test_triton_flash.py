"""Which backwards of the Triton backend torch's FlashAttention-2 takes; its kernels themselves run on GPUs alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastattn import masks
from fastattn.backends import reference
from fastattn.backends import triton as backend
from fastattn.backends.triton import attention, flash
from fastattn.biases.lowered import NO_BIAS
from fastattn.masks.lowered import NOTHING_HIDDEN, LoweredMask


def lowered(mask: masks.Mask, len_q: int, len_k: int) -> LoweredMask:
    return mask.lower(2, 2, len_q, len_k, torch.device("cpu"))


@pytest.mark.parametrize(
    ("mask", "lengths", "expected"),
    [
        (masks.Causal(), (8, 8), "future"),
        (masks.Causal(), (4, 8), None),  # its kernels and ours begin elsewhere
        (masks.SlidingWindow(3, 0), (8, 8), None),
        (masks.KeyLengths(torch.tensor([3, 8])), (8, 8), None),
        (masks.Causal() & masks.KeyLengths(torch.tensor([3, 8])), (8, 8), None),
    ],
)
def test_masks_are_told_apart(mask: masks.Mask, lengths: tuple[int, int], expected: str | None) -> None:
    assert flash.hides(lowered(mask, *lengths), *lengths) == expected


def test_no_mask_hides_nothing_of_any_lengths() -> None:
    assert flash.hides(NOTHING_HIDDEN, 3, 7) == "nothing"


@pytest.mark.parametrize(
    ("arch", "dim", "dtype", "faster"),
    [
        (90, 256, torch.bfloat16, True),
        (90, 256, torch.float16, True),
        (80, 256, torch.bfloat16, False),
        (100, 256, torch.bfloat16, False),
        (90, 128, torch.bfloat16, False),
        (90, 256, torch.float32, False),
    ],
)
def test_it_serves_where_it_was_measured(
    arch: int, dim: int, dtype: torch.dtype, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "is_built", lambda: True)
    q = torch.empty(1, 2, 8, dim, dtype=dtype)
    assert flash.is_faster(arch, q, q, q, NOTHING_HIDDEN) is faster
    monkeypatch.setattr(flash, "is_built", lambda: False)
    assert not flash.is_faster(arch, q, q, q, NOTHING_HIDDEN)


@pytest.mark.parametrize("causal", [False, True])
def test_its_gradients_come_in_the_layout_of_the_inputs(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the kernels computes from the operator's arguments; it gives contiguous gradients."""
    draw = torch.Generator().manual_seed(0)
    q, k, v, grad_out = (
        torch.randn(2, 8, 4, 256, generator=draw).bfloat16().transpose(1, 2) for _ in range(4)
    )  # fmt: skip
    mask = lowered(masks.Causal(), 8, 8) if causal else NOTHING_HIDDEN
    options = (mask, NO_BIAS, None, None, None, 0.125, 0.0, 0.0)
    out, lse = reference.attention_forward(q, k, v, *options)
    flags = (False, False, False, False)
    expected = reference.attention_backward(grad_out, None, q, k, v, out, lse, *options, *flags, False)
    called = []

    def stand_in(*args: object, scale: float) -> tuple[Tensor, ...]:
        grad, *tensors = args[:6]
        is_causal = args[11]
        called.append(is_causal)
        seen = lowered(masks.Causal(), 8, 8) if is_causal else NOTHING_HIDDEN
        options = (seen, NO_BIAS, None, None, None, scale, 0.0, 0.0)
        found = reference.attention_backward(grad, None, *tensors, *options, *flags, False)[:3]
        return tuple(gradient.contiguous() for gradient in found)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_backward", stand_in)
    monkeypatch.setattr(attention, "architecture", lambda device: 90)
    monkeypatch.setattr(flash, "is_built", lambda: True)
    found = backend.attention_backward(grad_out, None, q, k, v, out, lse, *options, *flags, False)
    assert called == [causal]
    for gradient, own, like in zip(found[:3], expected[:3], (q, k, v), strict=True):
        assert torch.equal(gradient, own) and gradient.stride() == like.stride()
    assert all(nothing.shape == (0,) for nothing in found[3:])
