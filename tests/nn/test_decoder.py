"""TransformerDecoderLayer against torch.nn's over its argument space, by the rule of fastattn.parity.

One difference is by design: a query that sees no key (test_a_query_that_sees_no_key).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastattn import swap
from fastattn.nn import MultiheadAttention, TransformerDecoderLayer

BATCH, TARGET, SOURCE, WIDTH, HEADS, HIDDEN = 3, 6, 9, 24, 4, 40
NEG_INF = float("-inf")
MASKS = ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask")

Case = tuple[str, dict[str, str], dict[str, Any], dict[str, Any]]
"""Layout, kinds of the masks, options of the constructor, further arguments of the call."""


def table() -> Iterator[Case]:
    for name, kind in itertools.product(MASKS, ("bool", "float")):
        yield "batch", {name: kind}, {}, {}
    for kind, norm_first in itertools.product(("bool", "float"), (True, False)):
        yield "batch", dict.fromkeys(MASKS, kind), {"norm_first": norm_first}, {}
    yield "batch", {"tgt_mask": "bool", "tgt_key_padding_mask": "float", "memory_mask": "float"}, {}, {}
    yield "batch", {"tgt_mask": "heads", "memory_mask": "heads"}, {}, {}
    for layout, norm_first, bias in itertools.product(("batch", "seq", "single"), (True, False), (True, False)):
        yield layout, {}, {"norm_first": norm_first, "bias": bias, "layer_norm_eps": 0.1}, {}
        yield layout, {"tgt_mask": "causal"}, {"norm_first": norm_first}, {"tgt_is_causal": True}
    yield "batch", {"memory_mask": "causal"}, {}, {"memory_is_causal": True}
    for activation in ("relu", nn.GELU(), torch.tanh):
        yield "batch", {}, {"activation": activation}, {}


def name_of(case: Case) -> str:
    layout, kinds, options, call = case
    words = [f"{k}={getattr(v, '__name__', v)}" for k, v in {**kinds, **options, **call}.items()]
    return "-".join([layout, *words])


def mask(name: str, kind: str, single: bool) -> Tensor:
    keys = TARGET if name.startswith("tgt") else SOURCE
    if kind == "causal":
        return torch.ones(TARGET, keys, dtype=torch.bool).triu(1)
    batch = 1 if single else BATCH
    shape = (batch, keys) if "padding" in name else (batch * HEADS, TARGET, keys) if kind == "heads" else (TARGET, keys)
    hidden = torch.rand(shape) < 0.3
    hidden[..., 0] = False
    found = torch.randn(shape).masked_fill(hidden, NEG_INF) if kind == "float" else hidden
    return found.squeeze(0) if single and "padding" in name else found


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", list(table()), ids=name_of)
def test_layer(case: Case, dtype: torch.dtype, mode: str, against_torch, randomised) -> None:
    layout, kinds, changes, call = case
    options = {"batch_first": layout == "batch", "activation": "gelu", "dropout": 0.0 if mode == "train" else 0.1}
    options |= changes
    ours = randomised(TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, **options)).train(mode == "train")
    theirs = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, **options).train(mode == "train")

    def draw(length: int) -> Tensor:
        shape = {"batch": (BATCH, length), "seq": (length, BATCH), "single": (length,)}[layout]
        return torch.randn(*shape, WIDTH)

    masks = {name: mask(name, kind, layout == "single") for name, kind in kinds.items()}
    inputs = {"tgt": draw(TARGET), "memory": draw(SOURCE)}
    against_torch(ours, theirs, inputs, {**masks, **call}, dtype=dtype, grad=mode == "train")


def test_a_query_that_sees_no_key(randomised) -> None:
    """By design: attention 0 and gradient 0, never NaN."""
    layer = randomised(TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True))
    tgt, memory = torch.randn(2, TARGET, WIDTH, requires_grad=True), torch.randn(2, SOURCE, WIDTH, requires_grad=True)
    hidden = torch.zeros(2, SOURCE, dtype=torch.bool)
    hidden[1] = True
    out = layer(tgt, memory, memory_key_padding_mask=hidden)
    gradients = torch.autograd.grad(out.square().sum(), [tgt, memory, *layer.parameters()])
    assert out.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[1][1] == 0).all() and (gradients[1][0] != 0).any()


@pytest.mark.parametrize("norm_first", [True, False])
def test_dropout_is_drawn_at_every_site_and_only_in_training(norm_first: bool) -> None:
    tgt, memory = torch.randn(2, TARGET, WIDTH), torch.randn(2, SOURCE, WIDTH)
    layer = TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=norm_first)
    plain = layer(tgt, memory)
    for site in ("self_attn", "multihead_attn", "dropout", "dropout1", "dropout2", "dropout3"):
        child = getattr(layer, site)
        name = "dropout" if isinstance(child, nn.MultiheadAttention) else "p"
        setattr(child, name, 0.5)
        assert not torch.equal(layer(tgt, memory), plain), site
        layer.eval()
        torch.testing.assert_close(layer(tgt, memory), plain)
        layer.train()
        setattr(child, name, 0.0)


def test_constructor_state_and_repr_are_torchs() -> None:
    assert inspect.signature(TransformerDecoderLayer) == inspect.signature(nn.TransformerDecoderLayer)
    made = []
    for layer_class in (TransformerDecoderLayer, nn.TransformerDecoderLayer):
        torch.manual_seed(0)
        made.append(layer_class(WIDTH, HEADS, HIDDEN, batch_first=True))
    ours, theirs = made
    assert repr(ours) == repr(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    theirs.load_state_dict(ours.state_dict())
    stack = nn.TransformerDecoder(ours, 2)
    assert type(stack.layers[1].multihead_attn) is MultiheadAttention


@pytest.mark.parametrize("change", ["hooked linear2", "replaced norm3", "hooked dropout2", "hooked multihead_attn"])
def test_children_that_are_not_plain_are_called(change: str) -> None:
    theirs = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True)
    ours = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    report = swap(ours)
    verb, name = change.split()
    for layer in (ours, theirs):
        if verb == "replaced":
            setattr(layer, name, nn.Identity())
        else:
            getattr(layer, name).register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    tgt, memory = torch.randn(2, TARGET, WIDTH), torch.randn(2, SOURCE, WIDTH)
    with report.counting():
        torch.testing.assert_close(ours(tgt, memory), theirs(tgt, memory), atol=1e-5, rtol=1e-5)
    assert bool(report.rows[0].fallbacks) == (name != "multihead_attn")
