"""nn.LayerNorm and nn.RMSNorm against torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastattn.swap import NotSwapped, plan, swap

SHAPES = {"vector": (16,), "odd": (7,), "two dims": (3, 5), "one": (1,)}


def make(kind: str, shape: tuple[int, ...], **options: object) -> tuple[nn.Module, nn.Module]:
    """The original and its swapped twin, with weights that are not ones and zeros."""
    torch.manual_seed(0)
    original = (nn.LayerNorm if kind == "layer" else nn.RMSNorm)(shape, **options)
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    twin = copy.deepcopy(original)
    swap(twin, strict=True)
    return original, twin


@pytest.mark.parametrize("kind", ("layer", "rms"))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", (True, False))
def test_equals_torch_forward_and_backward(kind: str, shape: str, affine: bool) -> None:
    original, swapped = make(kind, SHAPES[shape], elementwise_affine=affine)
    results = []
    for module in (original, swapped):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(2, 4, *SHAPES[shape], generator=generator, requires_grad=True)
        y = module(x)
        y.backward(torch.randn(y.shape, generator=generator))
        results.append([y.detach(), x.grad, *(parameter.grad for parameter in module.parameters())])
        assert y.shape == x.shape
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ("layer", "rms"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_input_beside_float32_weights(kind: str, dtype: torch.dtype) -> None:
    original, swapped = make(kind, (32,))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        y = swapped(x)
        expected = original(x.float())
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.02)


def test_no_bias_and_eps() -> None:
    original, swapped = make("layer", (8,), bias=False, eps=0.5)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(3)) * 0.1
    torch.testing.assert_close(swapped(x), original(x))


def test_rms_eps_none_is_the_dtypes_epsilon() -> None:
    original, swapped = make("rms", (8,), eps=None)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(3)) * 1e-4
    torch.testing.assert_close(swapped(x), original(x))


def test_empty_and_non_contiguous_inputs() -> None:
    original, swapped = make("layer", (8,))
    assert swapped(torch.empty(0, 8)).shape == (0, 8)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(4)).T
    torch.testing.assert_close(swapped(x), original(x))


@pytest.mark.parametrize("kind", ("layer", "rms"))
def test_wrong_shape_is_an_error(kind: str) -> None:
    for shape in ((8,), (2, 4)):
        _, swapped = make(kind, shape)
        with pytest.raises((ValueError, RuntimeError)):
            swapped(torch.zeros(3, 4, 2))


def test_pruned_and_parametrised_weights_are_read_as_they_are() -> None:
    for change in (lambda m: prune.l1_unstructured(m, "weight", 0.5), parametrizations.weight_norm):
        original, swapped = make("layer", (8,))
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(5))
        change(original)
        change(swapped)
        torch.testing.assert_close(swapped(x), original(x))


def test_meta_weights_run_the_original_code() -> None:
    _, swapped = make("layer", (8,))
    swapped.to("meta")
    with pytest.warns(UserWarning, match="meta"):
        assert swapped(torch.zeros(2, 8, device="meta")).device.type == "meta"


@pytest.mark.parametrize("training", (True, False))
def test_inside_a_torch_encoder(training: bool) -> None:
    """In eval torch's encoder hands nested tensors to layers that never call their children: encoder, layers and
    attention are swapped, and the norms are part of the layers."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    original = nn.TransformerEncoder(layer, 2).train(training)
    swapped = copy.deepcopy(original)
    report = swap(swapped, strict=True)
    actions = {row.path: row.action for row in report.rows}
    assert actions == {
        "": "swapped",
        **{f"layers.{i}": "swapped" for i in range(2)},
        **{f"layers.{i}.self_attn": "swapped" for i in range(2)},
        **{f"layers.{i}.norm{j}": "fused" for i in range(2) for j in (1, 2)},
    }
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(7))
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[1, 3:] = True
    with torch.set_grad_enabled(training), report.counting():
        found = swapped(x, src_key_padding_mask=hidden)
        expected = original(x, src_key_padding_mask=hidden)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found[hidden] == 0).all() == (not training)
    assert report.all_called


@pytest.mark.parametrize(
    "flags", [{"attention": False}, {"norms": False}, {"ffns": False}, {"linears": False}], ids=str
)
def test_a_torch_encoder_in_parts(flags: dict[str, bool]) -> None:
    torch.manual_seed(0)
    original = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    src, tgt = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    hidden[1, 3:] = True
    swapped = copy.deepcopy(original)
    report = swap(swapped, **flags)
    for training in (True, False):
        for model in (original, swapped):
            model.train(training)
        with torch.set_grad_enabled(training), report.counting():
            found = swapped(src, tgt, src_key_padding_mask=hidden)
            torch.testing.assert_close(found, original(src, tgt, src_key_padding_mask=hidden), atol=1e-5, rtol=1e-5)
        assert report.all_called
    report.undo()
    assert torch.equal(swapped(src, tgt), original(src, tgt))


def test_a_custom_activation_is_called_and_named() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation=torch.tanh, dropout=0.0)
    report = swap(layer)
    assert report.rows[0].reason == "activation is tanh, which has no kernel"
    with report.counting():
        layer(torch.randn(3, 2, 16))
    assert report.rows[0].fallbacks == {"activation is tanh, which has no kernel": 1}
    with pytest.raises(NotSwapped, match="tanh"):
        swap(nn.TransformerEncoderLayer(16, 2, 32, activation=torch.tanh), strict=True)


def test_subclasses_of_the_layers_are_left() -> None:
    class MyLayer(nn.TransformerEncoderLayer):
        pass

    row = plan(MyLayer(16, 2, 32)).rows[0]
    assert (row.action, row.reason) == (
        "left",
        "only the exact class TransformerEncoderLayer is swapped, this is a subclass of it",
    )


def test_compiles_whole() -> None:
    original, swapped = make("layer", (8,))
    torch._dynamo.reset()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(6))
    compiled = torch.compile(swapped, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), original(x))
