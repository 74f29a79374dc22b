"""Cases: what is visible, the work that counts, and truths that a plain computation agrees with."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from fastattn import reference
from fastattn.bench.cases.attention import T5_BUCKETS, AttentionCase, t5_buckets
from fastattn.bench.cases.base import OpCase
from fastattn.bench.cases.grid import SHAPES, SUITES, Choice, cases
from fastattn.bench.cases.model import ModelCase
from fastattn.bench.cases.packed import PackedCase
from fastattn.bench.cases.visible import BLOCK, Visible
from fastattn.biases import T5Bias
from fastattn.masks import Causal

COMMON = {"device": "cpu", "dtype": torch.float32}
VISIBLES = [
    Visible(),
    Visible(right=0),
    Visible(left=3, right=0),
    Visible(left=2, right=5),
    Visible(lengths=(9, 4)),
    Visible(right=0, lengths=(9, 4)),
    Visible(density=0.4),
]


@pytest.mark.parametrize("visible", VISIBLES, ids=lambda v: v.describe() or "everything")
@pytest.mark.parametrize("sizes", [(9, 9), (5, 9), (150, 200)])
def test_visible_is_the_same_as_a_mask_a_tensor_a_rule_and_a_count(visible: Visible, sizes: tuple[int, int]) -> None:
    len_q, len_k = sizes
    rows = torch.stack([visible.rows(b, 0, len_q, len_q, len_k, "cpu") for b in range(2)])
    mask, dense = visible.mask(len_q, len_k, "cpu"), visible.dense(2, len_q, len_k, "cpu")
    everything = torch.ones(2, 1, len_q, len_k, dtype=torch.bool)
    as_mask = everything if mask is None else mask.to_dense(2, 1, len_q, len_k)
    as_tensor = everything if dense is None else dense.expand(2, 1, len_q, len_k)
    assert torch.equal(as_mask[:, 0], rows) and torch.equal(as_tensor[:, 0], rows)
    assert visible.pairs(2, len_q, len_k) == int(rows.sum())


def test_blocks_hold_their_share_in_every_row() -> None:
    layout = Visible(density=0.25).layout(16 * BLOCK, 16 * BLOCK)
    assert int(layout.sum()) == 64 and int(layout.sum(dim=1).min()) >= 1
    assert torch.equal(layout, Visible(density=0.25).layout(16 * BLOCK, 16 * BLOCK))


def test_t5_buckets_are_those_of_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)
    want = T5Attention._relative_position_bucket(distance, bidirectional=True, num_buckets=T5_BUCKETS, max_distance=128)
    assert torch.equal(t5_buckets(distance), want)
    assert torch.equal(T5Bias(torch.zeros(T5_BUCKETS, 1)).bucket(distance), want)


def test_every_shape_and_suite_has_cases_of_different_names() -> None:
    for device_dtype in (torch.float32, torch.bfloat16):
        names = [c.name for c in cases(SUITES, Choice("cpu", device_dtype))]
        assert len(names) == len(set(names))
    for shape in SHAPES:
        found = cases(("attention", "norm", "ffn"), Choice("cpu", torch.float32, (shape,)))
        assert len(found) == 4 and all(shape in case.name for case in found)
    with pytest.raises(ValueError, match="bert-huge"):
        cases(("attention",), Choice("cpu", torch.float32, ("bert-huge",)))
    with pytest.raises(ValueError, match="softmax"):
        cases(("softmax",), Choice("cpu", torch.float32))


def test_work_counts_what_is_visible() -> None:
    sizes = {"batch": 2, "heads_q": 4, "heads_kv": 2, "len_q": 8, "len_k": 8, "dim": 16, "name": "", "group": ""}
    full = AttentionCase(**sizes, **COMMON)
    causal = AttentionCase(**sizes, visible=Visible(right=0), **COMMON)
    assert full.work("forward").flops == 4 * 2 * 4 * 64 * 16
    assert causal.work("forward").flops == 4 * 2 * 4 * 36 * 16
    assert causal.work("both").flops == 3.5 * causal.work("forward").flops
    assert full.work("forward").bytes == 4 * 16 * (2 * (2 * 4 * 8) + 2 * (2 * 2 * 8))


def _tiny() -> list[OpCase]:
    found = cases(("attention", "packed", "decode", "norm", "ffn"), Choice("cpu", torch.float32, quick=True))
    return [case for case in found if isinstance(case, OpCase) and case.work("forward").flops < 1e8]


@pytest.mark.parametrize("case", _tiny(), ids=lambda case: case.name)
def test_truths_are_parts_of_the_whole_truth(case: OpCase) -> None:
    """Rows, heads and units taken by themselves must be what the whole computation in float64 has there."""
    tensors = case.tensors()
    grads = case.output_gradients(tensors)
    backward = "both" in case.directions
    expected = {e.name: e for e in case.expected(tensors, grads, backward=backward)}
    leaves = {n: t.double().requires_grad_(n in case.leaves()) for n, t in tensors.items()}
    outs = _whole(case, leaves)
    found = dict(zip(case.outputs, outs, strict=True))
    if backward:
        got = torch.autograd.grad(outs, [leaves[n] for n in case.leaves()], [g.double() for g in grads])
        found |= {f"d{n}": g for n, g in zip(case.leaves(), got, strict=True)}
    assert set(found) <= set(expected) if backward else set(case.outputs) <= set(expected)
    for name, value in found.items():
        part = expected[name].pick(value)
        assert part.shape == expected[name].ref.shape
        torch.testing.assert_close(part, expected[name].ref, rtol=1e-9, atol=1e-11)
        assert (expected[name].magnitude >= expected[name].ref.abs() * (1 - 1e-9) - 1e-12).all()


def _whole(case, t):
    if case.suite in ("attention", "decode"):
        bias = t["table"][case.buckets()].permute(2, 0, 1) if case.t5_bias else None
        mask = case.visible.dense(case.batch, case.len_q, case.len_k, "cpu")
        return (reference.attention(t["q"], t["k"], t["v"], mask=mask, bias=bias, scale=case.scale),)
    if case.suite == "packed":
        parts = [[t[n][a:b].transpose(0, 1)[None] for n in "qkv"] for a, b in pairwise(case.bounds)]
        mask = Causal() if case.causal else None
        return (torch.cat([reference.attention(*part, mask=mask)[0].transpose(0, 1) for part in parts]),)
    if case.suite == "norm":
        extras = {"kind": case.kind, "eps": case.eps, "residual": t.get("residual"), "return_residual": case.residual}
        found = reference.norm(t["x"], t["weight"], t.get("bias"), **extras)
        return found if isinstance(found, tuple) else (found,)
    if case.gated:
        return (reference.gated_ffn(t["x"], t["w_gate"], t["w_up"], t["w_down"], case.activation),)
    return (reference.ffn(t["x"], t["w1"], t.get("b1"), t["w2"], t.get("b2"), case.activation),)


def test_of_a_long_forward_stretches_from_the_first_query_to_the_last_are_judged() -> None:
    sizes = {"batch": 1, "heads_q": 2, "heads_kv": 1, "len_q": 1500, "len_k": 1700, "dim": 8, "name": "", "group": ""}
    case = AttentionCase(**sizes, visible=Visible(left=300, right=0), **COMMON)
    tensors = case.tensors()
    (out,) = case.expected(tensors, case.output_gradients(tensors), backward=False)
    (whole,) = _whole(case, {n: t.double() for n, t in tensors.items()})
    picked = out.pick(whole)
    assert picked.shape == (1, 2, 1024, 8)
    torch.testing.assert_close(picked, out.ref, rtol=1e-9, atol=1e-11)
    assert torch.equal(picked[:, :, 0], whole[:, :, 0]) and torch.equal(picked[:, :, -1], whole[:, :, -1])


def test_a_packed_case_is_its_padded_batch_without_padding() -> None:
    sizes = {"heads_q": 4, "heads_kv": 2, "dim": 8, "name": "", "group": "", **COMMON}
    for causal in (False, True):
        case = PackedCase(lengths=(5, 1, 3), causal=causal, **sizes)
        padded, tensors = case.padded(), case.tensors()
        assert case.bounds == [0, 5, 6, 9] == case.cu_seqlens().tolist() and padded.visible.lengths == (5, 1, 3)
        for tensor in tensors.values():
            assert case.pad(tensor).shape[::2] == (3, 5) and torch.equal(case.unpad(case.pad(tensor)), tensor)
        pairs = sum(n * (n + 1) // 2 if causal else n * n for n in case.lengths)
        assert case.work("forward").flops == 4 * 4 * pairs * 8
        assert case.work("both").bytes == 3 * case.work("forward").bytes == 6 * 9 * 6 * 8 * 4


def test_model_cases_count_valid_tokens() -> None:
    options = {"name": "", "group": "", "model": "encoder", "batch": 3, "length": 10, **COMMON}
    full, padded = ModelCase(**options), ModelCase(**options, padded=True)
    assert full.lengths() == [10, 10, 10]
    assert padded.lengths()[0] == 10 and all(5 <= n <= 10 for n in padded.lengths())
    assert padded.work("forward").flops < full.work("forward").flops
    assert full.work("both").flops == 3 * full.work("forward").flops
    assert math.isclose(float(padded.valid().sum()), sum(padded.lengths()))
    assert not padded.output_gradient()[~padded.valid()].any()
