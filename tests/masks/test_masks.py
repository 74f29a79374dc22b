"""Every mask by brute force: to_dense and the lowering against the definition, key by key."""

from __future__ import annotations

import pytest
import torch

from fastattn.masks import Causal, Dense, KeyLengths, KeyMask, KeyRange, LoweredMask, SlidingWindow, intersect, visible

BATCH, HEADS = 2, 3
SHAPES = [(1, 1), (5, 5), (3, 7), (7, 3), (1, 6), (0, 4), (4, 0)]


def position(i, len_q, len_k, align):
    return i + len_k - len_q if align == "bottom-right" else i


def window(left, right, align):
    def rule(b, h, i, j, len_q, len_k):
        p = position(i, len_q, len_k, align)
        return (left is None or j >= p - left) and (right is None or j <= p + right)

    return rule


def cases(len_k):
    keep = torch.rand(BATCH, len_k) < 0.5
    starts, ends = [1, 0], [3, 9]
    yield Causal(), window(None, 0, "bottom-right")
    yield Causal("top-left"), window(None, 0, "top-left")
    for left, right in [(0, 0), (2, 1), (None, 2), (1, None), (None, None)]:
        for align in ("bottom-right", "top-left"):
            yield SlidingWindow(left, right, align), window(left, right, align)
    yield KeyLengths(ends), lambda b, h, i, j, *_: j < ends[b]
    yield KeyLengths(torch.tensor(ends)), lambda b, h, i, j, *_: j < ends[b]
    yield KeyRange(starts, ends), lambda b, h, i, j, *_: starts[b] <= j < ends[b]
    yield KeyMask(keep), lambda b, h, i, j, *_: bool(keep[b, j])


def brute_force(rule, len_q, len_k):
    full = torch.zeros(BATCH, HEADS, len_q, len_k, dtype=torch.bool)
    for b in range(BATCH):
        for h in range(HEADS):
            for i in range(len_q):
                for j in range(len_k):
                    full[b, h, i, j] = rule(b, h, i, j, len_q, len_k)
    return full


def lowered_dense(mask, len_q, len_k):
    lowered = mask.lower(BATCH, HEADS, len_q, len_k, torch.device("cpu"))
    seen = visible(lowered, len_q, len_k, torch.device("cpu"))
    full = (BATCH, HEADS, len_q, len_k)
    return torch.ones(full, dtype=torch.bool) if seen is None else seen.expand(full)


@pytest.mark.parametrize(("len_q", "len_k"), SHAPES)
def test_named_masks(len_q, len_k):
    for mask, rule in cases(len_k):
        expected = brute_force(rule, len_q, len_k)
        assert torch.equal(mask.to_dense(BATCH, HEADS, len_q, len_k), expected), mask
        assert torch.equal(lowered_dense(mask, len_q, len_k), expected), mask


@pytest.mark.parametrize(("len_q", "len_k"), [(3, 7), (7, 3), (4, 4)])
def test_every_intersection_of_two(len_q, len_k):
    drawn = [*cases(len_k), (Dense(torch.ones(len_k, dtype=torch.bool)), lambda *_: True)]
    for a, rule_a in drawn:
        for b, rule_b in drawn:
            both = a & b
            expected = brute_force(rule_a, len_q, len_k) & brute_force(rule_b, len_q, len_k)
            assert torch.equal(both.to_dense(BATCH, HEADS, len_q, len_k), expected), both
            assert torch.equal(lowered_dense(both, len_q, len_k), expected), both


def test_intersections_stay_numbers():
    mask = Causal() & SlidingWindow(4, 2) & SlidingWindow(9, 9, "top-left") & KeyLengths([3, 5]) & KeyLengths([4, 1])
    lowered = mask.lower(2, 1, 6, 8, torch.device("cpu"))
    assert lowered.dense is None and lowered.intervals is None and lowered.key_start is None
    assert (lowered.band_offset, lowered.band_left, lowered.band_right) == (2, 4, 0)
    assert lowered.key_end.dtype == torch.int32 and lowered.key_end.tolist() == [3, 1]


def test_a_key_mask_keeps_one_row_per_batch_entry():
    lowered = (KeyMask(torch.ones(2, 5, dtype=torch.bool)) & KeyMask(torch.ones(1, 5, dtype=torch.bool))).lower(
        2, 4, 3, 5, torch.device("cpu")
    )
    assert lowered.dense.shape == (2, 1, 1, 5)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (1, 5), (2, 1, 3, 5), (3, 1, 1), (2, 3, 3, 5)])
def test_dense_broadcasts(shape):
    tensor = torch.rand(shape) < 0.5
    expected = tensor.expand(2, 3, 3, 5)
    assert torch.equal(Dense(tensor).to_dense(2, 3, 3, 5), expected)
    assert torch.equal(lowered_dense(Dense(tensor), 3, 5), expected)


def test_intervals_are_a_union():
    intervals = torch.tensor([[[0, 2], [1, 1]], [[3, 9], [-4, 1]]], dtype=torch.int32).view(2, 1, 1, 2, 2)
    seen = visible(LoweredMask(intervals=intervals), 2, 5, torch.device("cpu"))
    assert seen.view(2, 5).tolist() == [[True, True, False, True, True], [True, False, False, False, False]]


def test_intersecting_with_nothing_changes_nothing():
    lowered = SlidingWindow(2, 1).lower(2, 1, 3, 5, torch.device("cpu"))
    assert intersect(lowered, LoweredMask()) == lowered == intersect(LoweredMask(), lowered)


def test_reprs_read_as_the_call():
    mask = Causal() & SlidingWindow(3, None, "top-left") & KeyLengths([2, 4])
    assert repr(mask) == "Causal() & SlidingWindow(left=3, right=None, align='top-left') & KeyLengths([2, 4])"
    assert repr(KeyMask(torch.ones(2, 3, dtype=torch.bool))) == "KeyMask(bool tensor (2, 3) on cpu)"
    assert repr(KeyRange([0], [1])) == "KeyRange([0], [1])"


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Causal("middle"), ValueError, "align='middle' is unknown: pass 'bottom-right' or 'top-left'"),
        (lambda: SlidingWindow(-1, 0), ValueError, "left=-1 is negative: pass 0 or more positions, or None"),
        (lambda: SlidingWindow(0, 1.5), TypeError, "right=1.5 is a float: pass a whole number of positions"),
        (lambda: KeyLengths(torch.ones(2)), TypeError, "lengths has dtype torch.float32: pass an int32 tensor"),
        (lambda: KeyLengths([1.5]), TypeError, "lengths holds 1.5: pass whole numbers, one per batch entry"),
        (lambda: KeyLengths(torch.ones(2, 2).int()), ValueError, r"lengths has shape \(2, 2\): pass one number per"),
        (lambda: KeyMask(torch.ones(2, 3)), TypeError, "KeyMask: keep has dtype torch.float32: pass a bool tensor"),
        (lambda: KeyMask(torch.ones(3).bool()), ValueError, r"KeyMask: keep has shape \(3,\): pass a bool tensor"),
        (lambda: KeyMask([True]), TypeError, "KeyMask: keep is a list: pass a bool tensor"),
        (lambda: Dense(torch.ones(2)), TypeError, "Dense: tensor has dtype torch.float32: pass a bool tensor"),
        (
            lambda: Dense(torch.ones(1, 1, 1, 1, 1).bool()),
            ValueError,
            "Dense: tensor has shape .*: at most 4 dimensions",
        ),
        (lambda: Causal() & torch.ones(2), TypeError, "unsupported operand"),
    ],
)
def test_wrong_masks_name_the_argument_and_the_remedy(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (KeyLengths([1, 2, 3]), "lengths holds 3 numbers, but q has a batch of 2: pass one per batch entry"),
        (KeyMask(torch.ones(2, 4).bool()), r"KeyMask: keep has shape \(2, 4\), but this call has B=2 and Skv=5"),
        (Dense(torch.ones(4, 5).bool()), r"mask has shape \(4, 5\), which does not broadcast to"),
        (
            KeyLengths(torch.ones(2, device="meta").int()),
            r"lengths lies on meta but q on cpu: move it with .to\('cpu'\)",
        ),
    ],
)
def test_masks_that_do_not_fit_the_call(mask, text):
    with pytest.raises(ValueError, match=text):
        mask.lower(2, 3, 3, 5, torch.device("cpu"))
