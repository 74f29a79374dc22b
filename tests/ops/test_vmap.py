"""torch.func over the operators: vmap equals stacking the calls, alone and with grad inside or outside."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

import fastattn
from fastattn import ops
from fastattn.biases import ALiBi, RelativeBias
from fastattn.masks import Blocks, Causal, Document, GlobalTokens, KeyLengths, KeyMask, SlidingWindow, Strided

SIZE = 3


def flat(results):
    return results if isinstance(results, tuple) else (results,)


def stacked(function, tensors, in_dims):
    rows = []
    for i in range(SIZE):
        rows.append(
            flat(function(*(t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True))))
        )
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def draw(case, in_dims):
    tensors = []
    for shape, dim in zip(case.shapes, in_dims, strict=True):
        full = list(shape)
        if dim is not None:
            full.insert(dim, SIZE)
        tensors.append(torch.randn(full))
    return tensors


def dims_of(case):
    """All mapped in front, all mapped in the middle, and each one alone."""
    count = len(case.shapes)
    yield (0,) * count
    yield tuple(1 for _ in case.shapes)
    for i in range(count):
        yield tuple(0 if j == i else None for j in range(count))


def test_forward(case):
    for in_dims in dims_of(case):
        tensors = draw(case, in_dims)
        results = flat(vmap(case.function, in_dims=in_dims)(*tensors))
        for result, truth in zip(results, stacked(case.function, tensors, in_dims), strict=True):
            torch.testing.assert_close(result, truth, rtol=1e-5, atol=1e-6)


def test_no_entries(case):
    tensors = draw(case, (0,) * len(case.shapes))
    none = [t[:0].clone().requires_grad_() for t in tensors]
    results = flat(vmap(case.function)(*none))
    for result, shown in zip(results, flat(vmap(case.function)(*tensors)), strict=True):
        assert result.shape == (0, *shown.shape[1:]) and result.dtype == shown.dtype
    for gradient, shape in zip(torch.autograd.grad(sum(r.sum() for r in results), none), case.shapes, strict=True):
        assert gradient.shape == (0, *shape)


def loss_of(case):
    return lambda *tensors: sum(r.square().sum() for r in flat(case.function(*tensors)) if r.is_floating_point())


def test_gradients_per_entry(case):
    every = tuple(range(len(case.shapes)))
    gradient = grad(loss_of(case), argnums=every)
    for in_dims in dims_of(case):
        tensors = draw(case, in_dims)
        results = vmap(gradient, in_dims=in_dims)(*tensors)
        for result, truth in zip(results, stacked(gradient, tensors, in_dims), strict=True):
            torch.testing.assert_close(result, truth, rtol=1e-4, atol=1e-5)


def test_gradients_per_entry_of_the_input_alone(case):
    gradient = grad(loss_of(case))
    in_dims = (0,) + (None,) * (len(case.shapes) - 1)
    tensors = draw(case, in_dims)
    (truth,) = stacked(gradient, tensors, in_dims)
    torch.testing.assert_close(vmap(gradient, in_dims=in_dims)(*tensors), truth, rtol=1e-4, atol=1e-5)


def test_gradient_of_a_mapped_call(case):
    in_dims = (0,) * len(case.shapes)
    tensors = draw(case, in_dims)
    loss = loss_of(case)
    result = grad(lambda x: vmap(loss)(x, *tensors[1:]).sum())(tensors[0])
    (truth,) = stacked(grad(loss), tensors, in_dims)
    torch.testing.assert_close(result, truth, rtol=1e-4, atol=1e-5)


def test_plain_autograd_through_vmap(case):
    in_dims = (0,) * len(case.shapes)
    tensors = [t.requires_grad_() for t in draw(case, in_dims)]
    result = torch.autograd.grad(vmap(loss_of(case))(*tensors).sum(), tensors)
    truth = torch.autograd.grad(sum(loss_of(case)(*row) for row in zip(*tensors, strict=True)), tensors)
    for a, b in zip(result, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_masks_may_be_mapped():
    q, k, v = (torch.randn(SIZE, 2, 2, 4, 8) for _ in range(3))
    lengths = torch.tensor([[1, 2], [3, 4], [0, 4]])
    seen = torch.rand(SIZE, 1, 1, 4, 4) < 0.6

    def call(q, k, v, lengths, seen):
        return fastattn.attention(q, k, v, mask=KeyLengths(lengths) & fastattn.masks.Dense(seen))

    truth = stacked(call, (q, k, v, lengths, seen), (0,) * 5)[0]
    torch.testing.assert_close(vmap(call)(q, k, v, lengths, seen), truth)
    ranges = torch.randint(0, 5, (SIZE, 1, 2, 4, 2), dtype=torch.int32)
    truth = stacked(lambda q, r: fastattn.attention(q, q, q, mask=r), (q, ranges), (0, 0))[0]
    torch.testing.assert_close(vmap(lambda q, r: fastattn.attention(q, q, q, mask=r))(q, ranges), truth)


def test_masks_of_intervals_may_be_mapped():
    q, ids = torch.randn(SIZE, 2, 2, 9, 8), torch.arange(9).expand(SIZE, 2, 9) // torch.tensor([1, 3, 5]).view(-1, 1, 1)
    n, keep = torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.rand(SIZE, 2, 9) < 0.6

    def call(q, ids, n, keep):
        mask = (Document(ids) & Causal() | GlobalTokens(n)) & KeyMask(keep)
        return fastattn.attention(q, q, q, mask=mask)

    truth = stacked(call, (q, ids, n, keep), (0,) * 4)[0]
    torch.testing.assert_close(vmap(call)(q, ids, n, keep), truth)


def test_blocks_of_mapped_tensors_say_where_to_build_them():
    q, keep = torch.randn(SIZE, 2, 2, 9, 8), torch.rand(SIZE, 2, 9) < 0.6
    with pytest.raises(NotImplementedError, match="needs blocks, whose building reads values: build the mask outside"):
        vmap(lambda q, keep: fastattn.attention(q, q, q, mask=KeyMask(keep) | Causal()))(q, keep)


def test_mapped_blocks_run_one_by_one():
    q = torch.randn(SIZE, 2, 2, 9, 8)
    lowered = [Strided(stride).lower(2, 2, 9, 9, q.device) for stride in (2, 3, 4)]
    rows = max(x.blocks.bitmaps.shape[0] for x in lowered)
    assert all(x.blocks.bitmaps.shape[0] == rows for x in lowered)
    blocks = Blocks(*(torch.stack(column) for column in zip(*(x.blocks for x in lowered), strict=True)))

    def call(q, *blocks):
        return fastattn.attention(q, q, q, mask=lowered[0]._replace(blocks=Blocks(*blocks)))

    truth = torch.stack([fastattn.attention(x, x, x, mask=m) for x, m in zip(q, lowered, strict=True)])
    torch.testing.assert_close(vmap(call)(q, *blocks), truth)


def test_nested_vmap():
    q, k, v = (torch.randn(2, SIZE, 2, 2, 4, 8) for _ in range(3))
    result = vmap(vmap(fastattn.attention))(q, k, v)
    truth = fastattn.attention(*(t.flatten(0, 2) for t in (q, k, v))).unflatten(0, (2, SIZE, 2))
    torch.testing.assert_close(result, truth)


def test_attention_folds_into_one_call(monkeypatch):
    shapes = []
    from fastattn.backends import reference

    original = reference.attention_forward
    monkeypatch.setattr(
        reference, "attention_forward", lambda q, *rest, **kw: shapes.append(tuple(q.shape)) or original(q, *rest, **kw)
    )
    q, k, v = (torch.randn(SIZE, 2, 2, 4, 8) for _ in range(3))
    vmap(lambda *t: fastattn.attention(*t, backend="reference"))(q, k, v)
    assert shapes == [(SIZE * 2, 2, 4, 8)]


DECODE = {
    "plain": {},
    "window": {"mask": SlidingWindow(3, 0), "softcap": 5.0},
    "lengths": {"mask": KeyLengths([5, 2])},
    "bool": {"mask": torch.arange(10) % 3 > 0},
    "ranges": {"mask": torch.tensor([[0, 3], [2, 9], [4, 8]], dtype=torch.int32).view(1, 1, 3, 2)},
    "bias": {"bias": torch.arange(20.0).view(2, 1, 1, 10).cos()},
    "ALiBi": {"bias": ALiBi(torch.arange(4.0))},
    "table": {"bias": RelativeBias(torch.arange(20.0).view(4, 5)), "sinks": torch.arange(4.0)},
}


def agree_with_stacked(call, tensors, in_dims):
    results = vmap(call, in_dims=in_dims)(*tensors)
    for result, truth in zip(results, stacked(call, tensors, in_dims), strict=True):
        torch.testing.assert_close(result, truth)


@pytest.mark.parametrize("options", DECODE.values(), ids=DECODE)
def test_decoding_may_be_mapped(options):
    lengths = torch.tensor([[3, 10], [0, 1], [5, 7]], dtype=torch.int32)
    every = [torch.randn(SIZE, 2, heads, length, 8) for heads, length in ((4, 3), (2, 10), (2, 10))] + [lengths]

    def call(*tensors):
        return fastattn.attention_decode(*tensors, return_lse=True, **options)

    agree_with_stacked(call, every, (0, 0, 0, 0))
    agree_with_stacked(call, [t.movedim(0, 1) for t in every], (1, 1, 1, 1))
    for at in range(4):
        in_dims = tuple(0 if i == at else None for i in range(4))
        agree_with_stacked(call, [t if i == at else t[0] for i, t in enumerate(every)], in_dims)


@pytest.mark.parametrize("mapped", [None, 0])
def test_decoding_from_pages_may_be_mapped(mapped):
    lengths = torch.tensor([[3, 8], [0, 1], [5, 7]], dtype=torch.int32)
    pages = torch.randn(*(() if mapped is None else (SIZE,)), 6, 4, 2, 8)
    tables = torch.stack([torch.randperm(6)[:4].view(2, 2) for _ in range(SIZE)]).int()

    def call(q, pages, lengths, table):
        return fastattn.attention_decode(q, pages, pages, lengths, block_table=table, return_lse=True)

    agree_with_stacked(call, [torch.randn(SIZE, 2, 4, 1, 8), pages, lengths, tables], (0, mapped, 0, 0))


def test_what_decoding_adds_to_scores_may_be_mapped():
    q, k = torch.randn(SIZE, 2, 4, 3, 8), torch.randn(SIZE, 2, 2, 10, 8)
    lengths = torch.tensor([3, 10], dtype=torch.int32)
    for make, mapped in (
        (lambda x: {"mask": x}, torch.rand(SIZE, 1, 1, 3, 10) < 0.5),
        (lambda x: {"mask": x}, torch.randint(0, 11, (SIZE, 1, 4, 3, 2), dtype=torch.int32)),
        (lambda x: {"bias": x}, torch.randn(SIZE, 2, 1, 1, 10)),
        (lambda x: {"bias": ALiBi(x)}, torch.rand(SIZE, 4)),
        (lambda x: {"bias": RelativeBias(x)}, torch.randn(SIZE, 4, 5)),
        (lambda x: {"sinks": x}, torch.randn(SIZE, 4)),
    ):

        def call(q, k, x, make=make):
            return fastattn.attention_decode(q, k, k, lengths, return_lse=True, **make(x))

        agree_with_stacked(call, [q, k, mapped], (0, 0, 0))


def test_mapped_decoding_is_one_call_that_copies_no_cache(monkeypatch):
    from fastattn.backends import reference

    calls = []
    original = reference.attention_decode
    monkeypatch.setattr(
        reference, "attention_decode", lambda q, k, *rest: calls.append((q.shape[0], k)) or original(q, k, *rest)
    )
    q, k = torch.randn(SIZE, 2, 4, 1, 8), torch.randn(SIZE, 2, 2, 10, 8)
    lengths = torch.tensor([[3, 10], [0, 1], [5, 7]], dtype=torch.int32)
    vmap(lambda *t: fastattn.attention_decode(*t[:2], *t[1:], backend="reference"))(q, k, lengths)
    ((rows, cache),) = calls
    assert rows == SIZE * 2 and cache.data_ptr() == k.data_ptr()


def test_mapped_decoding_still_has_no_gradient():
    q, k = torch.randn(SIZE, 2, 4, 1, 8), torch.randn(SIZE, 2, 2, 10, 8)
    lengths = torch.tensor([3, 10], dtype=torch.int32)
    call = vmap(lambda q, k: fastattn.attention_decode(q, k, k, lengths))
    with pytest.raises(ValueError, match="attention_decode has no gradient"):
        call(q.clone().requires_grad_(), k)
    with torch.no_grad():
        call(q.clone().requires_grad_(), k)
    with pytest.raises(ValueError, match="attention_decode has no gradient"):
        grad(lambda q: call(q, k).sum())(q)
    with pytest.raises(ValueError, match="attention_decode has no gradient"):
        vmap(grad(lambda q, k: fastattn.attention_decode(q, k, k, lengths).sum()))(q, k)
    with pytest.raises(ValueError, match="attention_decode has no gradient"):
        torch.func.jvp(lambda q: call(q, k), (q,), (q,))


def test_mapped_packings_need_their_longest_sequence():
    packed, cu_seqlens = torch.randn(SIZE, 5, 2, 8), torch.tensor([[0, 3, 5], [0, 1, 5], [0, 5, 5]], dtype=torch.int32)

    def call(packed, cu_seqlens, **longest):
        return fastattn.attention_varlen(packed, packed, packed, cu_seqlens, cu_seqlens, **longest)

    with pytest.raises(ValueError, match="max_seqlen_q=None reads on the host the lengths that vmap maps: pass the"):
        vmap(call)(packed, cu_seqlens)
    with pytest.raises(ValueError, match="max_seqlen_q=None reads on the host"):  # grad wraps what vmap maps
        vmap(grad(lambda *t: call(*t).sum()))(packed, cu_seqlens)
    with pytest.raises(ValueError, match="max_seqlen_k=None"):
        vmap(lambda *t: call(*t, max_seqlen_q=5))(packed, cu_seqlens)
    results = vmap(lambda *t: call(*t, max_seqlen_q=5, max_seqlen_k=5))(packed, cu_seqlens)
    (truth,) = stacked(call, (packed, cu_seqlens), (0, 0))
    torch.testing.assert_close(results, truth)


def test_masks_that_read_mapped_lengths_say_what_to_pass():
    q, k = torch.randn(SIZE, 2, 4, 1, 8), torch.randn(2, 2, 10, 8)
    lengths = torch.tensor([[3, 10], [0, 1], [5, 7]], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=r"Strided\(2\) reads cache_lengths on the host, .*: pass a window"):
        vmap(lambda q, n: fastattn.attention_decode(q, k, k, n, mask=Strided(2)))(q, lengths)


def test_functions_take_the_arguments_of_their_operators():
    q = torch.randn(1, 1, 2, 4, requires_grad=True)
    call = (q, q, q, *[None] * 2, 0, *[None] * 13, *[None] * 2, 0, None, False, *[None] * 2, 0, 0, *[None] * 2)
    call = (*call, 0.5, 0.0, 0.0, True, False, False, False, False, "")
    assert torch.equal(ops.Attention.apply(*call)[0], ops.attention_forward(*call)[0])
