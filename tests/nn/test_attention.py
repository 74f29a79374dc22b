"""MultiheadAttention against torch.nn's over its whole argument space: one table, forward and every gradient.

The rule is that of fastattn.parity: no further from torch in float64 than twice torch's own error in the tested dtype,
plus rounding. The one difference that is by design has its own table, at the end.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastattn.dispatch import BackendWarning
from fastattn.nn import MultiheadAttention, counting
from fastattn.parity import failures, parity
from fastattn.parity.guards import torch_threads

BATCH, LEN_Q, LEN_K, EMBED, HEADS = 3, 7, 11, 24, 4
NEG_INF = float("-inf")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """One thread: the problems are tiny, and a second one only waits for a busy machine."""
    with torch_threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", BackendWarning)
        warnings.filterwarnings("ignore", message="Support for mismatched")
        yield


@dataclass(frozen=True)
class Case:
    """One call. layout: "batch", "seq" (L, B, E) or "single" (L, E). source: which of query, key and value are one
    tensor, as in "q=k=v". attn and keys: the masks, "" for none, with the dimensions of attn as the last letter."""

    layout: str = "batch"
    source: str = "q=k=v"
    attn: str = ""
    keys: str = ""
    lengths: tuple[int, int] = (LEN_Q, LEN_K)
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [self.layout, self.source, self.attn and f"attn:{self.attn}", self.keys and f"keys:{self.keys}"]
        words += [] if self.lengths == (LEN_Q, LEN_K) else [f"{self.lengths[0]}x{self.lengths[1]}"]
        words += [f"{name}={value}" for name, value in {**self.options, **self.call}.items()]
        return "-".join(filter(None, words))

    @property
    def shapes(self) -> tuple[int, int, int]:
        """Batch, queries, keys."""
        len_q, len_k = self.lengths
        return (1 if self.layout == "single" else BATCH), (len_k if self.source == "q=k=v" else len_q), len_k


def table() -> Iterator[Case]:
    attn_masks = ("", "bool2", "bool3", "float2", "float3")
    key_masks = ("", "bool", "float")
    sources = ("q=k=v", "q,k=v", "q=k,v", "q,k,v")
    for attn, keys, need in itertools.product(attn_masks, key_masks, (True, False)):
        yield Case(attn=attn, keys=keys, call={"need_weights": need})
    for layout, source, masks in itertools.product(("batch", "seq", "single"), sources, (("", ""), ("float3", "bool"))):
        lengths = (LEN_K, LEN_K) if source == "q=k,v" else (LEN_Q, LEN_K)
        yield Case(layout, source, *masks, lengths=lengths, call={"need_weights": layout == "single"})
    options: tuple[dict[str, Any], ...] = (
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 10},
        {"vdim": 14},
        {"kdim": 10, "vdim": 14, "bias": False, "add_bias_kv": True},
    )
    for chosen, layout, need in itertools.product(options, ("batch", "seq", "single"), (True, False)):
        for masks in (("", ""), ("bool2", "bool")) if layout == "batch" else (("float3", "bool"),):
            yield Case(layout, "q,k,v", *masks, options=chosen, call={"need_weights": need})
    for layout, attn in itertools.product(("batch", "seq", "single"), ("", "bool3")):
        yield Case(layout, attn=attn, call={"average_attn_weights": False})
    for lengths, keys, need in itertools.product(((7, 7), (5, 9), (9, 5)), ("", "bool"), (True, False)):
        # With need_weights or padding torch reads the mask, without them the hint: here they agree.
        yield Case("seq", "q,k=v", "causal2", keys, lengths, {}, {"is_causal": True, "need_weights": need})
    yield Case("batch", "q=k=v", "causalfloat2", call={"is_causal": True, "need_weights": False})
    yield Case("seq", "q=k=v", "causal2", "", (7, 7), {"add_bias_kv": True}, {"is_causal": True, "need_weights": False})


CASES = list(table())


def modules(case: Case, dtype: torch.dtype, training: bool) -> tuple[MultiheadAttention, nn.MultiheadAttention]:
    """Ours and torch's with the same weights, which are neither zero nor one."""
    options = {"batch_first": case.layout == "batch", **case.options}
    ours, theirs = MultiheadAttention(EMBED, HEADS, **options), nn.MultiheadAttention(EMBED, HEADS, **options)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype).train(training), theirs.to(dtype).train(training)


def arguments(case: Case, dtype: torch.dtype, requires_grad: bool) -> tuple[list[Tensor], dict[str, Any]]:
    """The distinct input tensors, and the masks by name; the floats of both as leaves."""
    batch, len_q, len_k = case.shapes
    widths = (EMBED, case.options.get("kdim", EMBED), case.options.get("vdim", EMBED))
    lengths = (len_q, len_k, len_k)
    distinct = {"q=k=v": (0,), "q,k=v": (0, 1), "q=k,v": (0, 2), "q,k,v": (0, 1, 2)}[case.source]
    shapes = {
        "batch": lambda i: (batch, lengths[i], widths[i]),
        "seq": lambda i: (lengths[i], batch, widths[i]),
        "single": lambda i: (lengths[i], widths[i]),
    }[case.layout]
    inputs = [torch.randn(shapes(i)) for i in distinct]
    masks: dict[str, Any] = {"attn_mask": attn_mask(case), "key_padding_mask": None}
    if case.keys:
        hidden = torch.zeros(batch, len_k, dtype=torch.bool)
        hidden[0, len_k - 2 :] = True
        hidden[-1, len_k // 2] = True
        masks["key_padding_mask"] = hidden if case.keys == "bool" else torch.randn(hidden.shape).masked_fill(hidden, -9)
        if case.layout == "single":
            masks["key_padding_mask"] = masks["key_padding_mask"].squeeze(0)

    def leaf(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dtype == torch.bool else t.to(dtype).requires_grad_(requires_grad)

    return [leaf(x) for x in inputs], {name: leaf(mask) for name, mask in masks.items()}


def attn_mask(case: Case) -> Tensor | None:
    batch, len_q, len_k = case.shapes
    if not case.attn:
        return None
    shape = (len_q, len_k) if case.attn.endswith("2") else (batch * HEADS, len_q, len_k)
    if case.attn.startswith("causal"):
        later = torch.ones(shape, dtype=torch.bool).triu(1)
        return torch.zeros(shape).masked_fill(later, NEG_INF) if "float" in case.attn else later
    hidden = torch.rand(shape) < 0.3
    hidden[..., 0] = False
    return (
        hidden if case.attn.startswith("bool") else torch.randn(shape).masked_fill(hidden & hidden.roll(1, -1), NEG_INF)
    )


def as_call(case: Case, inputs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    at = {"q=k=v": (0, 0, 0), "q,k=v": (0, 1, 1), "q=k,v": (0, 0, 1), "q,k,v": (0, 1, 2)}[case.source]
    return inputs[at[0]], inputs[at[1]], inputs[at[2]]


def run(
    case: Case, module: nn.Module, inputs: list[Tensor], masks: dict[str, Any], grads: list[Tensor] | None
) -> dict[str, Tensor]:
    """Outputs, and with output gradients `grads` the gradients of inputs, masks and parameters."""
    output, weights = module(*as_call(case, inputs), **masks, **case.call)
    found = {"output": output} if weights is None else {"output": output, "weights": weights}
    if grads is not None:
        torch.autograd.backward(list(found.values()), [g.to(t) for g, t in zip(grads, found.values(), strict=False)])
        leaves = {f"input {i}": x for i, x in enumerate(inputs)} | {n: m for n, m in masks.items() if m is not None}
        leaves |= dict(module.named_parameters())
        found |= {f"d {name}": t.grad for name, t in leaves.items() if t.requires_grad and t.grad is not None}
    return found


def output_gradients(case: Case) -> list[Tensor]:
    batch, len_q, len_k = case.shapes
    lead = {"batch": (batch, len_q), "seq": (len_q, batch), "single": (len_q,)}[case.layout]
    len_k += bool(case.options.get("add_bias_kv")) + bool(case.options.get("add_zero_attn"))
    heads = () if case.call.get("average_attn_weights", True) else (HEADS,)
    weights = (*(() if case.layout == "single" else (batch,)), *heads, len_q, len_k)
    return [torch.randn(*lead, EMBED), torch.randn(weights)]


def detached(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype == torch.bool else t.detach().to(dtype).requires_grad_(t.requires_grad)


@pytest.mark.parametrize("mode", ("train", "eval"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_torch(case: Case, dtype: torch.dtype, mode: str) -> None:
    """In eval without gradients torch takes its fast path wherever it can."""
    training = mode == "train"
    ours, theirs = modules(case, dtype, training)
    inputs, masks = arguments(case, dtype, training)
    grads = [g.to(dtype) for g in output_gradients(case)] if training else None
    results = []
    with torch.set_grad_enabled(training):
        for module, kind in ((ours, dtype), (theirs, dtype), (copy.deepcopy(theirs).double(), torch.float64)):
            xs, ms = [detached(x, kind) for x in inputs], {n: detached(m, kind) for n, m in masks.items()}
            results.append(run(case, module, xs, ms, grads))
    found, eager, truth = results
    assert found.keys() == truth.keys()
    assert all(found[name].dtype == eager[name].dtype for name in found)
    rows = [
        parity(name, found[name], truth[name], eager[name], truth[name].abs(), dtype=dtype)
        for name in found
        if not name.startswith("d ") or truth[name].abs().max() > 1e-12
    ]
    assert not failures(rows), failures(rows)


def test_the_table_is_run_by_the_kernels() -> None:
    """With gradients and without dropout, no case of the table is left to other code."""
    for case in CASES:
        ours, _ = modules(case, torch.float32, True)
        inputs, masks = arguments(case, torch.float32, True)
        tally = {id(ours): counting.Tally()}
        counting.start(tally)
        try:
            run(case, ours, inputs, masks, None)
        finally:
            counting.stop(tally)
        assert tally[id(ours)] == counting.Tally(calls=1), str(case)


# ---- by design: the one difference -----------------------------------------------------------------------------------
#
# A query that sees no key. torch.nn: NaN in need_weights=True and in the fast path, 0 in need_weights=False, and NaN in
# the gradients of the whole batch. Here: attention 0, weights 0, gradient 0, in every mode.

BLIND = 2  # the query of batch entry 1 that sees no key; all queries of entry 1 where all its keys are hidden
HOW = ("bool2", "bool3", "float2", "float3", "keys bool", "keys float", "float3 and keys bool", "bool3 and keys float")


def blinding(how: str) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """Masks, the same ones when they also blind queries, and which (batch, query) those are."""
    blind = torch.zeros(BATCH, LEN_Q, dtype=torch.bool)
    before: dict[str, Any] = {"attn_mask": None, "key_padding_mask": None}
    after = dict(before)
    kind = how.split(" ")[0]
    if "keys" in how:
        hidden = torch.zeros(BATCH, LEN_K, dtype=torch.bool)
        hidden[1, 0 if kind == "keys" else 4 :] = True
        blind[1] = kind == "keys"
        after["key_padding_mask"] = (
            hidden if how.endswith("bool") else torch.zeros(hidden.shape).masked_fill(hidden, NEG_INF)
        )
        before["key_padding_mask"] = None if kind == "keys" else after["key_padding_mask"]
    if kind != "keys":
        before["attn_mask"] = attn_mask(Case("batch", "q,k=v", kind))
        after["attn_mask"] = before["attn_mask"].clone()
        value = True if kind.startswith("bool") else NEG_INF
        if kind.endswith("2"):
            after["attn_mask"][BLIND] = value
            blind[:, BLIND] = True
        else:
            keys = slice(0, 4) if " and " in how else slice(None)
            after["attn_mask"].view(BATCH, HEADS, LEN_Q, LEN_K)[1, :, BLIND, keys] = value
            blind[1, BLIND] = True
    return before, after, blind


@pytest.mark.parametrize("dropout", (0.0, 0.4))
@pytest.mark.parametrize("need_weights", (True, False))
@pytest.mark.parametrize("mode", ("train", "eval", "eval without gradients"))
@pytest.mark.parametrize("how", HOW)
def test_a_query_that_sees_no_key(how: str, mode: str, need_weights: bool, dropout: float) -> None:
    case = Case("batch", "q,k=v", options={"dropout": dropout})
    ours, theirs = modules(case, torch.float32, mode == "train")
    before, after, blind = blinding(how)
    query, memory = torch.randn(BATCH, LEN_Q, EMBED), torch.randn(BATCH, LEN_K, EMBED)
    grad = torch.randn(BATCH, LEN_Q, EMBED)

    def call(module: nn.Module, masks: dict[str, Any], grad: Tensor) -> list[Tensor]:
        q, m = query.clone().requires_grad_(), memory.clone().requires_grad_()
        module.zero_grad()
        output, weights = module(q, m, m, **masks, need_weights=need_weights)
        if mode == "eval without gradients":
            return [output, weights]
        output.backward(grad)
        return [output.detach(), weights, q.grad, m.grad, *(p.grad.clone() for p in module.parameters())]

    with torch.set_grad_enabled(mode != "eval without gradients"):
        output, weights, *grads = call(ours, after, grad)
        assert torch.equal(output[blind], ours.out_proj.bias.detach().expand_as(output[blind]))
        if need_weights:
            assert not weights[blind].any()
        if grads:
            assert not grads[0][blind].any()
            assert all(g.isfinite().all() for g in grads)
        if mode == "train" and dropout > 0:
            return
        # Everything else is as if those queries had not been there: torch sees their keys, but gets no gradient.
        expected, expected_weights, *expected_grads = call(theirs, before, grad.masked_fill(blind[..., None], 0.0))
        close = {"atol": 2e-5, "rtol": 2e-5}
        torch.testing.assert_close(output[~blind], expected[~blind], **close)
        if need_weights:
            torch.testing.assert_close(weights[~blind], expected_weights[~blind], **close)
        names = ["query", "memory", *dict(ours.named_parameters())]
        for name, found, wanted in zip(names, grads, expected_grads, strict=bool(grads)):
            if name == "out_proj.bias":
                wanted = grad.sum((0, 1))  # the bias is all that a blind query's output is
            torch.testing.assert_close(found, wanted, **close, msg=lambda text, name=name: f"{name}: {text}")


def test_nan_and_infinities_are_not_hidden() -> None:
    """Only what masks hide is 0: NaN in the input is NaN in the output."""
    ours, _ = modules(Case(), torch.float32, False)
    x = torch.randn(BATCH, LEN_K, EMBED)
    x[1, 2] = float("nan")
    with torch.no_grad():
        for need_weights in (True, False):
            output, _ = ours(x, x, x, need_weights=need_weights)
            assert output[1].isnan().all() and output[[0, 2]].isfinite().all()
