"""Layers that normalise first, of CLIP, SigLIP and ViT: one call of the operator, or their children's."""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from fastattn.errors import NotSupported  # noqa: E402
from fastattn.swap import swap  # noqa: E402
from fastattn.swap.recipes import recipe_for  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "vocab_size": 64,
    "max_position_embeddings": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXT, IMAGES = "CLIPTextModel", "ViTModel"
MODELS = [TEXT, "CLIPVisionModel", "SiglipTextModel", "SiglipVisionModel", IMAGES, "DeiTModel"]


def build(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**SIZES, **options)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def inputs(model: nn.Module) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    if model.main_input_name != "input_ids":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=draw)}
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(3, 64, (3, 9), generator=draw), "attention_mask": mask}


def run(model: nn.Module, **more: object) -> Tensor:
    given = inputs(model)
    with torch.no_grad():
        states = model(**given, **more).last_hidden_state
    return states[given["attention_mask"].bool()] if "attention_mask" in given else states


def layers(model: nn.Module) -> list[nn.Module]:
    return list(model.layers if hasattr(model, "layers") else model.encoder.layers)


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_is_one_call_that_counts_for_its_children(eager, name, one_calls) -> None:
    model = build(name)
    expected, original = run(eager(model)), run(model)
    report = swap(model)
    with report.counting():
        found = run(model)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert len(one_calls) == 2
    rows = [row for row in report.rows if ".layers." in f".{row.path}" and row.action == "swapped"]
    assert sum(row.kernel == "encoder_layer" for row in rows) == 2
    assert all(row.calls == 1 and not row.fallbacks for row in rows)
    report.undo()
    assert torch.equal(run(model), original)


@pytest.mark.parametrize(
    ("file", "layer"),
    [
        ("altclip", "AltCLIPEncoderLayer"),
        ("clipseg", "CLIPSegEncoderLayer"),
        ("idefics2", "Idefics2EncoderLayer"),
        ("smolvlm", "SmolVLMEncoderLayer"),
        ("siglip2", "Siglip2EncoderLayer"),
        ("vit_mae", "ViTMAELayer"),
    ],
)
def test_copies_whose_eager_attention_may_be_another_one(file, layer) -> None:
    module = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    recipe = recipe_for(getattr(module, layer))
    assert recipe is not None
    assert recipe.kernels["attention"] == "encoder_layer"
    assert recipe.swapped.fastattn_attentions


_IN_INFERENCE = ["autocast", "attentions", "other_attention", "float_mask", "replaced_mlp", "hook", "lora"]


@pytest.mark.parametrize("situation", ["training", "gradients", *_IN_INFERENCE])
def test_where_the_children_are_called_as_expected(eager, situation, one_calls) -> None:
    model = build(TEXT)
    twin = eager(model)
    swap(model)
    if situation == "training":
        for each in (model, twin):
            each.train()
            each.config.attention_dropout = 0.0
        with torch.enable_grad():
            found, expected = (each(**inputs(each)).last_hidden_state for each in (model, twin))
            found.sum().backward()
            expected.sum().backward()
        for (path, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            if other.grad is not None:
                torch.testing.assert_close(parameter.grad, other.grad, atol=1e-3, rtol=1e-3, msg=path)
    elif situation == "gradients":
        given = inputs(model)
        found, expected = (each(**given).last_hidden_state for each in (model, twin))
    elif situation == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = run(model), run(twin)
        assert found.dtype is expected.dtype
        torch.testing.assert_close(found, expected, atol=0.3, rtol=0.1)
        assert not one_calls
        return
    elif situation == "attentions":
        with torch.no_grad():
            found = model(**inputs(model), output_attentions=True).last_hidden_state
            expected = twin(**inputs(twin)).last_hidden_state
    elif situation == "other_attention":
        model.set_attn_implementation("sdpa")
        found, expected = run(model), run(twin)
    elif situation == "float_mask":
        x, mask = torch.randn(2, 9, 32), torch.zeros(2, 1, 9, 9).masked_fill(torch.rand(2, 1, 9, 9) < 0.3, -1e9)
        with torch.no_grad():
            found, expected = (layers(each)[0](x, mask) for each in (model, twin))
    elif situation == "replaced_mlp":
        for each in (model, twin):
            layers(each)[0].mlp = nn.Identity()
            layers(each)[1].mlp = nn.Identity()
        found, expected = run(model), run(twin)
    elif situation == "hook":
        for each in (model, twin):
            for layer in layers(each):
                layer.self_attn.q_proj.register_forward_hook(lambda module, args, out: 2 * out)
        found, expected = run(model), run(twin)
    else:
        peft = pytest.importorskip("peft")
        for each in (model, twin):
            torch.manual_seed(3)
            options = peft.LoraConfig(target_modules=["q_proj", "fc1"], init_lora_weights=False)
            peft.inject_adapter_in_model(options, each)
        found, expected = run(model), run(twin)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not one_calls


def test_a_dropout_in_training_calls_the_children(one_calls) -> None:
    model = build(IMAGES, hidden_dropout_prob=0.5)
    swap(model)
    model.train()
    torch.manual_seed(0)
    first = run(model)
    assert not one_calls
    assert not torch.equal(first, run(model))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert torch.equal(run(model), run(model.eval()))
    assert len(one_calls) == 4


@pytest.mark.parametrize("part", ["hidden", "attention", "mlp"])
def test_a_dropout_alone_in_training_is_active(part, one_calls) -> None:
    rate = 0.5 if part == "attention" else 0.0
    model = build(IMAGES, attention_probs_dropout_prob=rate, hidden_dropout_prob=0.5 if part == "hidden" else 0.0)
    calls: list[object] = []
    for layer in layers(model):
        if part == "mlp":
            last = nn.Dropout(0.5)
            layer.mlp = nn.Sequential(layer.mlp.fc1, nn.GELU(), layer.mlp.fc2, last)
            last.register_forward_hook(lambda *args: calls.append(args))
    swap(model)
    for layer in layers(model):
        child = {"hidden": layer.dropout, "attention": layer.attention, "mlp": layer.mlp}[part]
        (child[3] if part == "mlp" else child).training = True
    torch.manual_seed(0)
    assert not torch.equal(run(model), run(model))
    assert not one_calls
    assert len(calls) == (4 if part == "mlp" else 0)


def test_is_causal_is_handed_on_where_the_attention_reads_it(one_calls) -> None:
    x = torch.randn(2, 9, 32)
    for name, reads in ((TEXT, True), ("SiglipTextModel", False)):
        model = build(name)
        twin = copy.deepcopy(model)
        twin.set_attn_implementation("sdpa")
        swap(model)
        outs = {}
        with torch.no_grad():
            for causal in (True, False):
                outs[causal] = layers(model)[0](x, None, is_causal=causal)
                expected = layers(twin)[0](x, None, **({"is_causal": causal} if reads else {}))
                torch.testing.assert_close(outs[causal], expected, atol=2e-5, rtol=1e-5)
        assert torch.equal(outs[True], outs[False]) is not reads
    assert len(one_calls) == 4


@pytest.mark.parametrize("name", [TEXT, IMAGES])
def test_compiles_without_a_graph_break(eager, name) -> None:
    model = build(name)
    expected = run(eager(model))
    swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), expected, atol=2e-5, rtol=1e-5)


class FirstOutput(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> Tensor:
        return self.model(*args)[0]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace.:DeprecationWarning")
@pytest.mark.parametrize("with_gradients", (True, False))
@pytest.mark.parametrize("name", (TEXT, IMAGES))
def test_a_trace_has_gradients_however_it_was_recorded(name, with_gradients) -> None:
    model = build(name)
    given, weight = tuple(inputs(model).values()), layers(model)[0].mlp.fc1.weight
    expected = model(*given)[0]
    (gradient,) = torch.autograd.grad(expected.sin().sum(), weight)
    swap(model)
    with torch.set_grad_enabled(with_gradients):
        traced = torch.jit.trace(FirstOutput(model), given)
    found = traced(*given)
    seen = given[1].bool() if len(given) > 1 else ...
    torch.testing.assert_close(found[seen], expected[seen], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found.sin().sum(), weight)[0], gradient, atol=1e-3, rtol=1e-3)


def test_half_precision(one_calls) -> None:
    model = build(IMAGES)
    expected = run(model)
    model.bfloat16()
    swap(model)
    with torch.no_grad():
        found = model(inputs(model)["pixel_values"].bfloat16()).last_hidden_state
    torch.testing.assert_close(found.float(), expected, atol=0.15, rtol=0.1)
    assert len(one_calls) == 2


def test_a_swapped_model_is_pickled_and_copied(one_calls) -> None:
    model = build(IMAGES)
    swap(model)
    expected = run(model)
    assert torch.equal(run(pickle.loads(pickle.dumps(model))), expected)
    assert torch.equal(run(copy.deepcopy(model)), expected)
    assert len(one_calls) == 6


def test_an_attention_whose_forward_another_library_replaced_is_called(one_calls, monkeypatch) -> None:
    from transformers.models.vit.modeling_vit import ViTAttention

    model = build(IMAGES)
    swap(model)
    real = ViTAttention.forward

    def doubled(self: nn.Module, *args: object, **kwargs: object) -> tuple[Tensor, object]:
        out, weights = real(self, *args, **kwargs)
        return 2 * out, weights

    monkeypatch.setattr(ViTAttention, "forward", doubled)
    twin = build(IMAGES)
    torch.testing.assert_close(run(model), run(twin), atol=5e-5, rtol=1e-4)
    assert not one_calls


@pytest.mark.parametrize("options", [{"strict": True}, {"backend": "cpu"}])
def test_a_hooked_projection_is_no_fallback(options, one_calls) -> None:
    model = build(TEXT)
    swap(model, **options)
    expected, seen = run(model), []
    layers(model)[1].self_attn.q_proj.register_forward_hook(lambda *args: seen.append(args))
    torch.testing.assert_close(run(model), expected, atol=2e-5, rtol=1e-5)
    assert (len(seen), len(one_calls)) == (1, 3)


def test_a_part_swapped_for_another_backend_keeps_it(one_calls) -> None:
    model = build(IMAGES)
    swap(model.layers[0].attention, backend="reference")
    swap(model)
    run(model)
    assert len(one_calls) == 1


def test_a_part_turned_off_or_a_strict_swap(one_calls) -> None:
    for part in ("attention", "norms", "ffns", "linears"):
        model = build(IMAGES)
        expected = run(model)
        report = swap(model, **{part: False})
        assert not any(row.kernel == "encoder_layer" for row in report.rows)
        torch.testing.assert_close(run(model), expected, atol=2e-5, rtol=1e-5)
    assert not one_calls
    model = build(IMAGES)
    swap(model, strict=True)
    run(model)
    layers(model)[0].mlp.fc1.register_forward_hook(lambda module, args, out: None)
    with pytest.raises(NotSupported, match="fc1 has hooks"):
        run(model)
