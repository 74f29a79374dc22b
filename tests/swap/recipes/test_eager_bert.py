"""Copies of BERT's self-attention that ask no interface: Megatron-BERT, RemBERT, TAPAS, RoFormer, VisualBERT, Flava."""

from __future__ import annotations

import copy
import importlib
import io

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from fastattn.swap import swap  # noqa: E402
from fastattn.swap.recipes import recipe_for  # noqa: E402

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, object]] = {
    "MegatronBert": {},
    "RemBert": {},
    "Tapas": {},
    "RoFormer": {"embedding_size": 32},
    "RoFormer, values too": {"embedding_size": 32, "rotary_value": True},
    "VisualBert": {},
    "FlavaText": {},
}
KERNELS = "attention + linear (q, k, v)"
models = pytest.mark.parametrize("name", MODELS)
decoders = pytest.mark.parametrize("name", ["MegatronBert", "RemBert", "RoFormer"])


def build(name: str, model_class: str = "Model", **options: object) -> nn.Module:
    torch.manual_seed(0)
    family = name.split(",")[0]
    config = getattr(transformers, f"{family}Config")(**SIZES, **MODELS[name], **options)
    model: nn.Module = getattr(transformers, family + model_class)(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(2, 64, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[1, 5:], mask[2, :3], mask[3, 4:6] = 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def states(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """Those of tokens that are not padding."""
    with torch.no_grad():
        found: Tensor = model(**given).last_hidden_state
    return found[given["attention_mask"].bool()] if "attention_mask" in given else found


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


def attention_rows(report: object) -> list[object]:
    return [row for row in report.rows if row.class_name.endswith("SelfAttention")]


@models
@pytest.mark.parametrize("padded", [True, False])
def test_the_states_are_those_of_the_original(name, padded) -> None:
    model, given = build(name), inputs()
    if not padded:
        del given["attention_mask"]
    original = states(model, given)
    report = swap(model)
    with report.counting():
        found = states(model, given)
    assert_close(found, original)
    rows = attention_rows(report)
    assert [(row.kernel, row.calls, row.fallbacks) for row in rows] == [(KERNELS, 1, {})] * 2
    report.undo()
    assert torch.equal(states(model, given), original)


@models
def test_it_trains_as_the_original(name) -> None:
    model, given = build(name), inputs()
    twin = copy.deepcopy(model)
    swap(model)
    rows = given["attention_mask"].bool()
    for each in (model, twin):
        each(**given).last_hidden_state[rows].square().sum().backward()
    for (path, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None, path
            continue
        scale = max(float(other.grad.abs().max()), 0.1)  # a bias of all keys gets rounding
        torch.testing.assert_close(parameter.grad, other.grad, atol=5e-5 * scale, rtol=0, msg=path)


@models
def test_attention_weights_come_from_the_original(name) -> None:
    model, given = build(name), inputs()
    with torch.no_grad():
        expected = model(**given, output_attentions=True).attentions
        report = swap(model)
        with report.counting():
            found = model(**given, output_attentions=True).attentions
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    reason = "the attention weights are asked for (output_attentions=True)"
    assert [row.fallbacks for row in attention_rows(report)] == [{reason: 1}] * 2


@models
def test_dropout_is_drawn_in_training_alone(name) -> None:
    model, given = build(name, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0), inputs()
    expected = states(model, given)
    swap(model)
    model.train()
    drops = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drops.append(states(model, given))
    assert torch.equal(drops[0], drops[1])
    assert not torch.equal(drops[0], drops[2])
    assert_close(states(model.eval(), given), expected)


@decoders
def test_a_decoder_with_a_cache_runs_the_original(name) -> None:
    model = build(name, "ForCausalLM", is_decoder=True)
    given = {key: value[:3] for key, value in inputs().items()}
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    twin = copy.deepcopy(model)
    expected = twin.generate(**given, **options)
    report = swap(model)
    with report.counting():
        found = model.generate(**given, **options)
    assert torch.equal(found, expected)
    assert {reason for row in attention_rows(report) for reason in row.fallbacks} <= {"it has a cache"}
    with report.counting(), torch.no_grad():
        found, expected = (each(**given, use_cache=False).logits for each in (model, twin))
    rows = given["attention_mask"].bool()
    assert_close(found[rows], expected[rows])
    assert not any(row.fallbacks for row in attention_rows(report))


@decoders
def test_a_decoder_of_an_encoders_states_runs_the_original(name) -> None:
    model = build(name, is_decoder=True, add_cross_attention=True)
    twin = copy.deepcopy(model)
    given = {**inputs(), "encoder_hidden_states": torch.randn(4, 9, 32), "use_cache": False}
    report = swap(model)
    with report.counting():
        found = states(model, given)
    assert_close(found, states(twin, given))
    reasons = {reason for row in attention_rows(report) for reason in row.fallbacks}
    assert reasons == {"it attends to the states of an encoder"}


def test_a_hook_and_a_copy() -> None:
    model, given = build("RemBert"), inputs()
    twin = copy.deepcopy(model)
    report = swap(model)
    for each in (model, twin):
        each.encoder.layer[0].attention.self.key.register_forward_hook(lambda module, args, out: 2 * out)
    with report.counting():
        found = states(model, given)
    assert_close(found, states(twin, given))
    assert [list(row.fallbacks) for row in attention_rows(report)] == [["key has hooks"], []]


@models
def test_saved_and_copied_it_stays_swapped(name) -> None:
    model, given = build(name), inputs()
    swap(model)
    expected = states(model, given)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(states(other, given), expected)


@models
def test_it_compiles_as_one_graph(name) -> None:
    model, given = build(name), inputs()
    expected = states(model, given)
    swap(model)
    torch.compiler.reset()
    assert_close(states(torch.compile(model, fullgraph=True, backend="aot_eager"), given), expected)


@pytest.mark.parametrize(("file", "kind"), [("vilt", "ViltSelfAttention"), ("flava", "FlavaSelfAttention")])
def test_copies_of_images_and_text(file, kind) -> None:
    module = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    recipe = recipe_for(getattr(module, kind))
    assert recipe is not None
    assert recipe.kernels["attention"] == "attention"
