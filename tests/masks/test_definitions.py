"""Every named mask against its definition in words, pair by pair, and its lowered form against both."""

from __future__ import annotations

import sys

import pytest
import torch

import fastattn
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
    PerHead,
    Predicate,
    PrefixLM,
    SinkTokens,
    SlidingWindow,
    Strided,
    visible,
)

CPU = torch.device("cpu")
BATCH, HEADS = 2, 3
SHAPES = [(1, 1), (6, 6), (3, 8), (8, 3), (1, 6), (0, 4), (4, 0)]
BORDERS = [(64, 64), (63, 65), (65, 129), (129, 65)]


def at(i, len_q, len_k, align):
    return i + len_k - len_q if align == "bottom-right" else i


def brute_force(rule, batch, heads, len_q, len_k):
    """bool (batch, heads, len_q, len_k) of rule(b, h, i, j, len_q, len_k), one pair at a time."""
    seen = [
        [[[bool(rule(b, h, i, j, len_q, len_k)) for j in range(len_k)] for i in range(len_q)] for h in range(heads)]
        for b in range(batch)
    ]
    return torch.tensor(seen, dtype=torch.bool).view(batch, heads, len_q, len_k)


def lowered_dense(mask, batch, heads, len_q, len_k):
    """The lowered form as bool (batch, heads, len_q, len_k)."""
    seen = visible(mask.lower(batch, heads, len_q, len_k, CPU), len_q, len_k, CPU)
    full = (batch, heads, len_q, len_k)
    return torch.ones(full, dtype=torch.bool) if seen is None else seen.expand(full)


def hidden_by(rule):
    return lambda *index: not rule(*index)


def window(left, right, align="bottom-right"):
    def rule(b, h, i, j, len_q, len_k):
        p = at(i, len_q, len_k, align)
        return (left is None or j >= p - left) and (right is None or j <= p + right)

    return rule


def prefix(n, align):
    return lambda b, h, i, j, lq, lk: j < n[b] or j <= at(i, lq, lk, align)


def global_tokens(n, align):
    return lambda b, h, i, j, lq, lk: j < n[b] or 0 <= at(i, lq, lk, align) < n[b]


def dilated(reach, dilation, align):
    def rule(b, h, i, j, len_q, len_k):
        p = at(i, len_q, len_k, align)
        return j in [p + dilation * step for step in range(-reach, reach + 1)]

    return rule


def strided(stride, align):
    def rule(b, h, i, j, len_q, len_k):
        p = at(i, len_q, len_k, align)
        return j in range(p - stride, p + 1) or j in range(p, -1, -stride)

    return rule


def longformer(width, tokens, align):
    def rule(b, h, i, j, len_q, len_k):
        p = at(i, len_q, len_k, align)
        return abs(j - p) <= width // 2 or j in range(tokens) or p in range(tokens)

    return rule


def bigbird(block, width, globals_, align):
    """Without its random blocks."""

    def rule(b, h, i, j, len_q, len_k):
        own, other = at(i, len_q, len_k, align) // block, j // block
        return abs(own - other) <= width // 2 or other < globals_ or 0 <= own < globals_

    return rule


def cases(len_q, len_k):
    for align in ("bottom-right", "top-left"):
        yield Causal(align), window(None, 0, align)
        for left, right in [(0, 0), (2, 1), (None, 2), (1, None), (None, None), (70, 3)]:
            yield SlidingWindow(left, right, align), window(left, right, align)
            yield ~SlidingWindow(left, right, align), hidden_by(window(left, right, align))
        yield PrefixLM(3, align), prefix([3, 3], align)
        yield PrefixLM([0, 70], align), prefix([0, 70], align)
        yield GlobalTokens(2, align), global_tokens([2, 2], align)
        yield GlobalTokens(torch.tensor([0, 5]), align), global_tokens([0, 5], align)
        for reach, dilation in [(0, 3), (1, 1), (1, 2), (2, 3), (3, 1), (4, 31)]:
            yield Dilated(reach, dilation, align), dilated(reach, dilation, align)
        for stride in (1, 2, 5, 64, 100):
            yield Strided(stride, align), strided(stride, align)
        yield Longformer(5, 2, align), longformer(5, 2, align)
        yield Longformer(0, 0, align), longformer(0, 0, align)
        yield BigBird(2, 3, 1, 0, align=align), bigbird(2, 3, 1, align)
        yield BigBird(48, 1, 1, 0, align=align), bigbird(48, 1, 1, align)
    lengths, starts = [3, len_k + 4], [1, 0]
    yield KeyLengths(lengths), lambda b, h, i, j, *_: j < lengths[b]
    yield KeyLengths(torch.tensor(lengths)), lambda b, h, i, j, *_: j < lengths[b]
    yield ~KeyLengths(lengths), lambda b, h, i, j, *_: j >= lengths[b]
    yield KeyRange(starts, lengths), lambda b, h, i, j, *_: starts[b] <= j < lengths[b]
    yield ~KeyRange(starts, lengths), lambda b, h, i, j, *_: not starts[b] <= j < lengths[b]
    yield SinkTokens(2), lambda b, h, i, j, *_: j < 2
    yield SinkTokens(torch.tensor([0, 66])), lambda b, h, i, j, *_: j < (0, 66)[b]
    keep = torch.rand(BATCH, len_k) < 0.5
    yield KeyMask(keep), lambda b, h, i, j, *_: keep[b, j]
    yield KeyMask(keep[:1]), lambda b, h, i, j, *_: keep[0, j]
    yield ~KeyMask(keep), lambda b, h, i, j, *_: not keep[b, j]
    dense = torch.rand(BATCH, 1, len_q, len_k) < 0.5
    yield Dense(dense), lambda b, h, i, j, *_: dense[b, 0, i, j]
    yield ~Dense(dense[0, 0]), lambda b, h, i, j, *_: not dense[0, 0, i, j]
    ids_q, ids_k = torch.randint(0, 3, (BATCH, len_q)), torch.randint(0, 3, (BATCH, len_k))
    yield Document(ids_q, ids_k, contiguous=False), lambda b, h, i, j, *_: ids_q[b, i] == ids_k[b, j]
    packed = ids_k.sort(descending=True).values
    yield Document(ids_q, packed), lambda b, h, i, j, *_: ids_q[b, i] == packed[b, j]
    yield Document(ids_q[0], packed[0].to(torch.uint8)), lambda b, h, i, j, *_: ids_q[0, i] == packed[0, j]
    if len_q == len_k:
        yield Document(packed), lambda b, h, i, j, *_: packed[b, i] == packed[b, j]
    yield Predicate(lambda b, h, q, k: (q + 2 * k) % 3 < 2), lambda b, h, i, j, *_: (i + 2 * j) % 3 < 2
    yield Predicate(lambda b, h, q, k: k % 2 == 0), lambda b, h, i, j, *_: j % 2 == 0
    yield Predicate(lambda b, h, q, k: (b + q) % 2 == 0), lambda b, h, i, j, *_: (b + i) % 2 == 0
    yield Predicate(lambda b, h, q, k: h * k < 2 * q), lambda b, h, i, j, *_: h * j < 2 * i
    heads = [(Causal(), window(None, 0)), (SlidingWindow(2, 2), window(2, 2)), (Causal() | SinkTokens(1), None)]
    rules = [heads[0][1], heads[1][1], lambda b, h, i, j, *a: j == 0 or heads[0][1](b, h, i, j, *a)]
    yield PerHead([mask for mask, _ in heads]), lambda b, h, *a: rules[h](b, h, *a)
    yield PerHead([Causal()] * 3), window(None, 0)
    more = [Strided(3), KeyLengths(lengths), Causal()]
    others = [strided(3, "bottom-right"), lambda b, h, i, j, *_: j < lengths[b], window(None, 0)]
    yield PerHead(more), lambda b, h, *a: others[h](b, h, *a)


@pytest.mark.parametrize(("len_q", "len_k"), SHAPES)
def test_small(len_q, len_k):
    for mask, rule in cases(len_q, len_k):
        check(mask, rule, BATCH, HEADS, len_q, len_k)


@pytest.mark.parametrize(("len_q", "len_k"), BORDERS)
def test_round_tile_borders(len_q, len_k):
    for number, (mask, rule) in enumerate(cases(len_q, len_k)):
        if (number + len_q) % 3 == 0 or isinstance(mask, (PerHead, Predicate, Document)):
            check(mask, rule, BATCH, HEADS, len_q, len_k)


@pytest.mark.parametrize("far", [2**31, sys.maxsize, 2**70])
def test_what_is_far_beyond_every_key_is_unbounded(far):
    everything = [
        SlidingWindow(far, far),
        SlidingWindow(None, far),
        BigBird(far, 1, 0, 0),
        BigBird(2, far - (far + 1) % 2, 0, 0),
        BigBird(70, 1, far, 0),
        BigBird(far, 1, 0, 1),
        Longformer(far, far),
        GlobalTokens(far),
        PrefixLM(far),
    ]
    for mask in everything:
        assert mask.to_dense(1, 1, 130, 130).all() and mask.density(130, 130) == 1, mask
        assert lowered_dense(mask, 1, 1, 130, 130).all(), mask
        assert not lowered_dense(~mask, 1, 1, 130, 130).any(), mask
    q = torch.randn(1, 1, 20, 8)
    for mask, same in (
        (SlidingWindow(far, 0), Causal()),
        (Dilated(far, 3), Dilated(100, 3)),
        (Dilated(3, far), SlidingWindow(0, 0)),
        (Strided(far), Causal()),
    ):
        assert torch.equal(fastattn.attention(q, q, q, mask=mask), fastattn.attention(q, q, q, mask=same)), mask


def check(mask, rule, *shape):
    expected = brute_force(rule, *shape)
    assert torch.equal(mask.to_dense(*shape), expected), mask
    assert torch.equal(lowered_dense(mask, *shape), expected), mask
    assert mask.density(*shape[2:], *shape[:2]) == pytest.approx(
        expected.double().mean().item() if expected.numel() else 0
    )


@pytest.mark.parametrize("align", ["bottom-right", "top-left"])
@pytest.mark.parametrize(("block", "len_q", "len_k"), [(4, 30, 41), (16, 130, 130), (64, 200, 500), (100, 350, 640)])
def test_random_blocks_of_bigbird(block, len_q, len_k, align):
    """Beyond window and global blocks every query block sees exactly so many further key blocks, whole, and all its
    queries the same ones."""
    plain = bigbird(block, 3, 1, align)
    mask = BigBird(block, 3, 1, 2, seed=5, align=align)
    seen = mask.to_dense(1, 1, len_q, len_k)[0, 0]
    assert torch.equal(lowered_dense(mask, 1, 1, len_q, len_k)[0, 0], seen)
    key_blocks = -(-len_k // block)
    extra = {}
    for i in range(len_q):
        own = at(i, len_q, len_k, align) // block
        drawn = set()
        for other in range(key_blocks):
            keys = seen[i, other * block : (other + 1) * block]
            if plain(0, 0, i, other * block, len_q, len_k):
                assert keys.all()
            elif keys.any():
                assert keys.all()
                drawn.add(other)
        eligible = [J for J in range(key_blocks) if not plain(0, 0, i, J * block, len_q, len_k)]
        assert len(drawn) == min(2, len(eligible)) and drawn == extra.setdefault(own, drawn)
    assert torch.equal(BigBird(block, 3, 1, 2, 5, align).to_dense(1, 1, len_q, len_k)[0, 0], seen)
    if sum(map(len, extra.values())) > 4 and key_blocks > 8:
        assert not torch.equal(BigBird(block, 3, 1, 2, 6, align).to_dense(1, 1, len_q, len_k)[0, 0], seen)
