"""Every bias against its definition in words, pair by pair, and its lowered form against both."""

from __future__ import annotations

import math

import pytest
import torch

import fastattn
from fastattn.biases import ALiBi, Dense, RelativeBias, T5Bias
from fastattn.biases.lowered import expand
from fastattn.masks.lowered import Size

BATCH, HEADS = 2, 3
SHAPES = [(1, 1), (6, 6), (3, 8), (8, 3), (1, 6), (0, 4), (4, 0), (70, 150)]


def by_loops(rule, len_q, len_k, align="bottom-right"):
    """(BATCH, HEADS, len_q, len_k) of rule(b, h, distance), one pair at a time."""
    offset = len_k - len_q if align == "bottom-right" else 0
    return torch.tensor(
        [
            [[[rule(b, h, j - (i + offset)) for j in range(len_k)] for i in range(len_q)] for h in range(HEADS)]
            for b in range(BATCH)
        ]
    ).view(BATCH, HEADS, len_q, len_k)


def t5_bucket(distance, buckets, both, farthest):
    """T5's rule for one distance, as its paper and code have it."""
    first = 0
    if both:
        buckets //= 2
        first = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    far = exact + int(math.log(distance / exact) / math.log(farthest / exact) * (buckets - exact))
    return first + min(far, buckets - 1)


def cases():
    slopes, own = torch.rand(HEADS), torch.rand(BATCH, HEADS)
    table, shared = torch.randn(HEADS, 9), torch.randn(1, 5)
    weight = torch.randn(8, HEADS)
    for align in ("bottom-right", "top-left"):
        yield ALiBi(slopes, align), lambda b, h, d, s=slopes: -float(s[h]) * abs(d)
        yield ALiBi(own, align), lambda b, h, d, s=own: -float(s[b, h]) * abs(d)
        yield RelativeBias(table, align), lambda b, h, d, t=table: float(t[h, 4 + min(max(d, -4), 4)])
        yield RelativeBias(shared, align), lambda b, h, d, t=shared: float(t[0, 2 + min(max(d, -2), 2)])
        for both, farthest in ((True, 20), (False, 9)):
            yield (
                T5Bias(weight, both, farthest, align),
                lambda b, h, d, w=weight, both=both, far=farthest: float(w[t5_bucket(d, 8, both, far), h]),
            )


@pytest.mark.parametrize("len_q, len_k", SHAPES)
def test_dense_and_lowered_forms_are_the_definition(len_q, len_k):
    for bias, rule in cases():
        want = by_loops(rule, len_q, len_k, bias.align)
        assert torch.allclose(bias.to_dense(BATCH, HEADS, len_q, len_k), want, atol=1e-5), bias
        size = Size(BATCH, HEADS, len_q, len_k)
        found = expand(bias.lower(size, torch.float32), tuple(size)).expand(size)
        assert torch.equal(found, bias.to_dense(BATCH, HEADS, len_q, len_k)), bias


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("buckets, farthest", [(32, 128), (16, 40)])
def test_buckets_are_those_of_transformers(both, buckets, farthest):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-700, 701)
    want = t5.T5Attention._relative_position_bucket(distance, both, buckets, farthest)
    assert torch.equal(T5Bias(torch.zeros(buckets, 2), both, farthest).bucket(distance), want)


def test_standard_slopes():
    assert ALiBi.standard(8).tensor.tolist() == [2.0**-i for i in range(1, 9)]
    twelve = ALiBi.standard(12).tensor
    assert torch.allclose(twelve, torch.tensor([2.0**-i for i in range(1, 9)] + [2 ** -(i + 0.5) for i in range(4)]))


@pytest.mark.parametrize("make", [Dense, ALiBi, RelativeBias, T5Bias], ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_object_is_its_dense_tensor(backend, make, dtype):
    """Results, and gradients of q and of the bias' tensor, agree with those of the tensor it stands for."""
    shape = {Dense: (1, 3, 9, 1), ALiBi: (3,), RelativeBias: (3, 7), T5Bias: (8, 3)}[make]
    q, k, v = (torch.randn(2, 3, n, 16, requires_grad=True) for n in (9, 20, 20))
    bias = (
        make(torch.randn(shape, dtype=dtype).requires_grad_())
        if make is not T5Bias
        else T5Bias(torch.randn(shape, dtype=dtype).requires_grad_(), max_distance=10)
    )
    if make is Dense and dtype is torch.bfloat16:
        bias = Dense(bias.tensor.detach().float().requires_grad_())
    found = []
    for own in (bias, bias.with_tensor(bias.tensor.float()).to_dense(2, 3, 9, 20)):
        out = fastattn.attention(q, k, v, bias=own, mask=fastattn.masks.Causal(), backend=backend)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias.tensor))))
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        assert torch.allclose(got.float(), want.float(), rtol=1e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-4)


def test_a_float_mask_beside_a_bias_by_distance(backend):
    q, k, v = (torch.randn(2, 3, 9, 16) for _ in range(3))
    bias, mask = ALiBi.standard(3), torch.randn(2, 1, 9, 9).masked_fill(torch.rand(2, 1, 9, 9) < 0.3, -math.inf)
    mask[..., 0] = torch.finfo(torch.float32).min
    got = fastattn.attention(q, k, v, bias=bias, mask=mask, backend=backend)
    scores = q.double() @ k.double().transpose(-1, -2) / 4 + bias.to_dense(2, 3, 9, 9).double() + mask.double()
    assert torch.allclose(got.double(), scores.softmax(dim=-1) @ v.double(), atol=1e-5)


def test_no_gradient_is_made_that_nobody_asks_for(monkeypatch):
    """A table without a gradient, or under no_grad, costs none of the backward's work for it."""
    from fastattn.backends import reference

    asked = []
    real = reference.gradients
    monkeypatch.setattr(reference, "gradients", lambda *a: asked.append(a[2]) or real(*a))
    q, k, v = (torch.randn(1, 3, 5, 8, requires_grad=True) for _ in range(3))
    fastattn.attention(q, k, v, bias=RelativeBias(torch.randn(3, 5)), backend="reference").sum().backward()
    table = torch.randn(3, 5, requires_grad=True)
    fastattn.attention(q, k, v, bias=RelativeBias(table), backend="reference").sum().backward()
    assert asked == [(False, False, False), (False, True, False)]


ERRORS = [
    (lambda: ALiBi([1.0]), TypeError, "ALiBi: slopes is a list: pass a float tensor"),
    (lambda: ALiBi(torch.ones(3).int()), TypeError, "ALiBi: slopes has dtype torch.int32"),
    (lambda: ALiBi(torch.ones(1, 1, 3)), ValueError, r"ALiBi: slopes has shape \(1, 1, 3\): pass \(Hq,\) or \(B, Hq\)"),
    (lambda: ALiBi(torch.ones(3), "left"), ValueError, "align='left' is unknown: pass 'bottom-right' or 'top-left'"),
    (lambda: ALiBi.standard(0), ValueError, "ALiBi: heads=0 is too small: pass 1 or more heads"),
    (
        lambda: RelativeBias(torch.ones(3, 4)),
        ValueError,
        r"table has shape \(3, 4\): pass \(Hq, 2 \* reach \+ 1\), an odd",
    ),
    (lambda: T5Bias(torch.ones(32)), ValueError, r"T5Bias: weight has shape \(32,\): pass \(buckets, Hq\)"),
    (
        lambda: T5Bias(torch.ones(5, 3)),
        ValueError,
        "weight has 5 buckets for max_distance=128: pass at least 4, an even",
    ),
    (
        lambda: T5Bias(torch.ones(32, 3), max_distance=8),
        ValueError,
        "a max_distance beyond the 8 that have a bucket each",
    ),
    (lambda: T5Bias(torch.ones(32, 3), max_distance=1.5), TypeError, "T5Bias: max_distance=1.5 is a float"),
]


@pytest.mark.parametrize("make, kind, text", ERRORS, ids=range(len(ERRORS)))
def test_wrong_arguments(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


@pytest.mark.parametrize(
    "bias, text",
    [
        (ALiBi(torch.ones(4)), "ALiBi: slopes is for 4 heads, but q has 3: pass 3"),
        (ALiBi(torch.ones(3, 3)), r"ALiBi: slopes has 3 rows, but q a batch of 2: pass \(Hq,\) or \(B, Hq\)"),
        (RelativeBias(torch.ones(2, 5)), "RelativeBias: table is for 2 heads, but q has 3: pass 1 or 3"),
        (T5Bias(torch.ones(8, 1)), "T5Bias: weight is for 1 heads, but q has 3: pass 3"),
        (ALiBi(torch.ones(3, device="meta")), "bias lies on meta but q on cpu"),
    ],
)
def test_biases_that_do_not_fit_the_call(bias, text):
    q = torch.randn(2, 3, 4, 8)
    with pytest.raises(ValueError, match=text):
        fastattn.attention(q, q, q, bias=bias)


def test_half_slopes_are_used_in_float32():
    """Far keys of a steep slope would overflow float16, and an infinity hides a key."""
    bias = ALiBi(torch.tensor([600.0], dtype=torch.float16))
    assert bias.to_dense(1, 1, 1, 300).isfinite().all()
    assert torch.equal(bias.to_dense(1, 1, 1, 3), torch.tensor([[[[-1200.0, -600.0, -0.0]]]]))


def test_repr():
    assert repr(T5Bias(torch.ones(8, 2), False, 20)) == (
        "T5Bias(float32 tensor (8, 2) on cpu, bidirectional=False, max_distance=20)"
    )
    assert repr(ALiBi(torch.ones(2), "top-left")) == "ALiBi(float32 tensor (2,) on cpu, align='top-left')"
