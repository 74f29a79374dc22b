"""Which of the forms A to D a mask takes, at what cost, and that A to C read nothing on the host."""

from __future__ import annotations

import pytest
import torch

from fastattn.masks import (
    BigBird,
    Causal,
    Dense,
    Dilated,
    Document,
    GlobalTokens,
    KeyLengths,
    KeyMask,
    KeyRange,
    Longformer,
    LoweredMask,
    PerHead,
    Predicate,
    PrefixLM,
    SinkTokens,
    SlidingWindow,
    Strided,
)
from fastattn.masks.cache import tensors_in

CPU = torch.device("cpu")
SHAPE = (2, 2, 200, 300)


def forms(lowered: LoweredMask) -> dict[str, int]:
    """Which parts the lowered form has; intervals with their number."""
    found = {name: 1 for name in ("dense", "key_bits", "blocks") if getattr(lowered, name) is not None}
    if lowered.key_start is not None or lowered.key_end is not None:
        found["keys"] = 1
    if lowered.band_left is not None or lowered.band_right is not None:
        found["band"] = 1
    if lowered.intervals is not None:
        found["intervals"] = lowered.intervals.shape[0]
        assert lowered.bounds.shape == (*lowered.intervals.shape[:3], -(-lowered.intervals.shape[3] // 64), 4)
    return found


IDS = torch.arange(300) // 70
BITS = torch.rand(2, 300, generator=torch.Generator().manual_seed(1)) < 0.5
LENGTHS = KeyLengths([100, 299])
EVEN = Predicate(lambda b, h, q, k: (q + k) % 2 == 0)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (SlidingWindow(None, None), {}),
        (Causal() & SlidingWindow(9, 9, "top-left") & LENGTHS & SinkTokens(4), {"band": 1, "keys": 1}),
        (~Causal(), {"band": 1}),
        (~SlidingWindow(5, None) & ~LENGTHS, {"band": 1, "keys": 1}),
        (~(Causal() | LENGTHS), {"band": 1, "keys": 1}),
        (~~Causal(), {"band": 1}),
        (Dilated(3, 1), {"band": 1}),
        (Strided(1), {"band": 1}),
        (PerHead([Causal(), Causal()]), {"band": 1}),
        (KeyMask(BITS) & ~KeyMask(BITS[:1]) & Causal(), {"key_bits": 1, "band": 1}),
        (Dense(torch.ones(200, 300).bool()) & Causal(), {"dense": 1, "band": 1}),
        (~SlidingWindow(4, 4), {"intervals": 2}),
        (PrefixLM(7) & LENGTHS, {"intervals": 1, "keys": 1}),
        (Document(IDS[:200], IDS) & Causal(), {"intervals": 1, "band": 1}),
        (Causal() | SinkTokens(4), {"intervals": 1}),  # both reach back to the first key
        (Causal() & (SlidingWindow(9, 0) | SinkTokens(4)), {"intervals": 2, "band": 1}),
        (SlidingWindow(9, 0) | SinkTokens(4) | KeyRange([1, 2], [3, 4]) | Document(IDS[:200], IDS), {"intervals": 4}),
        (Longformer(32, 4) & PrefixLM(3), {"intervals": 2}),
        (Dilated(1, 5), {"intervals": 3}),
        (BigBird(32, 3, 1, 0), {"intervals": 2}),
        (PerHead([Causal(), SlidingWindow(3, 3) | SinkTokens(2)]), {"intervals": 2}),
        (GlobalTokens(torch.tensor([1, 2])) | SlidingWindow(2, 2), {"intervals": 2}),
        (Longformer(4, 1) & ~SlidingWindow(1, 1) & Dilated(1, 4), {"intervals": 3, "blocks": 1}),  # five in all
        (Dilated(2, 3) & LENGTHS, {"band": 1, "keys": 1, "blocks": 1}),
        (Strided(5), {"band": 1, "blocks": 1}),
        (BigBird(64, 3, 1, 3) & LENGTHS & Causal() & KeyMask(BITS), {"band": 1, "keys": 1, "key_bits": 1, "blocks": 1}),
        (KeyMask(BITS) | Causal(), {"blocks": 1}),
        (EVEN & Causal(), {"band": 1, "blocks": 1}),
        (PerHead([Causal(), EVEN]), {"blocks": 1}),
        (Document(IDS[:200], IDS, contiguous=False), {"blocks": 1}),
    ],
    ids=repr,
)
def test_the_smallest_form_serves(mask, expected):
    assert forms(mask.lower(*SHAPE, CPU)) == expected


def test_extents_are_one_where_nothing_differs():
    longformer = Longformer(32, 4).lower(*SHAPE, CPU)
    assert longformer.intervals.shape == (2, 1, 1, 200, 2) and longformer.bounds.shape == (2, 1, 1, 4, 4)
    assert PrefixLM([3, 4]).lower(*SHAPE, CPU).intervals.shape == (1, 2, 1, 200, 2)
    assert PerHead([Causal(), PrefixLM([3, 4])]).lower(*SHAPE, CPU).intervals.shape == (1, 2, 2, 200, 2)
    assert EVEN.lower(*SHAPE, CPU).blocks.row_ptr.shape == (1, 1, 5)
    assert Predicate(lambda b, h, q, k: (q + h) < k).lower(*SHAPE, CPU).blocks.row_ptr.shape == (1, 2, 5)
    assert (EVEN | LENGTHS).lower(*SHAPE, CPU).blocks.col_ptr.shape == (2, 1, 6)


def test_bounds_are_those_of_64_rows():
    lowered = (Longformer(32, 4) | Document(IDS[:200], IDS)).lower(*SHAPE, CPU)
    for tile in range(4):
        rows = lowered.intervals[:, :, :, 64 * tile : 64 * tile + 64]
        least, greatest = rows.amin(dim=3), rows.amax(dim=3)
        wanted = torch.stack([least[..., 0], greatest[..., 0], least[..., 1], greatest[..., 1]], dim=-1)
        assert torch.equal(lowered.bounds[:, :, :, tile], wanted)


@pytest.mark.parametrize(
    "make",
    [
        lambda t: Causal() & KeyLengths(t),
        lambda t: KeyRange(t, t + 2) | GlobalTokens(t),
        lambda t: ~(Longformer(32, 4) | SinkTokens(t)) & KeyMask(t[:, None] < torch.arange(300, device=t.device)),
        lambda t: Document(t.expand(200, 2).T.contiguous(), t.expand(300, 2).T.contiguous()) | PrefixLM(t),
        lambda t: PerHead([Causal(), PrefixLM(t)]),
    ],
)
def test_no_value_is_read_on_the_host(make):
    """A meta tensor has no values: reading one raises."""
    meta = torch.device("meta")
    lowered = make(torch.zeros(2, dtype=torch.int64, device=meta)).lower(*SHAPE, meta)
    assert lowered.blocks is None and all(t.device == meta for t in tensors_in(lowered))


class _Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result if isinstance(result, tuple) else (result,)):
            self.most = max(self.most, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    ("mask", "lowered_kib", "working_mib"),
    [
        (Causal() & SlidingWindow(4095, 0) | GlobalTokens(64), 1056, 2),
        (Longformer(512, 64), 1056, 2),
        (Document(torch.arange(65536) // 5000) & Causal(), 528, 2),
        (BigBird(64, 3, 2, 3), 200, 24),
        (Dilated(64, 4), 400, 24),
    ],
    ids=repr,
)
def test_65536_tokens_take_kilobytes(mask, lowered_kib, working_mib):
    """Sq x Skv would be 4 GiB of bools."""
    length = 65536
    with _Sizes() as sizes:
        lowered = mask.lower(1, 8, length, length, CPU)
    assert sum(t.nbytes for t in tensors_in(lowered)) <= lowered_kib * 1024
    assert 0 < sizes.most <= working_mib * 2**20
