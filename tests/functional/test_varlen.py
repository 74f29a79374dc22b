"""`attention_varlen`: a packed batch is its sequences, each by itself, and the padded batch they come from."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import fastattn
from fastattn.biases import ALiBi, RelativeBias, T5Bias
from fastattn.masks import (
    BigBird,
    Causal,
    Dilated,
    Document,
    GlobalTokens,
    KeyLengths,
    LoweredMask,
    PerHead,
    PrefixLM,
    SlidingWindow,
)

LENGTHS_Q, LENGTHS_K = [5, 0, 70, 1], [9, 4, 70, 0]


def bounds(lengths, first=0):
    return (torch.tensor([0, *lengths]).cumsum(0) + first).to(torch.int32)


CU_Q, CU_K = bounds(LENGTHS_Q), bounds(LENGTHS_K)


def draw(dtype=torch.float32, heads=4, heads_kv=2, dim=16):
    shapes = ((sum(LENGTHS_Q), heads), (sum(LENGTHS_K), heads_kv), (sum(LENGTHS_K), heads_kv))
    return [torch.randn(*shape, dim, dtype=dtype).requires_grad_() for shape in shapes]


def each(q, k, v, **options):
    """The packed result, from one call per sequence."""
    outs, lses = [], []
    for b in range(len(LENGTHS_Q)):
        parts = (t[c[b] : c[b + 1]].transpose(0, 1)[None] for t, c in ((q, CU_Q), (k, CU_K), (v, CU_K)))
        out, lse = fastattn.attention(*parts, return_lse=True, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.parametrize(
    "mask",
    [
        None,
        Causal(),
        Causal("top-left"),
        SlidingWindow(3, 1),
        SlidingWindow(2, 0) | GlobalTokens(2),
        PrefixLM(3) & SlidingWindow(20, None),
        Dilated(2, 3),
        BigBird(4, 3, 1, 1, 0) & Causal(),
    ],
    ids=str,
)
@pytest.mark.parametrize("longest", [None, 70, 100])
def test_each_sequence_is_a_call_of_its_own(backend, mask, longest):
    q, k, v = draw()
    want = each(q, k, v, mask=mask, backend=backend)
    options = {"max_seqlen_q": longest, "max_seqlen_k": longest, "return_lse": True, "backend": backend}
    got = fastattn.attention_varlen(q, k, v, CU_Q, CU_K, mask=mask, **options)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out, _ in (got, want)]
    for a, b in zip((*got, *grads[0]), (*want, *grads[1]), strict=True):
        assert torch.allclose(a, b, atol=2e-5), mask


@pytest.mark.parametrize("kind", ["alibi", "relative", "t5"])
@pytest.mark.parametrize("align", ["bottom-right", "top-left"])
def test_biases_by_distance_align_with_each_sequence(backend, kind, align):
    q, k, v = draw()
    tensor = torch.randn({"alibi": (4,), "relative": (4, 9), "t5": (8, 4)}[kind], requires_grad=True)
    make = {"alibi": ALiBi, "relative": RelativeBias, "t5": lambda t, align: T5Bias(t, align=align)}[kind]
    found = []
    for call in (each, lambda *a, **o: fastattn.attention_varlen(*a, CU_Q, CU_K, return_lse=True, **o)):
        out, lse = call(q, k, v, bias=make(tensor, align=align), mask=Causal(), backend=backend)
        loss = out.square().sum() + lse.masked_fill(lse == -math.inf, 0).sum()
        found.append((out, lse, *torch.autograd.grad(loss, (q, k, v, tensor))))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=5e-5)


def test_dropout_sinks_and_dense_tensors_are_those_of_the_padded_batch(backend):
    """Dropout, bool masks and dense biases count within the sequence: a packed call draws what a padded one does."""
    q, k, v = draw()
    there_q, there_k = (torch.arange(70) < torch.tensor(n)[:, None] for n in (LENGTHS_Q, LENGTHS_K))
    padded = []
    for tensor, there in ((q, there_q), (k, there_k), (v, there_k)):
        grid = torch.zeros(4, 70, *tensor.shape[1:])
        padded.append(grid.index_put((there,), tensor).transpose(1, 2))
    options = {
        "bias": torch.randn(4, 1, 70, 70),
        "sinks": torch.randn(4),
        "dropout_p": 0.4,
        "dropout_seed": torch.tensor([7]),
        "return_lse": True,
        "backend": backend,
    }
    seen = torch.rand(1, 4, 70, 70) < 0.7
    want, want_lse = fastattn.attention(*padded, mask=seen & there_k[:, None, None], **options)
    got, lse = fastattn.attention_varlen(q, k, v, CU_Q, CU_K, mask=seen, **options)
    assert torch.allclose(got, want.transpose(1, 2)[there_q], atol=1e-5)
    assert torch.allclose(lse, want_lse.transpose(1, 2)[there_q].t(), atol=1e-5)


@pytest.mark.parametrize("combine", [lambda m, c: m, lambda m, c: ~m, lambda m, c: m | c], ids=["plain", "not", "or"])
def test_masks_with_a_tensor_per_token_and_blocks_of_their_own(backend, combine):
    """ids have the length of the longest sequence; those of a shorter one are the first of its row."""
    q, k, v = draw()
    ids = torch.randint(0, 3, (4, 70)).sort(dim=1).values
    causal = Causal()
    mask = combine(PerHead([Document(ids), Dilated(3, 2), causal, Document(ids)]), causal)
    options = {"max_seqlen_q": 70, "max_seqlen_k": 70, "backend": backend}
    got = fastattn.attention_varlen(q, k, v, CU_Q, CU_K, mask=mask, **options)
    for b, (len_q, len_k) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
        parts = (t[c[b] : c[b + 1]].transpose(0, 1)[None] for t, c in ((q, CU_Q), (k, CU_K), (v, CU_K)))
        documents = Document(ids[b, :len_q], ids[b, :len_k])
        own = combine(PerHead([documents, Dilated(3, 2), causal, documents]), causal)
        want = fastattn.attention(*parts, mask=own, backend=backend)[0].transpose(0, 1)
        assert torch.allclose(got[CU_Q[b] : CU_Q[b + 1]], want, atol=2e-5)


def test_rows_of_no_sequence(backend):
    """What lies outside of the sequences changes nothing and gets nothing, NaN or not."""
    q, k, v = (torch.randn(12, 2, 8) for _ in range(3))
    for t in (q, k, v):
        t[:2] = t[9:] = math.nan
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    cu = bounds([4, 3], first=2)
    out, lse = fastattn.attention_varlen(q, k, v, cu, cu, return_lse=True, backend=backend)
    assert not out.isnan().any() and not lse.isnan().any()
    assert (out[:2] == 0).all() and (out[9:] == 0).all() and (lse[:, 9:] == -math.inf).all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not grad.isnan().any() and (grad[:2] == 0).all() and (grad[9:] == 0).all()


def test_no_sequences_and_no_tokens(backend):
    empty = torch.zeros(0, 2, 8, requires_grad=True)
    nothing = torch.zeros(1, dtype=torch.int32)
    for cu in (nothing, torch.zeros(3, dtype=torch.int32)):
        for mask in (None, Causal(), Dilated(2, 3), Dilated(2, 3) & Causal()):
            out = fastattn.attention_varlen(empty, empty, empty, cu, cu, mask=mask, backend=backend)
            assert out.shape == (0, 2, 8)
            out.sum().backward()


def test_lengths_stay_on_the_device():
    """With both max lengths given no value of cu_seqlens is read: a fake tensor has none to read."""
    with FakeTensorMode():
        q, k, v = (torch.empty(12, 2, 8, requires_grad=True) for _ in range(3))
        cu = torch.empty(4, dtype=torch.int32)
        options = {"max_seqlen_q": 5, "max_seqlen_k": 5, "bias": ALiBi(torch.empty(2))}
        for mask in (Causal(), SlidingWindow(3, 0) | GlobalTokens(1)):
            fastattn.attention_varlen(q, k, v, cu, cu, mask=mask, **options).sum().backward()
            assert q.grad.shape == (12, 2, 8)
        with pytest.raises(DataDependentOutputException):
            fastattn.attention_varlen(q, k, v, cu, cu, mask=Causal())


def test_under_compile(backend):
    q, k, v = draw()

    def call(q, k, v, cu_q, cu_k):
        return fastattn.attention_varlen(
            q, k, v, cu_q, cu_k, max_seqlen_q=70, max_seqlen_k=70, mask=Causal(), backend=backend
        )

    compiled = torch.compile(call, fullgraph=True)
    assert torch.equal(compiled(q, k, v, CU_Q, CU_K), call(q, k, v, CU_Q, CU_K))


Q = torch.zeros(6, 4, 8)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments, options, kind, text",
    [
        (
            (Q[None], Q, Q, CU, CU),
            {},
            ValueError,
            r"q has 4 dimensions, shape \(1, 6, 4, 8\): pass \(tokens, heads, head",
        ),
        ((Q, Q[:, :, :4], Q, CU, CU), {}, ValueError, r"k has head dim 4 but q 8: pass k of shape \(Tk, Hkv, 8\)"),
        (
            (Q, Q, Q[:5], CU, CU),
            {},
            ValueError,
            r"v has 5 tokens and 4 heads but k 6 and 4: pass v of shape \(6, 4, Dv\)",
        ),
        ((Q, Q[:, :3], Q[:, :3], CU, CU), {}, ValueError, "q has 4 heads, which is no multiple of the 3 heads"),
        ((Q, Q, Q, CU.long(), CU), {}, TypeError, r"cu_seqlens_q is of torch.int64: pass an int32 tensor"),
        ((Q, Q, Q, CU, [0, 6]), {}, TypeError, "cu_seqlens_k is of list: pass an int32 tensor"),
        ((Q, Q, Q, CU[None], CU), {}, ValueError, r"cu_seqlens_q has shape \(1, 3\): pass \(sequences \+ 1,\)"),
        ((Q, Q, Q, CU, CU[:2]), {}, ValueError, "cu_seqlens_k has 2 numbers but cu_seqlens_q 3"),
        ((Q, Q, Q, CU + 1, CU), {}, ValueError, r"cu_seqlens_q=\[1, .* does not cut q's 6 rows into sequences"),
        ((Q, Q, Q, CU, CU.flip(0)), {}, ValueError, "cu_seqlens_k=.* does not cut k's 6 rows .*, never decreasing"),
        ((Q, Q, Q, CU, CU), {"max_seqlen_q": -1}, ValueError, "max_seqlen_q=-1 is negative"),
        ((Q, Q, Q, CU, CU), {"max_seqlen_k": 4.0}, TypeError, "max_seqlen_k=4.0 is a float"),
        (
            (Q, Q, Q, CU, CU),
            {"mask": LoweredMask(band_right=0)},
            TypeError,
            "mask is a LoweredMask, made for one length",
        ),
        ((Q, Q, Q, CU, CU), {"mask": KeyLengths([1])}, ValueError, "lengths holds 1 numbers, but q has a batch of 2"),
        ((Q, Q.half(), Q, CU, CU), {}, TypeError, "k has dtype torch.float16 but q torch.float32"),
        ((Q, Q, Q, CU.to("meta"), CU), {}, ValueError, "cu_seqlens_q lies on meta but q on cpu"),
    ],
)
def test_wrong_arguments(arguments, options, kind, text):
    with pytest.raises(kind, match=text):
        fastattn.attention_varlen(*arguments, **options)


@pytest.mark.parametrize("mask", [Dilated(2, 3), BigBird(4, 1, 1, 1), PerHead([Dilated(2, 3), Causal()])], ids=repr)
def test_rows_of_a_sequence_that_is_cut_off_are_those_of_the_whole(mask, backend):
    q, k, v = (torch.randn(30, 2, 8) for _ in range(3))
    cu = bounds([10, 20])
    whole = fastattn.attention_varlen(q, k, v, cu, cu, mask=mask, backend=backend)
    cut = fastattn.attention_varlen(q, k, v, cu, cu, max_seqlen_q=12, max_seqlen_k=20, mask=mask, backend=backend)
    torch.testing.assert_close(cut[:22], whole[:22])
