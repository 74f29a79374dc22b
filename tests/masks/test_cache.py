"""Lowering is done once per mask, shapes and device, and what is remembered keeps nothing alive."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import numpy as np
import pytest
import torch

import fastattn
from fastattn.masks import (
    BigBird,
    Causal,
    Dilated,
    Document,
    KeyLengths,
    KeyMask,
    Longformer,
    Predicate,
    PrefixLM,
    SinkTokens,
    SlidingWindow,
    Strided,
    lowering,
)
from fastattn.masks.cache import Cache
from fastattn.masks.lowered import Size
from fastattn.masks.lowering import remembered

CPU = torch.device("cpu")


class Made:
    """A value to remember, to which there may be weak references."""


@pytest.fixture(autouse=True)
def _empty():
    remembered.clear()


def lower(mask, batch=2, length=100):
    return lowering.lower(mask, Size(batch, 2, length, length), CPU)


@pytest.mark.parametrize("make", [lambda: Longformer(8, 2), lambda: BigBird(64, 1, 1, 2), lambda: ~Strided(9)])
def test_equal_masks_share_their_lowering(make):
    first, again, longer = lower(make()), lower(make()), lower(make(), length=101)
    part = "intervals" if first.blocks is None else "blocks"
    assert getattr(first, part) is getattr(again, part)
    assert getattr(longer, part) is not getattr(first, part)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: KeyLengths([5, 30]), "key_end"),
        (lambda: SinkTokens(3) | SlidingWindow(4, 0), "intervals"),
        (lambda: PrefixLM(5), "bounds"),
        (lambda: Dilated(2, 3), "blocks"),
    ],
)
def test_what_lower_gives_may_be_written_to(make, field):
    q = torch.randn(2, 2, 100, 8)
    before = fastattn.attention(q, q, q, mask=make())
    written = getattr(make().lower(2, 2, 100, 100, CPU), field)
    for tensor in written if isinstance(written, tuple) else (written,):
        tensor.fill_(1)
    assert torch.equal(fastattn.attention(q, q, q, mask=make()), before)


def test_blocks_stay_when_the_lengths_beside_them_change():
    first, second = (lower(BigBird(64, 1, 1, 2) & KeyLengths(torch.tensor(n))) for n in ([3, 4], [5, 6]))
    assert first.blocks is second.blocks and second.key_end.tolist() == [5, 6]


def test_writing_to_a_tensor_makes_a_new_lowering():
    keep = torch.ones(2, 100, dtype=torch.bool)
    mask = KeyMask(keep)
    first = lower(mask)
    assert lower(mask).key_bits is first.key_bits
    keep[0, 0] = False
    assert lower(mask).key_bits[0, 0] == first.key_bits[0, 0] - 1
    both = lower(mask | Causal())
    keep[0, 99] = False
    assert not torch.equal(lower(mask | Causal()).blocks.bitmaps, both.blocks.bitmaps) or len(both.blocks.col) == 0


def test_a_copy_has_tensors_of_its_own():
    mask = KeyMask(torch.ones(2, 100, dtype=torch.bool))
    lower(mask)
    other = copy.deepcopy(mask)
    other.keep[0, 0] = False
    assert other != mask and lower(other).key_bits[0, 0] != lower(mask).key_bits[0, 0]


def test_nothing_is_kept_alive():
    ids = torch.arange(100) // 7

    class Table:
        seen = torch.rand(100, 100) < 0.5

        def __call__(self, b, h, q, k):
            return self.seen[q, k]

    rule = Table()
    mask = Document(ids) | Predicate(rule)
    lower(Document(ids)), lower(mask)
    assert len(remembered) > 0
    alive = [weakref.ref(ids), weakref.ref(rule)]
    del mask, ids, rule
    gc.collect()
    assert [reference() for reference in alive] == [None] * 2
    assert len(remembered) == 0


def test_it_is_bounded_in_entries_and_bytes():
    cache = Cache(entries=3, size=1000)
    for i in range(5):
        cache.get(i, (), lambda: (torch.zeros(8, dtype=torch.uint8),))
    assert len(cache) == 3
    cache.get("big", (), lambda: (torch.zeros(990, dtype=torch.uint8),))
    assert len(cache) == 2
    kept = cache.get("huge", (), lambda: (torch.zeros(5000, dtype=torch.uint8),))
    assert len(cache) == 1 and cache.get("huge", (), lambda: None) is kept


def test_the_least_recently_used_goes_first():
    cache = Cache(entries=2, size=1000)
    made = []

    def get(key):
        return cache.get(key, (), lambda: made.append(key))

    for key in ("a", "b", "a", "c", "a", "b"):
        get(key)
    assert made == ["a", "b", "c", "b"]


def test_what_a_cuda_graph_takes_stays_and_what_a_capture_makes_is_not_remembered(monkeypatch):
    cache = Cache(entries=1, size=1000)
    ids = torch.arange(3)
    taken = weakref.ref(cache.get("taken", (ids,), Made))
    with monkeypatch.context() as capture:
        capture.setattr("fastattn.masks.cache.is_capturing", lambda: True)
        assert cache.get("taken", (ids,), Made) is taken()
        assert cache.get("made", (), Made) is not cache.get("made", (), Made)
    other = weakref.ref(cache.get("other", (), Made))
    cache.get("last", (), Made)
    del ids
    gc.collect()
    assert taken() is not None and other() is None


def test_memory_that_is_not_torchs_is_read_in_every_call():
    keep = np.array([[True, True, False, False]])
    tensor, q = torch.from_numpy(keep), torch.randn(1, 1, 4, 8)
    for _ in range(2):
        seen = fastattn.attention(q, q, q, mask=KeyMask(tensor))
        torch.testing.assert_close(seen, fastattn.attention(q, q, q, mask=KeyMask(tensor.clone())))
        keep[:] = True  # the next batch, in the same buffer
    assert len(remembered) == 2  # the clones'

    bounds = np.array([0, 5, 20], dtype=np.int32)
    tensor, x = torch.from_numpy(bounds), torch.randn(20, 1, 8)
    for _ in range(2):
        packed = [
            fastattn.attention_varlen(x, x, x, cu, cu, max_seqlen_q=20, max_seqlen_k=20, mask=Dilated(2, 3))
            for cu in (tensor, tensor.clone())
        ]
        torch.testing.assert_close(*packed)
        bounds[1] = 12


def test_inference_tensors_are_lowered_anew_and_do_not_leak_into_training():
    with torch.inference_mode():
        keep = torch.ones(2, 100, dtype=torch.bool)
        assert lower(KeyMask(keep)).key_bits is not lower(KeyMask(keep)).key_bits
        q = torch.randn(2, 2, 100, 8)
        fastattn.attention(q, q, q, mask=BigBird(64, 1, 1, 2))
    q = torch.randn(2, 2, 100, 8, requires_grad=True)
    fastattn.attention(q, q, q, mask=BigBird(64, 1, 1, 2)).sum().backward()
    assert q.grad is not None


def test_threads_share_it():
    masks = [Longformer(2 * i, i) for i in range(20)]
    expected = [lower(mask).intervals.clone() for mask in masks]
    wrong = []

    def work():
        for _ in range(20):
            for mask, want in zip(masks, expected, strict=True):
                ids = torch.arange(100) // 9  # dies at once: the cache has to bury it
                lower(Document(ids))
                if not torch.equal(lower(mask).intervals, want):
                    wrong.append(mask)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong


def test_vmapped_and_fake_tensors_are_not_remembered():
    q, ids = torch.randn(3, 2, 2, 50, 8), torch.arange(50).expand(3, 2, 50) // torch.tensor([[[5]], [[9]], [[20]]])
    torch.func.vmap(lambda q, ids: fastattn.attention(q, q, q, mask=Document(ids) & Causal()))(q, ids)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        lower(Longformer(8, 2))
    gc.collect()
    assert len(remembered) == 0


def test_a_function_without_weak_references_is_called_anew():
    class Even:
        __slots__ = ()

        def __call__(self, b, h, q, k):
            return (q - k) % 2 == 0

    function = Even()
    first, again = lower(Predicate(function)), lower(Predicate(function))
    assert torch.equal(first.blocks.bitmaps, again.blocks.bitmaps) and len(remembered) == 0


def test_what_bigbird_draws_under_fake_tensors_is_no_tensor_for_later_calls():
    from torch._subclasses.fake_tensor import FakeTensorMode

    mask = BigBird(5, 3, 1, 2, seed=31)
    with FakeTensorMode():
        mask.to_dense(1, 1, 47, 47)
    assert mask.to_dense(1, 1, 47, 47).any(-1).all()
