"""The Triton backend's attention, on CPU tensors through Triton's interpreter: every form of a lowered mask, alone and
together, against the reference backend, which is given the same mask as a dense one.

test_triton.py runs this file in a process of its own: whether Triton interprets is decided when it is first imported.
Tiles are made small, so that a few hundred positions hold empty, partial and full ones.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import TensorHandle, interpreter_builder

from fastattn.backends import reference
from fastattn.backends import triton as backend
from fastattn.backends.triton import interpreter, launch
from fastattn.backends.triton.plan import mask_arguments, plan_keys, plan_queries
from fastattn.biases.lowered import NO_BIAS, LoweredBias
from fastattn.kernels import tiles
from fastattn.masks.lowered import Blocks, LoweredMask, visible
from fastattn.packed import Packed
from fastattn.parity.bound import unit_roundoff
from fastattn.parity.guards import poisoned_outputs

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BATCH, HEADS, HEADS_KV, LEN_Q, LEN_K = 2, 2, 1, 90, 150
QUERY_BLOCKS, KEY_BLOCKS = -(-LEN_Q // 64), -(-LEN_K // 64)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "INTERPRETED", tiles.Tile(32, 32, 4, 1))


def key_bits(draw: torch.Generator) -> Tensor:
    """Runs of visible and hidden keys, so that whole tiles are one or the other."""
    seen = (torch.rand(BATCH, LEN_K // 20 + 1, generator=draw) < 0.5).repeat_interleave(20, dim=1)[:, :LEN_K]
    padded = torch.zeros(BATCH, KEY_BLOCKS * 64, dtype=torch.int64)
    padded[:, :LEN_K] = seen
    shifts = torch.arange(64).expand(BATCH, KEY_BLOCKS, 64)
    return (padded.view(BATCH, KEY_BLOCKS, 64) << shifts).sum(dim=2)


def intervals(draw: torch.Generator, count: int, batch: int, heads: int) -> Tensor:
    """Sorted disjoint intervals that move slowly with the query; some are empty, some reach past the keys."""
    centre = torch.arange(LEN_Q) * LEN_K // LEN_Q
    shift = torch.randint(-5, 5, (count, batch, heads, 1), generator=draw)
    start = centre + shift + torch.arange(count).view(-1, 1, 1, 1) * 60 - 60
    length = torch.randint(0, 50, (count, batch, heads, LEN_Q), generator=draw)
    found = torch.stack([start, start + length], dim=-1)
    found[:, :, :, :3] = 0
    found[0, :, :, 64:] = torch.tensor([-5, 1 << 20])
    return found.to(torch.int32)


def blocks(draw: torch.Generator, batch: int, heads: int) -> tuple[Blocks, Tensor]:
    """A random pattern of empty, full and partial base blocks, in form D and as a bool tensor."""
    bitmaps = torch.randint(-(2**62), 2**62, (6, 64), generator=draw)
    bitmaps[0] = -1
    table = torch.randint(-2, 6, (batch, heads, QUERY_BLOCKS, KEY_BLOCKS), generator=draw).clamp(min=-1)
    table[..., 0, :] = -1  # queries that see nothing
    bits = (bitmaps[:, :, None] >> torch.arange(64)) & 1
    dense = (
        torch.where((table >= 0)[..., None, None], bits[table.clamp(min=0)], 0).transpose(3, 4).flatten(2, 3).flatten(3)
    )
    listed = table >= 0

    def compressed(pattern: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ends = pattern.sum(dim=3).flatten().cumsum(0).view(batch, heads, -1)
        starts = ends - pattern.sum(dim=3)
        pointer = torch.cat([starts, ends[..., -1:]], dim=2).to(torch.int32)
        return pointer, pattern.nonzero()[:, 3].to(torch.int32), ids[pattern].to(torch.int32)

    rows = compressed(listed, table)
    columns = compressed(listed.transpose(2, 3), table.transpose(2, 3))
    return Blocks(*rows, bitmaps, *columns), dense[:, :, :LEN_Q, :LEN_K].bool()


def random_mask(form: str, seed: int) -> tuple[LoweredMask, Tensor]:
    """A lowered mask of the named forms and what it shows, bool (B, Hq, Sq, Skv)."""
    draw = torch.Generator().manual_seed(seed)
    fields: dict[str, Any] = {}
    shown = torch.ones(BATCH, HEADS, LEN_Q, LEN_K, dtype=torch.bool)
    if "range" in form:
        fields |= {"key_start": torch.tensor([-3, 40], dtype=torch.int32)}
        fields |= {"key_end": torch.tensor([LEN_K + 9, 120], dtype=torch.int32)}
    if "bits" in form:
        fields["key_bits"] = words = key_bits(draw)
        bits = (words[:, :, None] >> torch.arange(64)) & 1
        shown = shown & bits.flatten(1)[:, None, None, :LEN_K].bool()
    if "band" in form:
        fields |= {"band_offset": LEN_K - LEN_Q, "band_left": 40, "band_right": 10}
    if "interval" in form:
        fields["intervals"] = intervals(draw, 3 if "several" in form else 1, BATCH, 1 if "shared" in form else HEADS)
    if "blocks" in form:
        fields["blocks"], dense = blocks(draw, 1, 1 if "shared" in form else HEADS)
        shown = shown & dense
    if "dense" in form:
        shape = (BATCH, 1, 1, LEN_K) if "key-dense" in form else (1, HEADS, LEN_Q, LEN_K)
        fields["dense"] = (torch.rand(shape, generator=draw) < 0.4).expand(BATCH, HEADS, LEN_Q, LEN_K)
    mask = LoweredMask(**fields)
    rest = visible(mask, LEN_Q, LEN_K, torch.device("cpu"))
    return mask, shown if rest is None else shown & rest


FORMS = [
    "range", "bits", "band", "range band", "interval", "several interval shared", "several interval", "blocks",
    "blocks shared", "dense", "key-dense", "bits band several interval", "range bits band interval blocks dense",
]  # fmt: skip


def outputs(
    module: Any, mask: LoweredMask, dtype: torch.dtype, options: bool, seed: int = 5, packed: Packed | None = None
) -> dict[str, Tensor]:
    """What forward and backward return; backward gets the module's own forward. Options: all of them, biases too."""
    draw = torch.Generator().manual_seed(seed)
    dim, dim_v = (40, 24) if options else (32, 32)
    batch, rows_q, rows_k = (BATCH, LEN_Q, LEN_K) if packed is None else (1, ROWS_Q, ROWS_K)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    q, k, v = (
        tensor(batch, HEADS, rows_q, dim),
        tensor(batch, HEADS_KV, rows_k, dim),
        tensor(batch, HEADS_KV, rows_k, dim_v),
    )
    bias, sinks, dropout = NO_BIAS, None, torch.tensor([77])
    numbers = (0.2, 0.0, 0.0)
    if options:
        table, slopes = tensor(HEADS, 61, dtype=F32), 0.02 * tensor(BATCH, HEADS, dtype=F32)
        bias = LoweredBias(tensor(1, HEADS, LEN_Q, LEN_K), table, -30, slopes)
        sinks, numbers = tensor(HEADS, dtype=F32), (0.2, 5.0, 0.3)
    extras = (mask, bias, packed, sinks, dropout, *numbers)
    out, lse = module.attention_forward(q, k, v, *extras)
    grad_out, grad_lse = tensor(batch, HEADS, rows_q, dim_v), tensor(batch, HEADS, rows_q, dtype=F32)
    grads = module.attention_backward(
        grad_out, grad_lse if options else None, q, k, v, out, lse, *extras, *[options] * 4, True
    )
    names = ("out", "lse", "dq", "dk", "dv", "dbias", "dtable", "dslopes", "dsinks")
    return dict(zip(names, (out, lse, *grads), strict=True))


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype, what: str) -> None:
    for name, expected in want.items():
        found = got[name]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        if expected.numel() == 0:
            continue
        hidden = expected.isinf()
        assert torch.equal(found.isinf(), hidden), name
        # Weights and score gradients are rounded to the dtype once each; the reference keeps them in float32.
        scale = expected[~hidden].double().abs().max()
        error = (found - expected)[~hidden].double().abs().max()
        bound = (4 * unit_roundoff(dtype) + 2**-18) * scale
        assert error <= bound, f"{name} of {what}: error {error:.3g} > {bound:.3g}"


@pytest.mark.parametrize(
    ("form", "dtype", "options"),
    [
        ("bits band several interval", F32, False),
        (FORMS[-1], BF16, True),
        *(pytest.param(form, F32, False, marks=pytest.mark.slow) for form in FORMS),
        pytest.param("range band", F16, True, marks=pytest.mark.slow),
    ],
)
def test_every_form_equals_its_dense_mask(form: str, dtype: torch.dtype, options: bool) -> None:
    mask, shown = random_mask(form, seed=len(form))
    got, want = outputs(backend, mask, dtype, options), outputs(reference, LoweredMask(dense=shown), dtype, options)
    assert_close(got, want, dtype, form)


# Rows of no sequence before, between and after; the second sequence of queries is longer than LEN_Q.
ROWS_Q, ROWS_K = 2 + 40 + LEN_Q + 4 + 3, 70 + LEN_K + 1
PACKED = Packed(
    torch.tensor([2, 42, 42 + LEN_Q + 4], dtype=torch.int32), torch.tensor([0, 70, 70 + LEN_K], dtype=torch.int32),
    LEN_Q, LEN_K,
)  # fmt: skip


@pytest.mark.parametrize(
    ("form", "dtype", "options"),
    [
        ("none", F32, False),
        ("range bits blocks", BF16, True),
        *(pytest.param(form, F32, True, marks=pytest.mark.slow) for form in ("bits", "interval", "blocks", "dense")),
    ],
)
def test_packed_sequences_equal_the_reference(form: str, dtype: torch.dtype, options: bool) -> None:
    mask, shown = random_mask(form, seed=len(form))
    band = {"band_offset": 3, "band_left": 90, "band_right": 20}  # from each sequence's end
    got = outputs(backend, mask._replace(**band), dtype, options, packed=PACKED)
    assert_close(got, outputs(reference, LoweredMask(dense=shown, **band), dtype, options, packed=PACKED), dtype, form)


def test_rows_of_no_sequence_get_no_gradient_however_the_inputs_lie() -> None:
    rows = torch.randn(1, 2, 51).to(F16).unfold(2, 32, 1)  # 20 rows that overlap
    k, v = (torch.randn(1, 2, 20, 32).to(F16) for _ in range(2))
    ends = torch.tensor([5, 15], dtype=torch.int32)
    rest = LoweredMask(), NO_BIAS, Packed(ends, ends, 10, 10), None, None, 0.2, 0.0, 0.0
    out, lse = backend.attention_forward(rows, k, v, *rest)
    with poisoned_outputs():
        wanted = False, False, False, False, False
        grads = backend.attention_backward(torch.ones_like(out), None, rows, k, v, out, lse, *rest, *wanted)
    for grad in grads[:3]:
        assert grad.isfinite().all()
        assert not grad[:, :, :5].any() and not grad[:, :, 15:].any()
        assert grad[:, :, 5:15].any()


@pytest.mark.parametrize("form", FORMS)
def test_tiles_are_what_the_mask_makes_them(form: str) -> None:
    """Empty and full tiles are so in truth, listed ones are exactly those that are not empty, in both directions."""
    mask, shown = random_mask(form, seed=len(form))
    block_q, block_k = 64, 32
    arguments = mask_arguments(mask, BATCH, HEADS, LEN_Q, LEN_K)
    plan = plan_keys(arguments, LEN_Q, LEN_K, block_q, block_k)
    if plan.states is None:
        assert set(form.split()) <= {"range", "band"}
        return
    batches, heads = arguments.entries
    states = plan.states.view(batches, heads, *plan.states.shape[1:]).expand(BATCH, HEADS, -1, -1)
    some, every = torch.zeros_like(states, dtype=torch.bool), torch.ones_like(states, dtype=torch.bool)
    for i in range(states.shape[2]):
        for j in range(states.shape[3]):
            tile = shown[:, :, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k].flatten(2)
            some[:, :, i, j] = tile.any(dim=2)
            every[:, :, i, j] = tile.all(dim=2) & ((j + 1) * block_k <= LEN_K)
    assert not (some & (states == 0)).any()
    assert not (~every & (states == 2)).any()
    if form in ("bits", "blocks", "dense", "key-dense", "interval"):  # one form alone is classified exactly
        assert torch.equal(states > 0, some)
        assert torch.equal(states == 2, every)
    for listed, matrix in (
        (plan.arguments, plan.states),
        (plan_queries(arguments, LEN_Q, LEN_K, block_q, block_k).arguments, plan.states.transpose(1, 2)),
    ):
        for entry, row in ((e, r) for e in range(matrix.shape[0]) for r in range(matrix.shape[1])):
            full, partial = int(listed["full_counts"][entry, row]), int(listed["partial_counts"][entry, row])
            tiles_of_row = listed["tiles"][entry, row]
            assert tiles_of_row[:full].tolist() == (matrix[entry, row] == 2).nonzero().flatten().tolist()
            backwards = tiles_of_row[len(tiles_of_row) - partial :].flip(0)
            assert backwards.tolist() == (matrix[entry, row] == 1).nonzero().flatten().tolist()
        work = listed["full_counts"] + listed["partial_counts"]
        assert (work.gather(1, listed["order"].long()).diff(dim=1) <= 0).all()


@pytest.mark.parametrize(
    "form", ["range", pytest.param("bits", marks=pytest.mark.slow), pytest.param("key-dense", marks=pytest.mark.slow)]
)
def test_what_lies_in_hidden_keys_does_not_matter(form: str) -> None:
    mask, shown = random_mask(form, seed=3)
    draw = torch.Generator().manual_seed(1)
    q, k, v, grad = (torch.randn(BATCH, HEADS, n, 16, generator=draw) for n in (LEN_Q, LEN_K, LEN_K, LEN_Q))
    unseen = ~shown.any(dim=2).any(dim=1)[:, None, :, None]
    results = []
    for filler in (0.0, math.nan):
        keys, values = k.masked_fill(unseen, filler), v.masked_fill(unseen, filler)
        extras = (mask, NO_BIAS, None, None, None, 0.25, 0.0, 0.0)
        out, lse = backend.attention_forward(q, keys, values, *extras)
        grads = backend.attention_backward(grad, None, q, keys, values, out, lse, *extras, *[False] * 4, True)
        results.append((out, lse, *grads[:3]))
    for clean, filled in zip(*results, strict=True):
        assert torch.equal(clean, filled)


def test_a_row_of_lowest_biases_is_a_uniform_one() -> None:
    """finfo.min hides nothing: where it is all a row has, its keys share the weight, backward too."""
    draw = torch.Generator().manual_seed(2)
    q, k, v, grad = (torch.randn(1, 1, 40, 16, generator=draw) for _ in range(4))
    bias = torch.full((1, 1, 40, 40), torch.finfo(F32).min)
    extras = (LoweredMask(), LoweredBias(bias), None, None, None, 0.25, 0.0, 0.0)
    out, lse = backend.attention_forward(q, k, v, *extras)
    assert torch.allclose(out, v.mean(dim=2, keepdim=True).expand_as(out), atol=1e-6)
    dv = backend.attention_backward(grad, None, q, k, v, out, lse, *extras, True, False, False, False, True)[2]
    assert torch.allclose(dv, grad.mean(dim=2, keepdim=True).expand_as(dv), atol=1e-6)


def test_the_gradient_of_lse_beside_a_sink_where_lse_lost_the_number_of_keys() -> None:
    """A row of lowest biases has its lse's gradient alone: its keys' weights are 0 beside the sink."""
    draw = torch.Generator().manual_seed(5)
    q, k, v, grad = (torch.randn(1, 1, n, 32, generator=draw) for n in (3, 5, 5, 3))
    bias = torch.zeros(1, 1, 3, 5)
    bias[:, :, 1] = torch.finfo(F32).min
    extras = (LoweredMask(), LoweredBias(bias), None, torch.zeros(1), None, 0.25, 0.0, 0.0)
    found = []
    for module in (backend, reference):
        out, lse = module.attention_forward(q, k, v, *extras)
        grad_lse = torch.ones_like(lse)
        found.append(module.attention_backward(grad, grad_lse, q, k, v, out, lse, *extras, *[False] * 4, True)[:3])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_without_a_key_every_gradient_is_zero() -> None:
    """A bias that is broadcast along keys has a gradient all the same, to which no program adds."""
    q, k, v = torch.randn(2, 3, 40, 64), torch.randn(2, 3, 0, 64), torch.randn(2, 3, 0, 64)
    bias = LoweredBias(torch.randn(2, 1, 40, 1), torch.randn(3, 5), -2, torch.rand(1, 3))
    extras = (LoweredMask(), bias, None, torch.zeros(3), None, 0.25, 0.0, 0.0)
    out, lse = backend.attention_forward(q, k, v, *extras)
    with poisoned_outputs():
        found = backend.attention_backward(out, lse, q, k, v, out, lse, *extras, *[True] * 5)
    assert [grad.shape for grad in found] == [
        t.shape for t in (q, k, v, bias.dense, bias.table, bias.slopes, extras[3])
    ]
    assert not any(grad.any() for grad in found)  # NaN is true


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_one_visible_key_has_no_score_gradient(dtype: torch.dtype) -> None:
    """ds = p (dp - delta) is 0 where p is 1: a delta from the rounded output would leave rounding errors."""
    draw = torch.Generator().manual_seed(4)
    q, k, v, grad = (torch.randn(1, 2, 40, 16, generator=draw).to(dtype) for _ in range(4))
    extras = (LoweredMask(band_left=0, band_right=0), NO_BIAS, None, None, None, 0.25, 0.0, 0.0)
    out, lse = backend.attention_forward(q, k, v, *extras)
    dq, dk, dv = backend.attention_backward(grad, None, q, k, v, out, lse, *extras, *[False] * 4, True)[:3]
    assert max(float(dq.abs().max()), float(dk.abs().max())) < 1e-5
    assert torch.equal(dv, grad)


@pytest.mark.slow
def test_backward_is_bitwise_repeatable() -> None:
    mask, _ = random_mask(FORMS[-1], seed=9)
    first, second = (outputs(backend, mask, F16, options=True) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, LEN_Q, LEN_K), (1, HEADS, 1, LEN_K), (BATCH, 1, LEN_Q, 1)])
def test_gradients_of_broadcast_biases(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastattn.backends.triton.attention._BIAS_PROGRAMS", 20)  # so that some are summed in parts
    draw = torch.Generator().manual_seed(6)
    q, k, v, grad = (torch.randn(BATCH, HEADS, n, 16, generator=draw) for n in (LEN_Q, LEN_K, LEN_K, LEN_Q))
    bias, sinks = torch.randn(shape, generator=draw), torch.zeros(HEADS)
    mask, shown = random_mask("band dense", seed=1)
    found = []
    for module, given in ((backend, mask), (reference, LoweredMask(dense=shown))):
        extras = (given, LoweredBias(bias), None, sinks, None, 0.25, 0.0, 0.0)
        out, lse = module.attention_forward(q, k, v, *extras)
        wanted = (True, False, False, True)
        found.append(module.attention_backward(grad, lse, q, k, v, out, lse, *extras, *wanted, True)[3])
    assert found[0].shape == bias.shape
    assert (found[0] - found[1]).abs().max() <= 2**-17 * found[1].abs().max()


@pytest.mark.parametrize(
    ("rows", "columns", "first", "top_left", "form"),
    [
        (HEADS, 61, -30, False, "band dense"),
        (1, 400, -200, True, "none"),
        (HEADS, 1, 0, False, "none"),
        pytest.param(HEADS, 2, 5, True, "band", marks=pytest.mark.slow),
        pytest.param(HEADS, 8, 300, False, "none", marks=pytest.mark.slow),
        pytest.param(1, 50, -400, False, "interval", marks=pytest.mark.slow),
    ],
)
def test_gradients_by_distance(
    rows: int, columns: int, first: int, top_left: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables shorter and longer than the distances there are, or beside them; sums in few parts, so that programs come
    back to columns they have written."""
    monkeypatch.setattr("fastattn.backends.triton.attention._BIAS_PROGRAMS", 3)
    draw = torch.Generator().manual_seed(7)
    q, k, v, grad = (torch.randn(BATCH, HEADS, n, 16, generator=draw) for n in (LEN_Q, LEN_K, LEN_K, LEN_Q))
    table, slopes = torch.randn(rows, columns, generator=draw), torch.rand(1, HEADS, generator=draw)
    bias = LoweredBias(None, table, first, slopes, top_left)
    mask, shown = random_mask(form, seed=1)
    found = []
    # The reference in float64: of sums over all pairs, float32 has errors of its own.
    for module, given, dtype in ((backend, mask, F32), (reference, LoweredMask(dense=shown), torch.float64)):
        extras = (
            given,
            bias._replace(table=table.to(dtype), slopes=slopes.to(dtype)),
            None,
            None,
            None,
            0.25,
            0.0,
            0.0,
        )
        tensors = [t.to(dtype) for t in (q, k, v)]
        out, lse = module.attention_forward(*tensors, *extras)
        flags = (False, True, True, False, True)
        grad_lse = lse.nan_to_num(neginf=0.0)  # of rows that see nothing
        grads = module.attention_backward(grad.to(dtype), grad_lse, *tensors, out, lse, *extras, *flags)
        found.append({"out": out.to(F32), "dtable": grads[4].to(F32), "dslopes": grads[5].to(F32)})
    assert_close(found[0], found[1], F32, form)


@pytest.mark.parametrize("dtype", [pytest.param(F32, marks=pytest.mark.slow), BF16])
def test_shortcuts_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What interpreter.py puts in the place of Triton's operators, all but the matrix product, computes the same."""
    monkeypatch.setattr(interpreter._Shortcuts, "dot", lambda self, slow: slow)
    product = interpreter_builder.create_dot

    def in_one_order(a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        """NumPy sums up in another order where an operand lies transposed, as the shortcuts leave some."""
        return product(*(TensorHandle(np.ascontiguousarray(t.data), t.dtype) for t in (a, b)), *rest)

    monkeypatch.setattr(interpreter_builder, "create_dot", in_one_order)
    mask, _ = random_mask("range bits band interval", seed=8)
    quick = outputs(backend, mask, dtype, options=True)
    monkeypatch.setattr(launch, "at_speed", contextlib.nullcontext)
    for name, value in outputs(backend, mask, dtype, options=True).items():
        assert torch.equal(value, quick[name]), name
