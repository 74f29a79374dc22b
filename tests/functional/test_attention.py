"""What `attention` promises, on every backend that runs here: semantics, layouts, gradients."""

from __future__ import annotations

import math

import pytest
import torch

import fastattn
from fastattn import reference
from fastattn.masks import Causal, Dense, KeyLengths, KeyMask, KeyRange, SlidingWindow

NAN = float("nan")


def draw(batch=2, heads=4, heads_kv=2, len_q=5, len_k=7, dim=8, dim_v=6, dtype=torch.float32, grad=True):
    shapes = ((batch, heads, len_q, dim), (batch, heads_kv, len_k, dim), (batch, heads_kv, len_k, dim_v))
    return [torch.randn(s).to(dtype).requires_grad_(grad) for s in shapes]


def expected(q, k, v, grads, **kwargs):
    """out, lse and the gradients of q, k and v in float64, by autograd over the reference."""
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out, lse = reference.attention(*wide, return_lse=True, **kwargs)
    finite = lse != -math.inf
    return out, lse, *torch.autograd.grad((out, lse[finite]), wide, (grads[0].double(), grads[1].double()[finite]))


MASKS = {
    "none": None,
    "causal": Causal(),
    "causal top-left": Causal("top-left"),
    "window": SlidingWindow(1, 1),
    "lengths": KeyLengths([3, 7]),
    "range": KeyRange([2, 0], [6, 5]),
    "causal and lengths": Causal() & KeyLengths([4, 7]),
    "key mask": KeyMask(torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0]]).bool()),
    "dense": Dense(torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.6),
    "bool tensor": torch.rand(5, 7, generator=torch.Generator().manual_seed(2)) < 0.6,
    "ranges": torch.tensor([[0, 3], [1, 7], [2, 4], [5, 5], [0, 7]], dtype=torch.int32).view(1, 1, 5, 2),
    "float tensor": torch.randn(2, 1, 1, 7, generator=torch.Generator().manual_seed(3)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_outputs_and_gradients(backend, mask):
    q, k, v = draw()
    out, lse = fastattn.attention(q, k, v, mask=mask, return_lse=True, backend=backend)
    grads = torch.randn(out.shape), torch.randn(lse.shape)
    results = (out, lse, *torch.autograd.grad((out, lse), (q, k, v), grads))
    for result, truth in zip(results, expected(q, k, v, grads, mask=mask), strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softcap_scale_and_dropout(backend, dtype):
    q, k, v = draw(dtype=dtype)
    extras = {"scale": 0.7, "softcap": 1.5, "dropout_p": 0.3, "dropout_seed": torch.tensor([77])}
    out, lse = fastattn.attention(q, k, v, return_lse=True, backend=backend, **extras)
    grads = torch.randn(out.shape).to(dtype), torch.randn(lse.shape)
    results = (out, lse, *torch.autograd.grad((out, lse), (q, k, v), grads))
    tolerance = 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    for result, truth in zip(results, expected(q, k, v, grads, **extras), strict=True):
        torch.testing.assert_close(result.double(), truth, rtol=tolerance, atol=tolerance)


def test_gradients_of_bias_sinks_and_float_mask():
    q, k, v = draw(dtype=torch.float64)
    shapes = {"bias": (4, 1, 7), "sinks": (4,), "mask": (2, 1, 5, 1)}
    extras = {name: torch.randn(s, dtype=torch.float64, requires_grad=True) for name, s in shapes.items()}
    inputs = (q, k, v, *extras.values())
    results = fastattn.attention(q, k, v, return_lse=True, **extras)
    grads = [torch.randn_like(r) for r in results]
    truths = reference.attention(q, k, v, return_lse=True, **extras)
    for gradient, truth in zip(
        torch.autograd.grad(results, inputs, grads), torch.autograd.grad(truths, inputs, grads), strict=True
    ):
        assert gradient.shape == truth.shape
        torch.testing.assert_close(gradient, truth)


def test_gradcheck_through_the_operators():
    tensors = draw(batch=1, heads=2, heads_kv=1, len_q=3, len_k=4, dim=3, dim_v=2, dtype=torch.float64)
    tensors += [torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)]
    tensors += [torch.randn(2, dtype=torch.float64, requires_grad=True)]

    def call(q, k, v, bias, sinks):
        return fastattn.attention(
            q,
            k,
            v,
            mask=Causal(),
            bias=bias,
            sinks=sinks,
            softcap=2.0,
            dropout_p=0.2,
            dropout_seed=torch.tensor([8]),
            return_lse=True,
        )

    assert torch.autograd.gradcheck(call, tensors)


def test_a_query_that_sees_nothing_gets_zeros(backend):
    q, k, v = draw()
    seen = torch.ones(2, 4, 5, 7, dtype=torch.bool)
    seen[0, :, 2] = False
    seen[1] = False
    out, lse = fastattn.attention(q, k, v, mask=seen, return_lse=True, backend=backend)
    assert (out[0, :, 2] == 0).all() and (out[1] == 0).all()
    assert (lse[0, :, 2] == -math.inf).all() and (lse[1] == -math.inf).all() and lse[0, :, 0].isfinite().all()
    gradients = torch.autograd.grad((out, lse), (q, k, v), (torch.randn_like(out), torch.randn_like(lse)))
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0][0, :, 2] == 0).all() and all((g[1] == 0).all() for g in gradients)


@pytest.mark.parametrize("bias", [False, True])
def test_minus_infinity_hides_and_finfo_min_does_not(backend, bias):
    q, k, v = draw(grad=False)
    hidden = torch.zeros(1, 1, 5, 7)
    hidden[..., 0, :] = -math.inf
    hidden[..., 1, :] = torch.finfo(torch.float32).min
    hidden[..., 2, 3] = -math.inf
    where = {"bias": hidden} if bias else {"mask": hidden}
    out, lse = fastattn.attention(q, k, v, return_lse=True, backend=backend, **where)
    assert (out[:, :, 0] == 0).all() and (lse[:, :, 0] == -math.inf).all()
    uniform = v.mean(dim=2).repeat_interleave(2, dim=1)
    torch.testing.assert_close(out[:, :, 1], uniform, rtol=1e-5, atol=1e-5)
    keep = torch.arange(7) != 3
    without = reference.attention(q[:, :, 2:3], k[:, :, keep], v[:, :, keep])
    torch.testing.assert_close(out[:, :, 2:3], without, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [NAN, math.inf])
@pytest.mark.parametrize(
    "mask",
    [
        KeyLengths([3, 5]),
        KeyRange([1, 0], [4, 5]),
        KeyMask(torch.tensor([[1] * 4 + [0] * 3, [1] * 5 + [0] * 2]).bool()),
    ],
    ids=["lengths", "range", "key mask"],
)
def test_what_is_stored_in_hidden_keys_changes_nothing(backend, mask, value):
    q, k, v = draw()
    seen = mask.to_dense(2, 4, 5, 7)[:, 0, 0]
    poisoned_k, poisoned_v = k.detach().clone(), v.detach().clone()
    for b in range(2):
        poisoned_k[b, :, ~seen[b]] = value
        poisoned_v[b, :, ~seen[b]] = value
    poisoned = [q.detach().clone().requires_grad_(), poisoned_k.requires_grad_(), poisoned_v.requires_grad_()]
    out = fastattn.attention(q, k, v, mask=mask, backend=backend)
    again = fastattn.attention(*poisoned, mask=mask, backend=backend)
    assert torch.equal(out, again)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(again, poisoned, grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("batch", "len_q", "len_k"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0)])
def test_empty_sizes(backend, batch, len_q, len_k):
    q, k, v = draw(batch=batch, len_q=len_q, len_k=len_k)
    out, lse = fastattn.attention(q, k, v, mask=Causal(), return_lse=True, backend=backend)
    assert out.shape == (batch, 4, len_q, 6) and lse.shape == (batch, 4, len_q)
    assert (out == 0).all() and (lse == -math.inf).all()
    gradients = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape] and all((g == 0).all() for g in gradients)


def test_output_lies_as_batch_sequence_heads(backend):
    q, k, v = draw()
    out = fastattn.attention(q, k, v, backend=backend)
    assert out.transpose(1, 2).is_contiguous()


def test_gradients_keep_the_layout_of_their_inputs(backend):
    packed = torch.randn(2, 5, 4, 8)
    q = packed.transpose(1, 2).requires_grad_()
    k = torch.randn(7, 2, 2, 8).permute(1, 2, 0, 3).requires_grad_()
    v = torch.randn(2, 2, 6, 7).transpose(2, 3).requires_grad_()  # its last dimension is not contiguous
    out = fastattn.attention(q, k, v, backend=backend)
    for tensor, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert gradient.stride() == tensor.stride()


def test_strided_inputs_equal_contiguous_ones(backend):
    qkv = torch.randn(2, 7, 3, 4, 16)[..., ::2]
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    out = fastattn.attention(q, k, v, backend=backend)
    truth = fastattn.attention(q.contiguous(), k.contiguous(), v.contiguous(), backend=backend)
    assert torch.equal(out, truth)
    shared = k[:, :1].expand(-1, 4, -1, -1)
    out = fastattn.attention(q, shared, v, backend=backend)
    assert torch.equal(out, fastattn.attention(q, shared.contiguous(), v, backend=backend))


def test_strided_masks_and_biases_equal_contiguous_ones(backend):
    q, k, v = draw(grad=False)
    seen = (torch.rand(7, 5, 4, 2) < 0.6).permute(3, 2, 1, 0)
    ranges = torch.randint(0, 8, (2, 5), dtype=torch.int32).t().view(1, 1, 5, 2).expand(2, 4, 5, 2)
    bias = torch.randn(7, 5).t()
    lengths = torch.tensor([3, 0, 6, 0], dtype=torch.int32)[::2]
    sinks = torch.randn(8)[::2]
    for name, strided in {"mask": seen, "bias": bias, "sinks": sinks}.items():
        result = fastattn.attention(q, k, v, backend=backend, **{name: strided})
        assert torch.equal(result, fastattn.attention(q, k, v, backend=backend, **{name: strided.contiguous()}))
    result = fastattn.attention(q, k, v, mask=ranges, backend=backend)
    assert torch.equal(result, fastattn.attention(q, k, v, mask=ranges.contiguous(), backend=backend))
    result = fastattn.attention(q, k, v, mask=KeyLengths(lengths), backend=backend)
    assert torch.equal(result, fastattn.attention(q, k, v, mask=KeyLengths([3, 6]), backend=backend))


def test_expanded_strided_and_missing_output_gradients(backend):
    q, k, v = draw()
    out, lse = fastattn.attention(q, k, v, return_lse=True, backend=backend)
    grad = torch.randn(4, 6, 5, 2).permute(3, 0, 2, 1)
    expanded = torch.ones(()).expand(out.shape)
    for given in (grad, expanded):
        strided = torch.autograd.grad(out, (q, k, v), given, retain_graph=True)
        dense = torch.autograd.grad(out, (q, k, v), given.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))
    only_lse = torch.autograd.grad(lse.sum(), (q, k, v))
    both = fastattn.attention(q, k, v, return_lse=True, backend=backend)
    zeros = torch.autograd.grad(both, (q, k, v), (torch.zeros_like(out), torch.ones_like(lse)))
    for a, b in zip(only_lse, zeros, strict=True):
        torch.testing.assert_close(a, b)
    assert (only_lse[2] == 0).all()


def test_only_what_requires_a_gradient_gets_one(backend):
    q, k, v = draw()
    v.requires_grad_(False)
    fastattn.attention(q, k, v, backend=backend).sum().backward()
    assert q.grad is not None and k.grad is not None and v.grad is None


def test_dropout_draws_a_seed_and_repeats_with_one(backend):
    q, k, v = draw(grad=False)
    torch.manual_seed(0)
    first = fastattn.attention(q, k, v, dropout_p=0.5, backend=backend)
    second = fastattn.attention(q, k, v, dropout_p=0.5, backend=backend)
    torch.manual_seed(0)
    assert torch.equal(first, fastattn.attention(q, k, v, dropout_p=0.5, backend=backend))
    assert not torch.equal(first, second)


def test_the_forward_and_a_deterministic_backward_repeat_bitwise(backend):
    q, k, v = draw(len_q=70, len_k=130)
    results = []
    for _ in range(3):
        out = fastattn.attention(q, k, v, deterministic=True, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_sink_of_minus_infinity_is_no_sink_also_where_nothing_is_seen(backend):
    q, k, v = (torch.randn(2, 2, 5, 8, requires_grad=True) for _ in range(3))
    sinks = torch.tensor([-math.inf, 0.3], requires_grad=True)
    seen = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    seen[0, :, 2] = False

    def gradients(sinks):
        out, lse = fastattn.attention(q, k, v, mask=seen, sinks=sinks, return_lse=True, backend=backend)
        loss = out.square().sum() + lse[seen.any(-1).expand_as(lse)].sum()
        return torch.autograd.grad(loss, [t for t in (q, k, v, sinks) if t is not None])

    *others, dsinks = gradients(sinks)
    assert dsinks[0] == 0 and dsinks[1].isfinite() and dsinks[1] != 0
    for of_one, without in zip(others, gradients(None), strict=True):
        torch.testing.assert_close(of_one[:, 0], without[:, 0])


def test_sinks_are_in_the_denominator_only(backend):
    q, k, v = draw(grad=False)
    sinks = torch.randn(4)
    out, lse = fastattn.attention(q, k, v, sinks=sinks, return_lse=True, backend=backend)
    plain, plain_lse = fastattn.attention(q, k, v, return_lse=True, backend=backend)
    torch.testing.assert_close(lse, plain_lse)
    share = torch.sigmoid(plain_lse - sinks.view(1, 4, 1))
    torch.testing.assert_close(out, plain * share[..., None])


def test_a_sink_far_above_the_scores_takes_the_output_and_leaves_the_lse(backend):
    q, k, v = draw()
    out, lse = fastattn.attention(q, k, v, sinks=torch.full((4,), 200.0), return_lse=True, backend=backend)
    _, plain_lse = fastattn.attention(q, k, v, return_lse=True, backend="reference")
    assert not out.any()
    found = torch.autograd.grad(lse.sum() + out.sum(), (q, k, v))
    expected = torch.autograd.grad(plain_lse.sum(), (q, k))
    for ours, theirs in zip(found, (*expected, torch.zeros_like(v)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("len_q", (3, 8, 9, 40))
def test_a_float_mask_hides_what_it_hides_from_every_query(len_q: int, backend: str) -> None:
    """NaN and all, forward and backward, in each kernel; the padding of a tile of queries does not matter either."""
    k, v = torch.randn(2, 1, 1, 16, 8)
    k[0, 0, 3], v[0, 0, 3] = math.nan, math.inf
    hidden = torch.zeros(1, 1, len_q, 16)
    hidden[..., 3] = -math.inf
    inputs = [x.requires_grad_() for x in (torch.randn(1, 1, len_q, 8), k, v)]
    out = fastattn.attention(*inputs, mask=hidden, backend=backend)
    for tensor in (out, *torch.autograd.grad(out.sum(), inputs)):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("len_q", (1, 16))
def test_a_softcap_does_not_swallow_nan(len_q: int, backend: str) -> None:
    k = torch.randn(1, 1, 16, 8)
    k[0, 0, 3, 0] = math.nan
    assert fastattn.attention(torch.randn(1, 1, len_q, 8), k, k, softcap=5.0, backend=backend).isnan().all()


def test_keys_that_are_not_finite_have_gradients_where_their_weight_is_0(backend: str) -> None:
    q, k, v = torch.ones(1, 1, 3, 4), torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4)
    k[0, 0, 3, 1] = -math.inf
    inputs = [x.requires_grad_() for x in (q, k, v)]
    _, dk, dv = torch.autograd.grad(fastattn.attention(*inputs, backend=backend).sum(), inputs)
    assert not dk[0, 0, 3].any() and not dv[0, 0, 3].any()


def test_two_finite_masks_hide_nothing(backend: str) -> None:
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 16, 8)
    lowest = torch.full((4, 16), torch.finfo(torch.float32).min)
    out = fastattn.attention(q, k, k, mask=lowest, bias=lowest, backend=backend)
    torch.testing.assert_close(out, k.mean(2, keepdim=True).expand_as(out))


def test_a_key_that_two_finite_masks_lower_has_no_weight_beside_one_that_a_single_one_does(backend: str) -> None:
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 16, 8)
    lowest = torch.full((4, 16), torch.finfo(torch.float32).min)
    bias = torch.zeros(4, 16)
    bias[:, 5:] = lowest[:, 5:]
    out = fastattn.attention(q, k, k, mask=lowest, bias=bias, backend=backend)
    torch.testing.assert_close(out, k[:, :, :5].mean(2, keepdim=True).expand_as(out))


def test_explain_draws_nothing_and_meta_tensors_have_shapes() -> None:
    q = torch.empty(1, 2, 5, 8, device="meta")
    assert fastattn.attention(q, q, q[..., :4]).shape == (1, 2, 5, 4)
    state = torch.get_rng_state()
    fastattn.explain(*[torch.zeros(1, 2, 5, 8)] * 3, dropout_p=0.1)
    assert torch.equal(torch.get_rng_state(), state)
