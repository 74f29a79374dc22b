"""Float masks of transformers, read for what they hide."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from fastattn.swap.recipes.eager_mask import compact, compact_hidden, compact_seen

LOWEST = torch.finfo(torch.float32).min


def visible(mask: torch.Tensor, length: int) -> torch.Tensor:
    """The bool mask that a compact one stands for."""
    if mask.dtype is torch.bool:
        return mask
    key = torch.arange(length)
    return (key >= mask[..., :1]) & (key < mask[..., 1:])


@pytest.mark.parametrize("hidden", [LOWEST, -float("inf")])
@pytest.mark.parametrize("holes", [False, True])
def test_a_mask_of_zeros_and_lowest_numbers(hidden, holes) -> None:
    seen = torch.ones(3, 1, 7, 7, dtype=torch.bool).tril()
    seen[1, :, :, :3] = False  # padding on the left: its first queries see nothing
    seen[2, :, :, 5:] = False
    if holes:
        seen[0, :, :, 2] = False
    mask = torch.zeros(3, 1, 7, 7).masked_fill(~seen, hidden)
    found = compact(mask)
    assert found.dtype is (torch.bool if holes else torch.int32)
    assert torch.equal(visible(found, 7), seen)
    assert compact(mask) is found  # the next layer


def test_a_mask_written_to_is_read_again() -> None:
    mask = torch.zeros(1, 1, 2, 4)
    assert compact(mask).tolist() == [[[[0, 4], [0, 4]]]]
    mask[..., 3] = LOWEST
    assert compact(mask).tolist() == [[[[0, 3], [0, 3]]]]


@pytest.mark.parametrize("value", [-1.0, 0.5, -1e9, float("nan")])
def test_a_mask_that_adds_something_else_stays(value) -> None:
    mask = torch.zeros(1, 1, 3, 4)
    mask[0, 0, 1, 2] = value
    assert compact(mask) is mask


def test_a_learned_mask_stays() -> None:
    mask = torch.zeros(1, 1, 3, 4, requires_grad=True)
    assert compact(mask) is mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float64])
def test_a_mask_of_other_numbers_adds_them(dtype) -> None:
    seen = torch.ones(1, 1, 2, 2).tril()  # of int32 key ranges, these would be some
    found = compact(seen.to(dtype))
    assert found.dtype is torch.float32
    assert torch.equal(found, seen)


def test_under_inference_mode() -> None:
    with torch.inference_mode():
        mask = torch.zeros(1, 1, 2, 3)
        assert compact(mask).tolist() == [[[[0, 3], [0, 3]]]]


def test_halves() -> None:
    mask = torch.zeros(1, 1, 2, 3, dtype=torch.float16)
    mask[..., 0] = torch.finfo(torch.float16).min
    assert compact(mask).tolist() == [[[[1, 3], [1, 3]]]]


def test_one_row_for_all_queries() -> None:
    mask = torch.zeros(2, 1, 1, 3)
    mask[1, ..., 2] = LOWEST
    assert compact(mask).tolist() == [[[[True, True, True]]], [[[True, True, False]]]]


@pytest.mark.parametrize("holes", [False, True])
def test_a_bool_mask_of_what_is_hidden(holes) -> None:
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    seen[1, :, :, :2] = False
    if holes:
        seen[0, :, :, 2] = False
    hidden = ~seen
    found = compact_hidden(hidden)
    assert found.dtype is (torch.bool if holes else torch.int32)
    assert torch.equal(visible(found, 5), seen)
    assert compact_hidden(hidden) is found


def test_what_torch_func_transforms_is_not_read() -> None:
    masks = torch.zeros(3, 1, 1, 2, 4)
    masks[1, ..., 3] = LOWEST
    assert torch.equal(torch.vmap(compact)(masks), masks)
    assert torch.equal(torch.vmap(compact_hidden)(masks != 0), masks == 0)
    assert torch.equal(torch.vmap(compact_seen)((masks == 0).long()), masks == 0)


def test_a_mask_of_ones_and_zeros() -> None:
    seen = torch.ones(2, 1, 4, 4, dtype=torch.long)
    seen[1, ..., 3] = 0
    found = compact_seen(seen)
    assert torch.equal(visible(found, 4), seen.bool())
    assert compact_seen(seen) is found
