"""Form D: the arrays say what the mask does, the transpose what the rows do, and tiles merge blocks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fastattn.masks import (
    BigBird,
    Causal,
    Dense,
    Dilated,
    GlobalTokens,
    KeyMask,
    PerHead,
    Predicate,
    SlidingWindow,
    Strided,
    retile,
)
from fastattn.masks.blocks import build_blocks
from fastattn.masks.lowered import LoweredMask, Size, visible

CPU = torch.device("cpu")
KEEP = torch.rand(2, 300, generator=torch.Generator().manual_seed(3)) < 0.5
MASKS = [
    Strided(70),
    BigBird(32, 3, 1, 2),
    Causal() | KeyMask(KEEP),
    PerHead([Strided(64), Dilated(5, 30), Causal()]),
    PerHead([KeyMask(KEEP) | SlidingWindow(9, 9), Predicate(lambda b, h, q, k: (q * k) % 5 == b), Causal()]),
    SlidingWindow(0, 0, "top-left") & ~SlidingWindow(None, None),
    SlidingWindow(None, None) | Predicate(lambda b, h, q, k: q < k),
]
SHAPES = [(200, 300), (64, 300), (257, 300), (1, 300)]


def build(mask, len_q, len_k=300):
    return build_blocks(mask, Size(2, 3, len_q, len_k), CPU)


def lines(pointers, *columns):
    """Per batch entry, head and line the entries of the columns."""
    for b in range(pointers.shape[0]):
        for h in range(pointers.shape[1]):
            bounds = pointers[b, h].tolist()
            for line, (start, end) in enumerate(pairwise(bounds)):
                yield (b, h, line), [column[start:end].tolist() for column in columns]


@pytest.mark.parametrize(("len_q", "len_k"), SHAPES)
@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_they_say_what_the_mask_says(mask, len_q, len_k):
    blocks = build(mask, len_q, len_k)
    seen = visible(LoweredMask(blocks=blocks), len_q, len_k, CPU).expand(2, 3, len_q, len_k)
    assert torch.equal(seen, mask.to_dense(2, 3, len_q, len_k))
    assert blocks.bitmaps.dtype == torch.int64 and (blocks.bitmaps[0] == -1).all()
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in (*blocks[:3], *blocks[4:]))
    assert torch.unique(blocks.bitmaps, dim=0).shape == blocks.bitmaps.shape  # equal ones are stored once
    assert set(blocks.id.tolist()) | {0} == set(range(blocks.bitmaps.shape[0]))
    entries = {}
    for (b, h, row), (cols, ids) in lines(blocks.row_ptr, blocks.col, blocks.id):
        assert cols == sorted(set(cols))
        entries |= {(b, h, row, col): number for col, number in zip(cols, ids, strict=True)}
    assert len(entries) == blocks.col.numel()
    for (b, h, col), (rows, ids) in lines(blocks.col_ptr, blocks.row, blocks.row_id):
        assert rows == sorted(set(rows))
        for row, number in zip(rows, ids, strict=True):
            assert entries.pop((b, h, row, col)) == number
    assert not entries


def test_full_blocks_at_the_last_rows_and_keys_are_full():
    blocks = build(SlidingWindow(None, None) | Predicate(lambda b, h, q, k: q < k), 70, 70)
    assert blocks.id.tolist() == [0] * 4 and blocks.bitmaps.shape == (1, 64)


def test_bitmaps_repeat_along_diagonals():
    assert build(Strided(70), 640, 640).bitmaps.shape[0] <= 1 + 70
    assert build(Dilated(8, 64), 640, 640).bitmaps.shape[0] == 2  # one diagonal of ones


def test_two_bitmaps_of_one_digest_stay_two(monkeypatch):
    """Digests only sort out what may be equal."""
    monkeypatch.setattr(torch.Tensor, "sum", lambda self, dim=None: torch.zeros(self.shape[0], dtype=torch.int64))
    from fastattn.masks.blocks import _distinct

    words = torch.tensor([[1] * 64, [2] * 64, [1] * 64])
    distinct, number = _distinct(words)
    assert distinct.shape == (2, 64) and torch.equal(distinct[number], words)


def test_what_a_band_hides_is_not_evaluated():
    tiles = []

    def rule(b, h, q, k):
        tiles.append(q.shape[0])
        return (q + k) % 3 == 0

    mask = Predicate(rule) & SlidingWindow(64, 0) & GlobalTokens(8)
    lowered = mask.lower(1, 1, 1024, 1024, CPU)
    assert lowered.blocks is not None and lowered.band_left == 64
    assert sum(tiles) <= 1 + 1 + 2 * 16  # two probes of its shape; of 256 tiles those on two diagonals
    seen = visible(lowered, 1024, 1024, CPU)
    assert torch.equal(seen[0, 0], mask.to_dense(1, 1, 1024, 1024)[0, 0])


def test_a_predicate_is_given_tiles_and_never_the_whole():
    shapes = set()

    def rule(b, h, q, k):
        shapes.add(tuple(torch.broadcast_shapes(b.shape, h.shape, q.shape, k.shape)))
        return q >= k

    build(Predicate(rule), 3000, 2000)
    assert {shape[1:] for shape in shapes if len(shape) == 3} == {(64, 64)} and max(s[0] for s in shapes) <= 512


def test_indices_stay_within_the_lengths():
    table = torch.rand(70, 90) < 0.5
    mask = Predicate(lambda b, h, q, k: table[q, k])
    assert torch.equal(visible(mask.lower(1, 1, 70, 90, CPU), 70, 90, CPU)[0, 0], table)


@pytest.mark.parametrize(("rows", "cols"), [(64, 64), (128, 128), (64, 128), (256, 64), (512, 512)])
@pytest.mark.parametrize(("len_q", "len_k"), [(257, 300), (64, 300)])
@pytest.mark.parametrize("mask", [MASKS[1], MASKS[3]], ids=repr)
def test_tiles_merge_blocks(mask, len_q, len_k, rows, cols):
    blocks = build(mask, len_q, len_k)
    tiles = retile(blocks, rows, cols)
    assert retile(blocks, rows, cols) is tiles
    seen = mask.to_dense(2, 3, len_q, len_k)[: blocks.row_ptr.shape[0], : blocks.row_ptr.shape[1]]
    numbers = {}
    listed = {}
    for (b, h, row), (found, every) in lines(tiles.row_ptr, tiles.col, torch.arange(tiles.col.numel())):
        assert found == sorted(set(found))
        listed |= {(b, h, row, col): number for col, number in zip(found, every, strict=True)}
    for (b, h, row), (found, ids) in lines(blocks.row_ptr, blocks.col, blocks.id):
        numbers |= {(b, h, row, col): number for col, number in zip(found, ids, strict=True)}
    grid = (-(-len_q // 64), -(-len_k // 64))
    for b in range(seen.shape[0]):
        for h in range(seen.shape[1]):
            for row in range(-(-len_q // rows)):
                for col in range(-(-len_k // cols)):
                    part = seen[b, h, row * rows : (row + 1) * rows, col * cols : (col + 1) * cols]
                    entry = listed.pop((b, h, row, col), None)
                    assert (entry is not None) == bool(part.any())
                    if entry is None:
                        continue
                    assert bool(tiles.full[entry]) == bool(part.all())
                    for i in range(rows // 64):
                        for j in range(cols // 64):
                            at = (row * rows // 64 + i, col * cols // 64 + j)
                            wanted = numbers.get((b, h, *at), -1) if at[0] < grid[0] and at[1] < grid[1] else 0
                            assert int(tiles.ids[entry, i, j]) == wanted
    assert not listed
    transposed = {
        (b, h, row, col): entry
        for (b, h, col), (found, entries) in lines(tiles.col_ptr, tiles.row, tiles.entry)
        for row, entry in zip(found, entries, strict=True)
    }
    for (b, h, row), (found, every) in lines(tiles.row_ptr, tiles.col, torch.arange(tiles.col.numel())):
        for col, entry in zip(found, every, strict=True):
            assert transposed.pop((b, h, row, col)) == entry
    assert not transposed


@pytest.mark.parametrize("wrong", [0, 32, 96, -64])
def test_tiles_are_multiples_of_64(wrong):
    with pytest.raises(ValueError, match=f"rows={wrong} is no multiple of 64"):
        retile(build(MASKS[0], 64), wrong, 64)
    with pytest.raises(ValueError, match=f"cols={wrong} is no multiple of 64"):
        retile(build(MASKS[0], 64), 64, wrong)


def test_the_grid_of_tiles():
    mask = Causal() & SlidingWindow(100, None) | Dense(torch.zeros(1, 1, 1, 1).bool())
    seen = mask.to_dense(1, 1, 200, 200)[0, 0]
    grid = mask.tiles(200, 200)[0, 0]
    assert grid.dtype == torch.int8 and grid.shape == (4, 4)
    for row in range(4):
        for col in range(4):
            part = seen[64 * row : 64 * row + 64, 64 * col : 64 * col + 64]
            assert grid[row, col] == int(part.any()) + int(part.all())
    assert PerHead([Causal(), Strided(3)]).tiles(65, 65).shape == (1, 2, 2, 2)
    assert KeyMask(KEEP).tiles(10, 300).shape == (2, 1, 1, 5)
    assert Causal().tiles(0, 5).shape == (1, 1, 0, 1) and Causal().density(0, 5) == 0.0
    assert Causal().density(4, 4) == 10 / 16
