"""The CUDA backend's attention on CPU tensors through the emulation: out, lse and every gradient under each form of a
lowered mask, alone and together, against the reference backend in float64.

test_cuda_emulated.py runs this file in a process of its own, with FASTATTN_CUDA_EMULATION set.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastattn.backends import cuda, reference
from fastattn.biases.lowered import NO_BIAS, LoweredBias
from fastattn.masks.lowered import Blocks, LoweredMask
from fastattn.packed import Packed
from fastattn.parity.bound import unit_roundoff
from fastattn.parity.guards import poisoned_outputs

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WIDE = pytest.param(192, marks=pytest.mark.slow)  # seconds each in the emulation

# mask, bias, packed, sinks, dropout_seed, scale, softcap, dropout_p
Rest = tuple[LoweredMask, LoweredBias, Packed | None, Tensor | None, Tensor | None, float, float, float]


class Attention(NamedTuple):
    dim: int
    dim_v: int
    len_q: int
    len_k: int
    heads_q: int = 2
    heads_kv: int = 1
    dtype: torch.dtype = BF16
    softcap: float = 0.0


def half_inputs(shape: Attention) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, shape.heads_q, shape.len_q, shape.dim)
    k = torch.randn(2, shape.heads_kv, shape.len_k, shape.dim)
    v = torch.randn(2, shape.heads_kv, shape.len_k, shape.dim_v)
    return q.to(shape.dtype), k.to(shape.dtype), v.to(shape.dtype)


def agree(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], v: Tensor) -> None:
    """out and lse of the kernel against those in float64."""
    # Each p and the result are rounded once: two roundings of at most max|v|, and one more of slack.
    bound = 3 * unit_roundoff(v.dtype) * float(v.abs().max())
    assert float((found[0].double() - truth[0]).abs().max()) <= bound
    assert torch.equal(found[1] == -torch.inf, truth[1] == -torch.inf)
    seen = truth[1] != -torch.inf
    assert not seen.any() or float((found[1].double() - truth[1])[seen].abs().max()) <= 1e-4


NAMES = ("dq", "dk", "dv", "dbias", "dtable", "dslopes", "dsinks")
SLACK = 8  # roundings: of p and ds, which have errors of their own, of out, and of the gradient


def gradients_agree(inputs: tuple[Tensor, Tensor, Tensor], own: Rest, exact: Rest, *, of_lse: bool = True) -> None:
    """The gradients of q, k, v and the sinks, for random gradients of out and lse, against those in float64."""
    out, lse = cuda.attention_forward(*inputs, *own)
    grad_out, grad_lse = torch.randn(out.shape).to(out.dtype), torch.randn(lse.shape) * of_lse
    wanted = False, False, False, own[3] is not None, True
    found = cuda.attention_backward(grad_out, grad_lse, *inputs, out, lse, *own, *wanted)
    double = tuple(t.double() for t in inputs)
    results = reference.attention_forward(*double, *exact)
    truths = reference.attention_backward(grad_out.double(), grad_lse.double(), *double, *results, *exact, *wanted)
    for name, grad, truth in zip(NAMES, found, truths, strict=True):
        assert grad.shape == truth.shape, name
        if truth.numel():
            error, size = float((grad.double() - truth).abs().max()), float(truth.abs().max())
            assert error <= SLACK * unit_roundoff(out.dtype) * size, f"{name}: error {error:.3g} of {size:.3g}"


def check(shape: Attention, mask: LoweredMask, visible: Tensor) -> None:
    """The kernels under `mask` against float64 under the bool tensor `visible` (B, Hq, Sq, Skv)."""
    q, k, v = half_inputs(shape)
    rest = None, None, None, shape.dim**-0.5, shape.softcap, 0.0
    own, exact = (mask, NO_BIAS, *rest), (LoweredMask(dense=visible), NO_BIAS, *rest)
    truth = reference.attention_forward(q.double(), k.double(), v.double(), *exact)
    agree(cuda.attention_forward(q, k, v, *own), truth, v)
    if all(17 <= dim <= 192 for dim in (shape.dim, shape.dim_v)):
        gradients_agree((q, k, v), own, exact)


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256, 8, 20, 72, 136])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
def test_head_dims(dim: int, extras: bool) -> None:
    shape = Attention(dim, dim, 130, 77, dtype=F16 if dim % 64 == 0 else BF16, softcap=20.0 if extras else 0.0)
    mask = LoweredMask(band_offset=77 - 130, band_right=0)
    visible = torch.arange(77) <= torch.arange(130).view(-1, 1) + 77 - 130
    check(shape, mask, visible.expand(2, 2, 130, 77))


@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
def test_more_tiles_than_a_ring_holds(dim: int, extras: bool) -> None:
    shape = Attention(dim, dim, 140, 64 * 11 + 5, dtype=F16, softcap=10.0 if extras else 0.0)
    q, k, v = (each[:1] for each in half_inputs(shape))
    some = (torch.rand(1, 2, 3, 12) < 0.6).repeat_interleave(64, 2).repeat_interleave(64, 3)[..., :140, : shape.len_k]
    near = (torch.arange(shape.len_k) <= torch.arange(140).view(-1, 1) + 565).expand_as(some)
    rest = None, None, None, shape.dim**-0.5, shape.softcap, 0.0
    for mask, visible in ((LoweredMask(band_right=565), near), (LoweredMask(blocks=blocks_of(some)), some)):
        exact = LoweredMask(dense=visible), NO_BIAS, *rest
        truth = reference.attention_forward(q.double(), k.double(), v.double(), *exact)
        agree(cuda.attention_forward(q, k, v, mask, NO_BIAS, *rest), truth, v)
        gradients_agree((q, k, v), (mask, NO_BIAS, *rest), exact)


def blocks_of(visible: Tensor) -> Blocks:
    """Form D of a bool tensor (B, Hq, Sq, Skv)."""
    batch, heads, len_q, len_k = visible.shape
    nq, nk = -(-len_q // 64), -(-len_k // 64)
    whole = torch.zeros(batch, heads, nq * 64, nk * 64, dtype=torch.bool)
    whole[:, :, :len_q, :len_k] = visible
    exists = torch.zeros_like(whole)
    exists[:, :, :len_q, :len_k] = True
    col, ids, bitmaps, row_ptr = [], [], [torch.full((64,), -1, dtype=torch.int64)], [0]
    weights = torch.tensor([1 << i if i < 63 else -(1 << 63) for i in range(64)])
    for b in range(batch):
        for h in range(heads):
            if row_ptr[-1] != len(col) or len(row_ptr) % (nq + 1) == 0:
                row_ptr.append(len(col))
            for i in range(nq):
                for j in range(nk):
                    at = (b, h, slice(64 * i, 64 * i + 64), slice(64 * j, 64 * j + 64))
                    block = whole[at]
                    if block.any():
                        full = bool((block | ~exists[at]).all())
                        col.append(j)
                        ids.append(0 if full else len(bitmaps))
                        if not full:
                            bitmaps.append((block.long() * weights).sum(dim=1))
                row_ptr.append(len(col))
    pointers = torch.tensor(row_ptr, dtype=torch.int32).view(batch, heads, nq + 1)
    columns, names = torch.tensor(col, dtype=torch.int32), torch.tensor(ids, dtype=torch.int32)
    # Every block's line (batch entry and head) and row, then all of them by line, column and row.
    lines = torch.arange(batch * heads * nq).repeat_interleave(pointers.diff(dim=2).flatten().long())
    place = (lines // nq * nk + columns) * nq + lines % nq
    order = place.argsort()
    counts = torch.bincount(place // nq, minlength=batch * heads * nk).view(batch * heads, nk)
    ends = counts.flatten().cumsum(0).view(batch * heads, nk)
    col_ptr = torch.cat([ends[:, :1] - counts[:, :1], ends], dim=1).view(batch, heads, nk + 1).to(torch.int32)
    rows = (lines % nq).to(torch.int32)
    return Blocks(pointers, columns, names, torch.stack(bitmaps), col_ptr, rows[order], names[order])


@pytest.mark.parametrize("dim", [64, WIDE])  # 128 and 64 queries to a tile
@pytest.mark.parametrize("kind", ["random", "blocks", "diagonal", "nothing"])
def test_blocks(dim: int, kind: str) -> None:
    len_q, len_k = 300, 270
    query, key = torch.arange(len_q).view(-1, 1), torch.arange(len_k)
    if kind == "random":
        visible = (torch.rand(2, 2, len_q, len_k) < 0.02) & (key // 64 != 2)
    elif kind == "blocks":
        visible = torch.rand(2, 2, 5, 5).lt(0.5).repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :len_q, :len_k]
    elif kind == "diagonal":
        visible = (((query - key) % 65 == 0) | (key < 64)).expand(2, 2, len_q, len_k)
    else:
        visible = torch.zeros(2, 2, len_q, len_k, dtype=torch.bool)
        visible[0, 0, 290, 260] = True
    check(Attention(dim, dim, len_q, len_k), LoweredMask(blocks=blocks_of(visible)), visible)


@pytest.mark.parametrize("dim", [64, WIDE])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_intervals(dim: int, count: int) -> None:
    len_q, len_k = 200, 400
    bounds = torch.randint(-20, len_k + 40, (count, 2, 1, len_q, 2), dtype=torch.int32).sort(dim=-1).values
    bounds[0, 0, 0, :128] = torch.tensor([60, 330])  # tiles that one interval covers for all queries
    bounds[0, 1, 0, 5] = torch.tensor([2**31 - 1, -(2**31)])
    key = torch.arange(len_k)
    visible = ((key >= bounds[..., :1]) & (key < bounds[..., 1:])).any(dim=0).expand(2, 2, len_q, len_k)
    check(Attention(dim, dim, len_q, len_k), LoweredMask(intervals=bounds), visible)


def test_keys_band_and_blocks_together() -> None:
    len_q, len_k = 150, 333
    bits = torch.rand(2, 384) < 0.8
    bits[0, 64:128] = True
    weights = torch.tensor([1 << i if i < 63 else -(1 << 63) for i in range(64)])
    words = (bits.view(2, 6, 64).long() * weights).sum(dim=-1)
    start, end = torch.tensor([3, 70], dtype=torch.int32), torch.tensor([300, 900], dtype=torch.int32)
    random = torch.rand(2, 2, len_q, len_k) < 0.7
    query, key = torch.arange(len_q).view(-1, 1), torch.arange(len_k)
    band = (key >= query + 100 - 90) & (key <= query + 100 + 40)
    keys = bits[:, None, None, :len_k] & (key >= start.view(2, 1, 1, 1)) & (key < end.view(2, 1, 1, 1))
    mask = LoweredMask(start, end, 100, 90, 40, key_bits=words, blocks=blocks_of(random))
    check(Attention(48, 80, len_q, len_k), mask, random & band & keys)


def in_double(bias: LoweredBias) -> LoweredBias:
    return LoweredBias(*(part.double() if isinstance(part, Tensor) else part for part in bias))


BIASES = {
    "table": LoweredBias(table=torch.randn(2, 41), first=-30),
    "one table for all heads, one column": LoweredBias(table=torch.randn(1, 1), first=7),
    "slopes": LoweredBias(slopes=torch.tensor([[0.5, 0.01]])),
    "slopes per batch entry, top left": LoweredBias(slopes=torch.rand(2, 2), top_left=True),
    "all": LoweredBias(torch.randn(2, 1, 150, 1), torch.randn(2, 300), -100, torch.rand(1, 2), True),
    "finite stays finite": LoweredBias(
        torch.full((1, 1, 1, 1), -3e38), torch.full((1, 9), -3e38), -100, torch.tensor([[3e38, 0.0]])
    ),
    "hidden by -inf": LoweredBias(table=torch.tensor([[0.0, -torch.inf, 1.0]]), first=-1),
}


@pytest.mark.parametrize("dim", [64, 128, WIDE])
@pytest.mark.parametrize("name", BIASES)
def test_biases_by_distance(name: str, dim: int) -> None:
    shape = Attention(dim, dim, 150, 213, softcap=15.0 if name == "all" else 0.0)
    q, k, v = half_inputs(shape)
    mask = LoweredMask(band_offset=63, band_right=40)
    rest = None, None, None, dim**-0.5, shape.softcap, 0.0
    found = cuda.attention_forward(q, k, v, mask, BIASES[name], *rest)
    exact = mask, in_double(BIASES[name]), *rest
    truth = reference.attention_forward(q.double(), k.double(), v.double(), *exact)
    if (
        name == "finite stays finite"
    ):  # every score is the same lowest number: a mean, and an lse at the end of the range
        visible = torch.arange(213) <= torch.arange(150).view(-1, 1) + 63 + 40
        mean = (visible / visible.sum(dim=1, keepdim=True)).double() @ v.double()
        assert float((found[0].double() - mean).abs().max()) <= 3 * unit_roundoff(v.dtype) * float(v.abs().max())
        assert found[1].isfinite().all()
    else:
        agree(found, truth, v)
        gradients_agree((q, k, v), (mask, BIASES[name], *rest), exact)


class Sequences(NamedTuple):
    """A packed batch: cu_seqlens, the rows that the tensors have, the longest lengths."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    rows: tuple[int, int]
    longest: tuple[int, int]


PACKED = {
    "several": Sequences((0, 70, 70, 71, 260), (0, 33, 40, 170, 170), (260, 170), (190, 140)),
    "rows of no sequence": Sequences((5, 20, 150), (3, 70, 100), (170, 110), (130, 67)),
    "cut off": Sequences((0, 100, 300), (0, 150, 260), (300, 260), (64, 70)),
    "past the tensors": Sequences((0, 50, 120), (0, 90, 200), (100, 150), (128, 128)),
    "no queries": Sequences((4, 4, 4), (0, 3, 9), (9, 9), (0, 9)),
    "no sequences": Sequences((0,), (0,), (5, 5), (0, 0)),
}


@pytest.mark.parametrize("dim", [64, WIDE])
@pytest.mark.parametrize("kind", ["plain", "causal", "intervals", "bias and dropout"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_batches(name: str, kind: str, dim: int) -> None:
    at = PACKED[name]
    cu = [torch.tensor(ends, dtype=torch.int32) for ends in (at.q, at.k)]
    packed, batch = Packed(cu[0], cu[1], *at.longest), len(at.q) - 1
    q = torch.randn(at.rows[0], 4, dim).to(BF16).transpose(0, 1)[None]
    k, v = (torch.randn(at.rows[1], 2, dim).to(BF16).transpose(0, 1)[None] for _ in range(2))
    mask, bias, seed, p = LoweredMask(), NO_BIAS, None, 0.0
    if kind == "causal":
        mask = LoweredMask(band_right=0, band_left=50)
    elif kind == "intervals":
        bounds = torch.randint(0, at.longest[1] + 9, (2, batch, 1, at.longest[0], 2), dtype=torch.int32)
        mask = LoweredMask(intervals=bounds.sort(dim=-1).values, key_end=torch.full((batch,), 100, dtype=torch.int32))
    elif kind == "bias and dropout":
        dense = torch.randn(batch, 1, 1, at.longest[1])
        bias = LoweredBias(dense, torch.randn(4, 60), -20, torch.rand(1, 4))
        seed, p = torch.tensor([77]), 0.25
    rest = packed, torch.randn(4), seed, dim**-0.5, 0.0, p
    exact = mask, in_double(bias), packed, rest[1].double(), *rest[2:]
    truth = reference.attention_forward(q.double(), k.double(), v.double(), *exact)
    agree(cuda.attention_forward(q, k, v, mask, bias, *rest), truth, v / (1 - p))
    gradients_agree((q, k, v), (mask, bias, *rest), exact)


def test_keys_that_nobody_sees_may_hold_anything() -> None:
    q, k, v = half_inputs(Attention(64, 64, 100, 130))
    end = torch.tensor([70, 0], dtype=torch.int32)
    arguments = LoweredMask(key_end=end), NO_BIAS, None, None, None, 0.125, 0.0, 0.0
    want = cuda.attention_forward(q, k, v, *arguments)
    for b, first in enumerate(end):
        k[b, :, first:], v[b, :, first:] = torch.nan, torch.inf
    got = cuda.attention_forward(q, k, v, *arguments)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert not want[0][1].any()
    assert (want[1][1] == -torch.inf).all()


def test_keys_that_nobody_sees_get_no_gradient_and_give_none() -> None:
    q, k, v = half_inputs(Attention(64, 64, 100, 130))
    end = torch.tensor([70, 0], dtype=torch.int32)
    arguments = LoweredMask(key_end=end), NO_BIAS, None, torch.zeros(2), None, 0.125, 0.0, 0.0
    out, lse = cuda.attention_forward(q, k, v, *arguments)
    grad_out = torch.randn(out.shape).to(BF16)
    wanted = False, False, False, True, False
    want = cuda.attention_backward(grad_out, None, q, k, v, out, lse, *arguments, *wanted)
    for b, first in enumerate(end):
        k[b, :, first:], v[b, :, first:] = torch.nan, torch.inf
    got = cuda.attention_backward(grad_out, None, q, k, v, out, lse, *arguments, *wanted)
    for name, found, expected in zip(NAMES, got, want, strict=True):
        assert torch.equal(found, expected), name
    dq, dk, dv = got[:3]
    assert not dq[1].any()
    assert not dk[1].any() and not dv[1].any()
    assert not dk[0, :, 70:].any() and not dv[0, :, 70:].any()
    assert dk[0, :, :70].any()


def test_gradients_lie_as_their_inputs() -> None:
    base = torch.randn(3, 2, 100, 2, 64).to(BF16)
    q, k, v = (t.permute(0, 2, 1, 3) for t in base)  # heads beside one another
    out, lse = cuda.attention_forward(q, k, v, LoweredMask(), NO_BIAS, None, None, None, 0.125, 0.0, 0.0)
    rest = LoweredMask(), NO_BIAS, None, None, None, 0.125, 0.0, 0.0, False, False, False, False, False
    expanded = torch.randn(2, 1, 100, 64).to(BF16).expand(2, 2, 100, 64)
    grads = cuda.attention_backward(expanded, None, q, k, v, out, lse, *rest)
    again = cuda.attention_backward(expanded.contiguous(), None, *(t.contiguous() for t in (q, k, v)), out, lse, *rest)
    for grad, same, own in zip(grads, again, (q, k, v), strict=False):
        assert grad.stride() == own.stride()
        assert torch.equal(grad, same)


def test_rows_of_no_sequence_get_no_gradient_however_the_inputs_lie() -> None:
    rows = torch.randn(1, 2, 51).to(BF16).unfold(2, 32, 1)  # 20 rows that overlap
    k, v = (torch.randn(1, 2, 20, 32).to(BF16) for _ in range(2))
    ends = torch.tensor([5, 15], dtype=torch.int32)
    rest = LoweredMask(), NO_BIAS, Packed(ends, ends, 10, 10), None, None, 0.2, 0.0, 0.0
    out, lse = cuda.attention_forward(rows, k, v, *rest)
    with poisoned_outputs():
        wanted = False, False, False, False, False
        grads = cuda.attention_backward(torch.ones_like(out), None, rows, k, v, out, lse, *rest, *wanted)
    for grad in grads[:3]:
        assert grad.isfinite().all()
        assert not grad[:, :, :5].any() and not grad[:, :, 15:].any()
        assert grad[:, :, 5:15].any()


def test_nan_in_a_query_is_not_hidden() -> None:
    q, k, v = half_inputs(Attention(64, 64, 70, 70))
    q[0, 0, 3] = torch.nan
    out, lse = cuda.attention_forward(q, k, v, LoweredMask(), NO_BIAS, None, None, None, 0.125, 0.0, 0.0)
    assert out[0, 0, 3].isnan().all()
    assert lse[0, 0, 3].isnan()
    assert out.isnan().sum() == 64


def test_nan_in_a_query_reaches_its_own_gradient() -> None:
    q, k, v = half_inputs(Attention(64, 64, 70, 70))
    q[0, 0, 3] = torch.nan
    rest = LoweredMask(), NO_BIAS, None, None, None, 0.125, 0.0, 0.0
    out, lse = cuda.attention_forward(q, k, v, *rest)
    wanted = False, False, False, False, False
    dq, dk, dv, *_ = cuda.attention_backward(torch.ones_like(out), None, q, k, v, out, lse, *rest, *wanted)
    assert dq[0, 0, 3].isnan().all()
    assert not dq[1].isnan().any() and not dq[0, 1].isnan().any()
    assert dk[0].isnan().any() and dv[0].isnan().any()


def test_results_are_bitwise_repeatable_whatever_order_warps_run_in(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = half_inputs(Attention(64, 64, 200, 190))
    results = []
    for seed in range(3):
        monkeypatch.setenv("FASTATTN_EMULATION_SEED", str(seed))
        mask = LoweredMask(band_right=0)
        rest = mask, NO_BIAS, None, torch.zeros(2), None, 0.125, 0.0, 0.0
        out, lse = cuda.attention_forward(q, k, v, *rest)
        grads = cuda.attention_backward(
            v.repeat(1, 2, 2, 1)[:, :, :200], None, q, k, v, out, lse, *rest, False, False, False, True, False
        )
        results.append((out, lse, *grads))
    for later in results[1:]:
        for found, first in zip(later, results[0], strict=True):
            assert torch.equal(found, first)


@pytest.mark.parametrize("dim", [64, 96])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_gradients_where_one_key_has_all_the_weight(dtype: torch.dtype, extras: bool, dim: int) -> None:
    """There ds is less than what a rounded out moves its centre by: the tile is walked a second time."""
    q, k, v = half_inputs(Attention(dim, dim, 63, 2, dtype=dtype))
    k[:, :, 1] = -k[:, :, 0]
    # The scores are 0, and -8 by the bias; or 4 and -4.
    wanted = 0.0 if extras else 4.0 / 0.1
    q = (q - ((q * k[:, :, :1]).sum(-1, True) - wanted) / k[:, :, :1].square().sum(-1, True) * k[:, :, :1]).to(dtype)
    bias = LoweredBias(dense=torch.tensor([0.0, -8.0]).view(1, 1, 1, 2)) if extras else NO_BIAS
    rest = LoweredMask(), bias, None, None, None, 0.1, 0.0, 0.0
    gradients_agree((q, k, v), rest, rest, of_lse=False)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -2.0])], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("lowest", [torch.finfo(BF16).min, torch.finfo(F32).min])
def test_gradients_of_rows_at_the_lowest_number(lowest: float, sinks: Tensor | None) -> None:
    """Their lse has lost the logarithm of how many keys there are: the sums over the keys say it."""
    inputs = half_inputs(Attention(64, 64, 70, 130))
    bias = torch.zeros(1, 1, 70, 130)
    bias[:, :, 10:20] = lowest
    bias[:, :, 30:, :100] = lowest
    rest = None, sinks, None, 0.125, 0.0, 0.0
    exact_rest = None, None if sinks is None else sinks.double(), None, 0.125, 0.0, 0.0
    own, exact = LoweredBias(dense=bias), LoweredBias(dense=bias.double())
    gradients_agree(inputs, (LoweredMask(), own, *rest), (LoweredMask(), exact, *exact_rest))


@pytest.mark.parametrize("lowest", [torch.finfo(BF16).min, torch.finfo(F16).min, torch.finfo(F32).min])
def test_rows_at_the_lowest_number_keep_their_lse(lowest: float) -> None:
    """A dtype's lowest number for a mask, over whole rows: times log2 e it is beyond float32."""
    q, k, v = half_inputs(Attention(64, 64, 70, 130))
    bias = torch.zeros(1, 1, 70, 130)
    bias[:, :, 10:20] = lowest
    bias[:, :, 30:, :100] = lowest
    rest = None, None, None, 0.125, 0.0, 0.0
    _, found = cuda.attention_forward(q, k, v, LoweredMask(), LoweredBias(dense=bias), *rest)
    exact = q.double(), k.double(), v.double(), LoweredMask(), LoweredBias(dense=bias.double())
    _, truth = reference.attention_forward(*exact, *rest)
    assert float(((found.double() - truth) / truth.abs().clamp(min=1.0)).abs().max()) <= 1e-5
