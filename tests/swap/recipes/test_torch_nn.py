"""nn.LayerNorm, nn.RMSNorm and nn.MultiheadAttention, swapped, against torch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastattn
from fastattn.swap import NotSwapped, plan, swap

SHAPES = {"vector": (16,), "odd": (7,), "two dims": (3, 5), "one": (1,)}


def make(kind: str, shape: tuple[int, ...], **options: object) -> tuple[nn.Module, nn.Module]:
    """The original and its swapped twin, with weights that are not ones and zeros."""
    torch.manual_seed(0)
    original = (nn.LayerNorm if kind == "layer" else nn.RMSNorm)(shape, **options)
    for parameter in original.parameters():
        nn.init.normal_(parameter)
    twin = copy.deepcopy(original)
    swap(twin)
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


# ---- MultiheadAttention; its numbers: tests/nn/test_attention.py -----------------------------------------------------


class Classifier(nn.Module):
    """Cross- and self-attention, one module at two paths, with the calls that models make."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 4, dropout=0.1, kdim=12, vdim=12, batch_first=True)
        self.again = self.attend
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        x = x + self.attend(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        x = x + self.cross(x, memory, memory, need_weights=False)[0]
        return self.norm(x + self.again(x, x, x, hidden, False)[0])


@pytest.fixture
def classifier() -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    model = Classifier().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden = torch.zeros(3, 5, dtype=torch.bool)
    hidden[1, 3:] = True
    return model, (torch.randn(3, 5, 16), torch.randn(3, 7, 12), hidden)


def test_attention_is_swapped_counted_and_undone(classifier: tuple[nn.Module, tuple[Tensor, ...]]) -> None:
    model, inputs = classifier
    before, keys = model(*inputs), list(model.state_dict())
    parameters = list(model.parameters())
    report = swap(model, strict=True)
    row = next(row for row in report.rows if row.path == "attend")
    assert (row.kernel, row.reason) == ("attention + linear (q, k, v, out)", "also at again")
    assert type(model.attend).__name__ == "MultiheadAttention" and "fastattn.MultiheadAttention(" in repr(model)
    assert isinstance(model.attend, nn.MultiheadAttention) and list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for training in (True, False):
        with report.counting():
            found = model.train(training)(*inputs)
        assert report.all_called
        assert {row.path: row.calls for row in report.rows} == {"attend": 2, "cross": 1, "norm": 1}
    torch.testing.assert_close(found, before, atol=1e-5, rtol=1e-5)
    report.undo()
    assert type(model.attend) is nn.MultiheadAttention
    assert torch.equal(model(*inputs), before)


@pytest.mark.parametrize("off", ("attention", "linears"))
def test_attention_with_a_part_turned_off(off: str, classifier: tuple[nn.Module, tuple[Tensor, ...]]) -> None:
    model, inputs = classifier
    before = model(*inputs)
    report = swap(model, **{off: False})
    assert {row.path: row.action for row in report.rows if row.path != "norm"} == dict.fromkeys(
        ("attend", "cross"), "left" if off == "attention" else "swapped"
    )
    if off == "linears":
        assert model.attend.fastattn_off == {"linears"}
    with report.counting():
        torch.testing.assert_close(model(*inputs), before, atol=1e-5, rtol=1e-5)
    assert report.all_called
    report.undo()
    assert torch.equal(model(*inputs), before)


def test_attention_turned_off_on_the_module_is_torchs(classifier: tuple[nn.Module, tuple[Tensor, ...]]) -> None:
    model, inputs = classifier
    before = model.attend(inputs[0], inputs[0], inputs[0])
    report = swap(model)
    model.attend.fastattn_off = frozenset({"attention"})
    with report.counting():
        for found, expected in zip(model.attend(inputs[0], inputs[0], inputs[0]), before, strict=True):
            assert torch.equal(found, expected)
    assert not next(row for row in report.rows if row.path == "attend").fallbacks


def test_a_subclass_of_attention_is_left() -> None:
    class MyAttention(nn.MultiheadAttention):
        pass

    (row,) = swap(nn.Sequential(MyAttention(8, 2))).rows
    assert (row.action, row.reason) == (
        "left",
        "only the exact class MultiheadAttention is swapped, this is a subclass of it",
    )


def test_swapped_attention_in_copies_and_in_another_process(
    fresh_process, classifier: tuple[nn.Module, tuple[Tensor, ...]], tmp_path: Path
) -> None:
    model, (x, _, _) = classifier
    swap(model)
    twin = copy.deepcopy(model)
    assert twin.attend.in_proj_weight is not model.attend.in_proj_weight and twin.again is twin.attend
    expected = model.attend(x, x, x, need_weights=False)[0].detach()
    assert torch.equal(twin.attend(x, x, x, need_weights=False)[0], expected)
    torch.save((model.attend, x, expected), tmp_path / "module.pt")
    code = (
        f"import sys; sys.path[:0] = [{str(Path(fastattn.__file__).parents[1])!r}]; import torch; "
        "m, x, y = torch.load('module.pt', weights_only=False); "
        "assert torch.allclose(m(x, x, x, need_weights=False)[0], y, atol=1e-6); print(type(m).__module__)"
    )
    run = fresh_process(code, cwd=tmp_path)
    assert run.stdout.strip() == "fastattn.swap.recipes.torch_nn", run.stderr


def test_swapped_attention_learns_as_torchs_does() -> None:
    """Ten steps of Adam on a causal model with padding, from the same weights: the same losses."""
    losses = []
    x, target = torch.randn(4, 9, 16), torch.randn(4, 9, 16)
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    weights = nn.MultiheadAttention(16, 2, batch_first=True).state_dict()
    for swapped in (False, True):
        model = nn.MultiheadAttention(16, 2, batch_first=True)
        model.load_state_dict(weights)
        if swapped:
            swap(model, strict=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(10):
            output, _ = model(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)
            loss = (output - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[9] < 0.97 * losses[0]
    torch.testing.assert_close(torch.tensor(losses[10:]), torch.tensor(losses[:10]), atol=0, rtol=1e-4)


def test_a_plain_layer_norm_on_a_cpu_is_torchs_where_the_kernel_would_take_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By elements, dtype, instruction set and gradients; a forced backend runs every call."""
    from fastattn.nn import norm

    calls = []
    kernel = norm.layer_norm
    monkeypatch.setattr(norm, "layer_norm", lambda *args, **options: calls.append(1) or kernel(*args, **options))
    monkeypatch.setattr(norm, "_has_avx512", lambda: has_avx512)
    module, x = nn.LayerNorm(16), torch.randn(2**12, 16)
    expected = module(x)
    report = swap(module)
    with report.counting(), torch.no_grad():
        has_avx512 = True
        assert torch.equal(module(x[1:]), expected[1:])
        module(x[1:].bfloat16())
        assert not calls
        for few in (x, x.bfloat16(), x.half()):
            module(few)
        has_avx512 = False
        for few in (x, x.bfloat16(), x.half()):
            module(few)
        assert len(calls) == 3
        with fastattn.use_backend("reference"):
            module(x[:3])
    has_avx512 = True
    module(x)
    assert len(calls) == 4
    module(x.repeat(8, 1))
    assert len(calls) == 5
    assert report.rows[0].calls == 9
    report.undo()
    swap(module, backend="reference")
    with torch.no_grad():
        module(x[:3])
    assert len(calls) == 6


@pytest.mark.parametrize("is_late", [False, True], ids=["before the swap", "after it"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((nn.TransformerEncoderLayer, name) for name in ("_sa_block", "_ff_block")),
        *((nn.TransformerDecoderLayer, name) for name in ("_sa_block", "_mha_block", "_ff_block")),
    ],
)
def test_methods_of_a_layer_that_were_replaced_are_called(kind: type[nn.Module], name: str, is_late: bool) -> None:
    layer, x = kind(16, 2, 32, 0.0, batch_first=True), torch.randn(2, 5, 16)
    given = (x,) if kind is nn.TransformerEncoderLayer else (x, x.flip(1))
    replaced = copy.deepcopy(layer)
    for each in (layer, replaced)[is_late:]:
        setattr(each, name, lambda x, *args, **kwargs: x * 2)
    expected, report = replaced(*given), swap(layer)
    setattr(layer, name, replaced.__dict__[name])
    with report.counting():
        torch.testing.assert_close(layer(*given), expected)
    assert report.rows[0].fallbacks == {f"its {name} was replaced": 1}


def test_a_method_of_a_layer_replaced_on_its_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2)
    x = torch.randn(2, 5, 16)
    report = swap(encoder)
    monkeypatch.setattr(nn.TransformerEncoderLayer, "_ff_block", lambda self, x: x * 2)
    expected = x
    for layer in encoder.layers:
        expected = nn.TransformerEncoderLayer.forward(layer, expected)
    with report.counting():
        torch.testing.assert_close(encoder(x), expected)
    assert [row.fallbacks for row in report.rows if row.class_name == "TransformerEncoderLayer"] == [
        {"its _ff_block was replaced": 1}
    ] * 2


@pytest.mark.parametrize("make", [nn.Identity, lambda: nn.Sequential(nn.Dropout(0.0))], ids=["identity", "sequence"])
def test_dropouts_of_a_layer_may_be_anything(make) -> None:
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), torch.randn(2, 5, 16)
    for name in ("dropout", "dropout1", "dropout2"):
        setattr(layer, name, make())
    expected = layer(x)
    swap(layer)
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_an_eps_that_is_a_tensor_is_torchs_to_read(kind: type[nn.Module]) -> None:
    module, x = kind(64, eps=torch.tensor(1e-5)), torch.randn(2**15, 64)
    expected, report = module(x), swap(module)
    with report.counting():
        assert torch.equal(module(x), expected)
    assert report.rows[0].fallbacks == {"its eps is a Tensor": 1}
