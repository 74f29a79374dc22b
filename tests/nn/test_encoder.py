"""TransformerEncoderLayer and TransformerEncoder against torch.nn's over their argument space.

Outputs, and in training every gradient, by the rule of fastattn.parity. One difference is by design: a query that sees
no key (test_a_query_that_sees_no_key). Where torch's own fast path and slow path disagree, ours is the slow one's
answer: the fast path takes every finite float mask for one that hides, and nn.GELU("tanh") for the exact one.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastattn
from fastattn import swap
from fastattn.nn import TransformerEncoder, TransformerEncoderLayer
from fastattn.nn.counting import Tally, start, stop

LAYER_MODES = [(dtype, mode) for dtype in (torch.float32, torch.bfloat16) for mode in ("train", "eval")]
ENCODER_MODES = [
    *((torch.float32, mode) for mode in ("train", "eval", "eval with gradients")),
    (torch.bfloat16, "eval"),
]
RELUS = ("relu", F.relu)
BATCH, LENGTH, WIDTH, HEADS, HIDDEN = 3, 9, 24, 4, 40
NEG_INF = float("-inf")


@dataclass(frozen=True)
class Case:
    """layout: "batch" (B, S, E), "seq" (S, B, E) or "single" (S, E); mask and padding: which masks, "" for none."""

    layout: str = "batch"
    mask: str = ""
    padding: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [self.layout, self.mask, self.padding and f"padding:{self.padding}"]
        words += [f"{k}={getattr(v, '__name__', v)}" for k, v in {**self.options, **self.call}.items()]
        return "-".join(filter(None, words))

    @property
    def torch_fast_path(self) -> bool:
        """False where torch's fast path would not compute what its slow path does."""
        activation = self.options.get("activation")
        tanh = isinstance(activation, nn.GELU) and activation.approximate == "tanh"
        return not tanh and "random" not in self.mask + self.padding

    def inputs(self) -> Tensor:
        shape = {"batch": (BATCH, LENGTH), "seq": (LENGTH, BATCH), "single": (LENGTH,)}[self.layout]
        return torch.randn(*shape, WIDTH)

    def masks(self) -> dict[str, Any]:
        batch = 1 if self.layout == "single" else BATCH
        return {
            "src_mask": attention_mask(self.mask, batch),
            "src_key_padding_mask": padding_mask(self.padding, batch, self.layout == "single"),
            **self.call,
        }


def attention_mask(kind: str, batch: int) -> Tensor | None:
    if not kind:
        return None
    if kind.startswith("causal"):
        later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        return later if kind == "causal" else torch.zeros(later.shape).masked_fill(later, NEG_INF)
    shape = (batch * HEADS, LENGTH, LENGTH) if kind.endswith("3") else (LENGTH, LENGTH)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    if kind.startswith("bool"):
        return hidden
    return (torch.randn(shape) if kind.startswith("random") else torch.zeros(shape)).masked_fill(hidden, NEG_INF)


def padding_mask(kind: str, batch: int, single: bool) -> Tensor | None:
    if not kind:
        return None
    hidden = torch.zeros(batch, LENGTH, dtype=torch.bool)
    if "scattered" in kind:
        hidden[0, 2] = hidden[-1, 4:6] = True
    elif "none" not in kind:
        hidden[0, LENGTH - 4 :] = True
        hidden[-1, LENGTH - 1 :] = True
    mask = hidden
    if kind.startswith("float"):
        mask = torch.zeros(hidden.shape).masked_fill(hidden, NEG_INF)
    elif kind.startswith("random"):
        mask = torch.randn(hidden.shape).masked_fill(hidden, NEG_INF)
    return mask.squeeze(0) if single else mask


def layer_table() -> Iterator[Case]:
    masks = ("", "bool2", "bool3", "float2", "random3", "causal")
    paddings = ("", "bool", "bool scattered", "float", "random")
    for mask, padding in itertools.product(masks, paddings):
        yield Case("batch", mask, padding, {"activation": "gelu"})
    activations = ("relu", F.relu, F.gelu, torch.tanh, F.silu, nn.GELU(), nn.GELU("tanh"))
    for activation, norm_first in itertools.product(activations, (True, False)):
        yield Case("batch", "", "bool", {"activation": activation, "norm_first": norm_first})
    for layout, norm_first, bias in itertools.product(("batch", "seq", "single"), (True, False), (True, False)):
        options = {"norm_first": norm_first, "bias": bias, "layer_norm_eps": 0.1, "activation": F.gelu}
        yield Case(layout, "", "", options)
        yield Case(layout, "bool2", "bool", options)
    for layout, mask in itertools.product(("batch", "seq", "single"), ("causal", "causal float")):
        yield Case(layout, mask, "", {"activation": "gelu"}, {"is_causal": True})
    yield Case("batch", "causal", "bool", {"activation": "gelu"}, {"is_causal": True})
    yield Case("batch", "", "", {"nhead": 3, "activation": "gelu"})


def away_from_the_kink(linear1: nn.Linear) -> None:
    """Rounding alone decides the derivative of a relu at 0: every hidden feature is put clearly on one side of it."""
    with torch.no_grad():
        linear1.bias.copy_(torch.tensor([12.0, -12.0]).repeat(HIDDEN // 2))


@pytest.mark.parametrize(("dtype", "mode"), LAYER_MODES, ids=str)
@pytest.mark.parametrize("case", list(layer_table()), ids=str)
def test_layer(case: Case, dtype: torch.dtype, mode: str, against_torch, randomised) -> None:
    options = {"nhead": HEADS, "dim_feedforward": HIDDEN, "batch_first": case.layout == "batch", **case.options}
    if mode == "train":
        options["dropout"] = 0.0
    ours = randomised(TransformerEncoderLayer(WIDTH, **options)).train(mode == "train")
    theirs = nn.TransformerEncoderLayer(WIDTH, **options).train(mode == "train")
    if case.options.get("activation") in RELUS:
        away_from_the_kink(ours.linear1)
    inputs, masks = {"src": case.inputs()}, case.masks()
    against_torch(ours, theirs, inputs, masks, dtype=dtype, grad=mode != "eval", torch_fast_path=case.torch_fast_path)


def encoder_table() -> Iterator[Case]:
    for padding, mask in itertools.product(
        ("", "bool", "bool scattered", "bool none", "float", "random"), ("", "bool2")
    ):
        yield Case("batch", mask, padding)
    for padding in ("bool", "bool scattered"):
        yield Case("batch", "", padding, {"mask_check": False})
        yield Case("batch", "", padding, {"enable_nested_tensor": False})
        yield Case("batch", "", padding, {"norm": True})
        yield Case("batch", "", padding, {"norm_first": True})
        yield Case("batch", "", padding, {"bias": False})
        yield Case("batch", "", padding, {"activation": F.silu})
        yield Case("seq", "", padding)
        yield Case("single", "", padding)
    for is_causal, mask in itertools.product((None, True, False), ("causal", "causal float")):
        yield Case("batch", mask, "", {}, {"is_causal": is_causal})
        yield Case("seq", mask, "bool", {}, {"is_causal": is_causal})


@pytest.mark.parametrize(("dtype", "mode"), ENCODER_MODES, ids=str)
@pytest.mark.parametrize("case", list(encoder_table()), ids=str)
def test_encoder(case: Case, dtype: torch.dtype, mode: str, against_torch, randomised) -> None:
    """Three layers; padded rows of the output are judged too, which torch sets to 0 or not by conditions of its own.

    Gradients in float32: in bfloat16 the errors of torch's own, through three layers, are no yardstick, their size is a
    matter of luck. Those of a single layer are judged above.
    """
    options = {"batch_first": case.layout == "batch", "activation": "gelu", **case.options}
    stack = {name: options.pop(name) for name in ("enable_nested_tensor", "mask_check") if name in options}
    norm = options.pop("norm", False)
    dropout = 0.0 if mode == "train" else 0.1

    def build(layer_class: type[nn.Module], encoder_class: type[nn.Module]) -> nn.Module:
        layer = layer_class(WIDTH, HEADS, HIDDEN, dropout=dropout, **options)
        return encoder_class(layer, 3, norm=nn.LayerNorm(WIDTH) if norm else None, **stack).train(mode == "train")

    ours = randomised(build(TransformerEncoderLayer, TransformerEncoder))
    theirs = build(nn.TransformerEncoderLayer, nn.TransformerEncoder)
    masks = case.masks()
    masks["mask"] = masks.pop("src_mask")
    fast = case.torch_fast_path
    found = against_torch(
        ours, theirs, {"src": case.inputs()}, masks, dtype=dtype, grad=mode != "eval", torch_fast_path=fast
    )
    if mode == "eval" and case == Case("batch", "", "bool"):
        assert (found["out"][masks["src_key_padding_mask"]] == 0).all()


@pytest.mark.parametrize("kind", ["layer", "encoder"])
def test_a_query_that_sees_no_key(kind: str, randomised) -> None:
    """By design: attention 0 and gradient 0, never NaN, in every mode. torch gives NaN in some, 0 in others."""
    layer = TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True)
    module = randomised(layer if kind == "layer" else TransformerEncoder(layer, 2))
    x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    mask[3] = True
    trained = module(x, mask)
    assert trained.isfinite().all()
    gradients = torch.autograd.grad(trained.square().sum(), [x, *module.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(module(x, mask), trained, atol=1e-5, rtol=1e-5)


def test_wholly_padded_sequences_are_zero(randomised) -> None:
    module = randomised(TransformerEncoder(TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True), 2)).eval()
    padding = torch.tensor([[False] * LENGTH, [True] * LENGTH])
    with torch.no_grad():
        out = module(torch.randn(2, LENGTH, WIDTH), src_key_padding_mask=padding)
    assert (out[1] == 0).all() and (out[0] != 0).any() and out.isfinite().all()


@pytest.mark.parametrize("norm_first", [True, False])
def test_nested_tensors(norm_first: bool, randomised) -> None:
    """As torch's fast path takes them: in inference, without masks; the answer is nested."""
    layer = randomised(TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, norm_first=norm_first)).eval()
    theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, norm_first=norm_first).eval()
    theirs.load_state_dict(layer.state_dict())
    nested = torch.nested.nested_tensor([torch.randn(length, WIDTH) for length in (4, LENGTH, 1)])
    with torch.no_grad():
        expected = theirs(nested)
        tallies = {id(layer): Tally()}
        start(tallies)
        found = layer(nested)
        stop(tallies)
        assert not tallies[id(layer)].fallbacks
        stacked = TransformerEncoder(layer, 1)(nested)
    assert found.is_nested and found._nested_tensor_size().equal(nested._nested_tensor_size())
    for a, b, c in zip(found.unbind(), stacked.unbind(), expected.unbind(), strict=True):
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(b, c, atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="NestedTensor"):  # torch's own error, outside of inference
        layer.train()(nested)


def test_only_rows_that_are_not_padding_are_computed() -> None:
    """What padding holds does not reach the other rows, NaN included."""
    module = TransformerEncoder(TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True), 2).eval()
    padding = torch.tensor([[False] * 5 + [True] * 4])
    x = torch.randn(1, LENGTH, WIDTH)
    poisoned = x.masked_fill(padding[..., None], float("nan"))
    with torch.no_grad():
        found = module(poisoned, src_key_padding_mask=padding)
        assert torch.equal(found, module(x, src_key_padding_mask=padding))


def test_the_hint_without_a_mask() -> None:
    """As torch: an error in training, without effect in inference."""
    layer = TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        layer(x, is_causal=True)
    layer.eval()
    with torch.no_grad():
        assert torch.equal(layer(x, is_causal=True), layer(x))


def test_wrong_masks_raise_torchs_errors() -> None:
    encoder = TransformerEncoder(TransformerEncoderLayer(WIDTH, HEADS, HIDDEN), 1)
    with pytest.raises(AssertionError, match="only bool and floating types of mask"):
        encoder(torch.randn(LENGTH, BATCH, WIDTH), mask=torch.zeros(LENGTH, LENGTH, dtype=torch.uint8))


DROPOUTS = ("self_attn", "dropout1", "dropout", "dropout2")


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("site", DROPOUTS)
def test_dropout_sites(site: str, norm_first: bool) -> None:
    """Each rate works at its own place and only in training: with the others at 0 the mean over many draws is the
    output without dropout, where what follows the site is linear; and what does not is random all the same."""
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    x = torch.randn(2, 5, 8)
    plain = layer(x)
    child = getattr(layer, site)
    if site == "self_attn":
        child.dropout = 0.5
    else:
        child.p = 0.5
    assert not torch.equal(layer(x), plain) and not torch.equal(layer(x), layer(x))
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain, atol=1e-5, rtol=1e-5)
    if norm_first and site in ("dropout", "dropout2"):
        layer.train()
        with torch.no_grad():
            draws = torch.stack([layer(x) for _ in range(400)])
        mean, spread = draws.mean(dim=0), draws.std(dim=0)
        assert ((mean - plain).abs() <= 5 * spread / len(draws) ** 0.5 + 1e-5).all()


class OddNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "hooked linear1": lambda m: m.linear1.register_forward_hook(lambda module, args, out: 2 * out),
    "hooked norm1": lambda m: m.norm1.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "hooked dropout": lambda m: m.dropout.register_forward_hook(lambda module, args, out: out + 1),
    "hooked attention": lambda m: m.self_attn.register_forward_hook(lambda module, args, out: (out[0] * 2, out[1])),
    "replaced norm2": lambda m: setattr(m, "norm2", OddNorm(WIDTH)),
    "replaced linear2": lambda m: setattr(m, "linear2", nn.Sequential(m.linear2, nn.Tanh())),
    "pruned linear1": lambda m: prune.l1_unstructured(m.linear1, "weight", amount=0.5),
    "weight norm": lambda m: parametrizations.weight_norm(m.linear2),
    "hooked activation": lambda m: m.activation.register_forward_hook(lambda module, args, out: out + 1),
    "dropout of one": lambda m: setattr(m.dropout1, "p", 1.0),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_children_that_are_not_plain_are_called(change: str, norm_first: bool, training: bool) -> None:
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first, "activation": nn.ReLU()}
    theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, **options).train(training)
    ours = copy.deepcopy(theirs)
    report = swap(ours)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    for module in (ours, theirs):
        CHANGES[change](module)
    with torch.no_grad(), report.counting():
        found = ours(x)
        theirs.register_forward_hook(lambda *_: None)  # keeps torch off its fast path, which calls no child
        torch.testing.assert_close(found, theirs(x), atol=1e-5, rtol=1e-5)
    fallbacks = report.rows[0].fallbacks
    assert bool(fallbacks) == (change != "hooked attention")


def test_constructor_state_and_repr_are_torchs() -> None:
    for ours, theirs in (
        (TransformerEncoderLayer, nn.TransformerEncoderLayer),
        (TransformerEncoder, nn.TransformerEncoder),
    ):
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert inspect.signature(ours.forward).parameters.keys() == inspect.signature(theirs.forward).parameters.keys()
    made = []
    for layer_class, encoder_class in (
        (TransformerEncoderLayer, TransformerEncoder),
        (nn.TransformerEncoderLayer, nn.TransformerEncoder),
    ):
        torch.manual_seed(0)
        made.append(encoder_class(layer_class(WIDTH, HEADS, HIDDEN, batch_first=True), 2, nn.LayerNorm(WIDTH)))
    ours, theirs = made
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert all(vars(ours)[name] == value for name, value in vars(theirs).items() if isinstance(value, (int, str)))
    assert type(ours.layers[1].self_attn) is fastattn.nn.MultiheadAttention
    theirs.load_state_dict(ours.state_dict())


def test_inside_torchs_encoder_and_around_torchs_layers(randomised) -> None:
    """Either half alone: ours in nn.TransformerEncoder gets nested tensors, torch's layers in ours are called."""
    options = {"batch_first": True, "dropout": 0.0}
    theirs = randomised(nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, **options), 2)).eval()
    x, padding = torch.randn(BATCH, LENGTH, WIDTH), padding_mask("bool", BATCH, False)
    for mixed in (
        nn.TransformerEncoder(TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, **options), 2),
        TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, **options), 2),
    ):
        mixed.load_state_dict(theirs.state_dict())
        mixed.eval()
        with torch.no_grad():
            expected = theirs(x, src_key_padding_mask=padding)
            torch.testing.assert_close(mixed(x, src_key_padding_mask=padding), expected, atol=1e-5, rtol=1e-5)


def test_float64_and_other_inputs_run_torchs_code() -> None:
    layer = TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, dtype=torch.float64)
    theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, dtype=torch.float64)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(LENGTH, BATCH, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(layer(x), theirs(x))
    assert layer(torch.empty(0, BATCH, WIDTH, dtype=torch.float64)).shape == (0, BATCH, WIDTH)


def test_training_refuses_is_causal_without_a_mask_in_inference_mode_too() -> None:
    for package in (nn, fastattn.nn):
        layer = package.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        with torch.inference_mode(), pytest.raises(RuntimeError, match="is_causal"):
            layer(torch.randn(2, 3, 8), is_causal=True)
