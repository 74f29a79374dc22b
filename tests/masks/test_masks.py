"""What masks are besides what they show: their text, their errors, how they combine."""

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
    intersect,
    visible,
)


def lowered_dense(mask, len_q, len_k):
    seen = visible(mask.lower(2, 3, len_q, len_k, torch.device("cpu")), len_q, len_k, torch.device("cpu"))
    full = (2, 3, len_q, len_k)
    return torch.ones(full, dtype=torch.bool) if seen is None else seen.expand(full)


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
    assert lowered.dense is None and lowered.key_bits.tolist() == [[31], [31]]


@pytest.mark.parametrize("shape", [(5,), (3, 5), (1, 5), (2, 1, 3, 5), (3, 1, 1), (2, 3, 3, 5)])
def test_dense_broadcasts(shape):
    tensor = torch.rand(shape) < 0.5
    expected = tensor.expand(2, 3, 3, 5)
    assert torch.equal(Dense(tensor).to_dense(2, 3, 3, 5), expected)
    assert torch.equal(lowered_dense(Dense(tensor), 3, 5), expected)


def test_ids_of_one_row_serve_an_empty_batch():
    mask = Document(torch.zeros(0, 12, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64))
    assert mask.lower(0, 2, 12, 1, torch.device("cpu")).intervals.shape == (1, 0, 1, 12, 2)
    assert (mask & KeyLengths(torch.zeros(0, dtype=torch.int32))).to_dense(0, 2, 12, 1).shape == (0, 2, 12, 1)


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


def visible_half(b, h, q, k):
    return q // 2 == k


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (PrefixLM(3), "PrefixLM(3)"),
        (PrefixLM([3, 4], "top-left"), "PrefixLM([3, 4], align='top-left')"),
        (GlobalTokens(torch.tensor([1, 2])), "GlobalTokens(int64 tensor (2,) on cpu)"),
        (SinkTokens(4), "SinkTokens(4)"),
        (Dilated(2, 3), "Dilated(2, 3)"),
        (Strided(64, "top-left"), "Strided(64, align='top-left')"),
        (Longformer(512, 16), "Longformer(512, 16)"),
        (BigBird(64, 3, 2, 3, 7), "BigBird(64, 3, 2, 3, 7)"),
        (Document(torch.zeros(3).int()), "Document(int32 tensor (3,) on cpu)"),
        (Predicate(visible_half), "Predicate(visible_half)"),
        (PerHead([Causal(), SinkTokens(1)]), "PerHead([Causal(), SinkTokens(1)])"),
        (~Causal(), "~Causal()"),
        (~~Causal(), "~~Causal()"),
        (~(Causal() & SinkTokens(1)), "~(Causal() & SinkTokens(1))"),
        ((Causal() | SinkTokens(1)) & SinkTokens(2), "(Causal() | SinkTokens(1)) & SinkTokens(2)"),
        (Causal() & SinkTokens(1) | ~SinkTokens(2), "Causal() & SinkTokens(1) | ~SinkTokens(2)"),
    ],
)
def test_reprs_have_brackets_where_precedence_needs_them(mask, text):
    assert repr(mask) == text


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
        (lambda: Causal() & torch.ones(2), TypeError, "Causal\\(\\) is combined with a tensor: make a mask"),
        (lambda: torch.ones(2) | Causal(), TypeError, "Causal\\(\\) is combined with a tensor: make a mask"),
        (lambda: Causal() and KeyLengths([2]), TypeError, "combine masks with &, \\| and ~"),
        (lambda: Causal() | None, TypeError, "unsupported operand"),
        (lambda: KeyLengths(3), TypeError, "lengths=3 is a int: pass an int32 tensor of shape"),
        (lambda: KeyRange([0], "1"), TypeError, "end='1' is a str: pass an int32 tensor of shape"),
        (lambda: PrefixLM(-1), ValueError, "PrefixLM: n=-1 is too small: pass 0 or more tokens"),
        (lambda: PrefixLM(2.0), TypeError, "PrefixLM: n=2.0 is a float: pass a whole number of tokens"),
        (lambda: PrefixLM(2, "left"), ValueError, "align='left' is unknown"),
        (lambda: GlobalTokens([1, -2]), ValueError, "GlobalTokens: n holds -2: pass 0 or more tokens per batch entry"),
        (lambda: GlobalTokens(torch.ones(2)), TypeError, "n has dtype torch.float32: pass an int32 tensor"),
        (lambda: GlobalTokens("3"), TypeError, "GlobalTokens: n='3' is a str: pass a whole number of tokens"),
        (lambda: SinkTokens(True), TypeError, "SinkTokens: n=True is a bool: pass a whole number of tokens"),
        (lambda: Dilated(-1, 2), ValueError, "Dilated: window=-1 is too small: pass 0 or more keys on either side"),
        (lambda: Dilated(1, 0), ValueError, "Dilated: dilation=0 is too small: pass 1 or more positions"),
        (lambda: Dilated(1, 2, "x"), ValueError, "align='x' is unknown"),
        (lambda: Strided(0), ValueError, "Strided: stride=0 is too small: pass 1 or more positions"),
        (lambda: Strided(2, None), ValueError, "align=None is unknown"),
        (lambda: Longformer(-2, 0), ValueError, "Longformer: window=-2 is too small: pass 0 or more keys"),
        (lambda: Longformer(2, None), TypeError, "Longformer: global_tokens=None is a NoneType: pass a whole number"),
        (lambda: BigBird(0, 3, 1, 1), ValueError, "BigBird: block=0 is too small: pass 1 or more positions"),
        (lambda: BigBird(64, 2, 1, 1), ValueError, "BigBird: window_blocks=2 is even: pass an odd width such as 3"),
        (lambda: BigBird(64, 0, 1, 1), ValueError, "BigBird: window_blocks=0 is too small: pass 1 or more blocks"),
        (lambda: BigBird(64, 3, -1, 1), ValueError, "BigBird: global_blocks=-1 is too small"),
        (lambda: BigBird(64, 3, 1, 1.5), TypeError, "BigBird: random_blocks=1.5 is a float: pass a whole number"),
        (lambda: BigBird(64, 3, 1, 1, -1), ValueError, "BigBird: seed=-1 is too small"),
        (lambda: Document([0, 1]), TypeError, "Document: ids_q is a list: pass an integer tensor"),
        (lambda: Document(torch.ones(3)), TypeError, "Document: ids_q has dtype torch.float32: pass an integer tensor"),
        (lambda: Document(torch.ones(1, 1, 3).int()), ValueError, "ids_q has shape .*: pass one id per token"),
        (
            lambda: Document(torch.tensor([[0, 0], [0, 0]]), torch.tensor([[0, 0, 1], [1, 0, 1]])),
            ValueError,
            "Document: ids_k has an id in row 1 that comes back after another one: sort .* or pass contiguous=False",
        ),
        (lambda: Document(torch.tensor([2, 1, 2])), ValueError, "Document: ids_q has an id in row 0 that comes back"),
        (lambda: Predicate(Causal()), TypeError, "Predicate: fn is a Causal: pass a function fn"),
        (lambda: PerHead(Causal()), TypeError, "PerHead: masks is a Causal: pass a list with one mask per query head"),
        (lambda: PerHead([]), ValueError, r"PerHead: masks=\[\] is empty: pass one mask per query head"),
        (lambda: PerHead([Causal(), None]), TypeError, "PerHead: masks holds a NoneType: pass objects of"),
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
        (PrefixLM([1]), "PrefixLM: n holds 1 numbers, but q has a batch of 2: pass one per batch entry"),
        (Document(torch.zeros(5).int()), r"Document: ids_q has shape \(5,\), but this call has B=2 and Sq=3: pass"),
        (Document(torch.zeros(3).int()), r"ids_q, which stands for ids_k, has shape .* Skv=5: pass ids_k too"),
        (Document(torch.zeros(3).int(), torch.zeros(3, 5).int()), r"Document: ids_k has shape \(3, 5\)"),
        (PerHead([Causal()]), "PerHead: masks holds 1 masks, but q has 3 heads: pass one per query head"),
        (~PerHead([KeyLengths([1])] * 3) | Causal(), "lengths holds 1 numbers, but q has a batch of 2"),
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


@pytest.mark.parametrize(("result", "found"), [(torch.zeros(1), "torch.float32"), (True, "bool")])
def test_a_predicate_returns_a_bool_tensor(result, found):
    with pytest.raises(TypeError, match=f"Predicate: fn returned {found}: return a bool tensor, True where visible"):
        Predicate(lambda b, h, q, k: result).lower(1, 1, 3, 5, torch.device("cpu"))


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (5, 1), (1, 1, 1, 1, 1)])
def test_what_a_predicate_returns_broadcasts_to_its_indices(shape):
    captured = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"Predicate: fn returned a tensor of shape .*by them, as in table\[h\]"):
        Predicate(lambda b, h, q, k: captured & (k <= q)).lower(1, 3, 7, 9, torch.device("cpu"))
    table = torch.tensor([True, False, True])
    seen = Predicate(lambda b, h, q, k: table[h]).to_dense(1, 3, 7, 9)
    assert torch.equal(seen, table.view(1, 3, 1, 1).expand(1, 3, 7, 9))


def test_equality_is_of_construction_and_tensors_by_identity():
    lengths, other = torch.tensor([1, 2]), torch.tensor([1, 2])
    same = [
        (Causal(), SlidingWindow(None, 0)),
        (SlidingWindow(3, 1) | GlobalTokens(2), SlidingWindow(3, 1) | GlobalTokens(2)),
        (KeyLengths([1, 2]), KeyLengths((1, 2))),
        (KeyLengths(lengths) & Causal(), KeyLengths(lengths) & Causal()),
        (BigBird(64, 3, 1, 2, 5), BigBird(64, 3, 1, 2, 5)),
        (PerHead([Causal(), Strided(3)]), PerHead((Causal(), Strided(3)))),
        (Predicate(visible_half), Predicate(visible_half)),
    ]
    for a, b in same:
        assert a == b and hash(a) == hash(b)
    different = [
        (Causal(), Causal("top-left")),
        (KeyLengths(lengths), KeyLengths(other)),
        (Causal() & SinkTokens(1), Causal() | SinkTokens(1)),
        (BigBird(64, 3, 1, 2, 5), BigBird(64, 3, 1, 2, 6)),
        (Dense(lengths > 0), ~Dense(lengths > 0)),
        (KeyRange([0], [1]), KeyLengths([1])),
        (Predicate(visible_half), Predicate(lambda b, h, q, k: q // 2 == k)),
        (Causal(), "Causal()"),
    ]
    for a, b in different:
        assert a != b
