"""Copies of BART's attention that ask no interface: TrOCR, XGLM, MVP, and the decoder of LED."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from fastattn.swap import swap  # noqa: E402
from fastattn.swap.recipe import parameters  # noqa: E402

pytestmark = pytest.mark.skipif(
    "cache" not in parameters(transformers.models.trocr.modeling_trocr.TrOCRAttention.forward),
    reason="before 5.24 the cache has another name, and the attention is left alone",
)

KERNELS = "attention + linear (q, k, v, out)"
TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 2}
BART = {
    **TOKENS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 48,
}
CLASSES = {"trocr": "TrOCRAttention", "xglm": "XGLMAttention", "mvp": "MvpAttention", "led": "LEDDecoderAttention"}
families = pytest.mark.parametrize("family", CLASSES)


def build(family: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module
    if family == "xglm":
        sizes = {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 48}
        model = transformers.XGLMForCausalLM(transformers.XGLMConfig(**{**TOKENS, **sizes, **options}))
    elif family == "mvp":
        model = transformers.MvpForConditionalGeneration(transformers.MvpConfig(**{**BART, **options}))
    elif family == "led":
        windows = {"attention_window": 4, "max_encoder_position_embeddings": 48, "max_decoder_position_embeddings": 48}
        config = transformers.LEDConfig(**{**BART, **windows, **options})
        model = transformers.LEDForConditionalGeneration(config)
    else:
        images = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1}
        encoder = transformers.ViTConfig(**images, num_attention_heads=4, intermediate_size=48)
        decoder = transformers.TrOCRConfig(**{**BART, **options}, is_decoder=True, add_cross_attention=True)
        config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
        config.decoder_start_token_id, config.pad_token_id = 2, 0
        model = transformers.VisionEncoderDecoderModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(family: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (3, 9), generator=draw)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :3] = 0
    if family == "trocr":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=draw), "decoder_input_ids": ids[:, :6]}
    found = {"input_ids": ids, "attention_mask": mask}
    return found if family == "xglm" else {**found, "decoder_input_ids": ids[:, :6]}


def logits(model: nn.Module, given: dict[str, Tensor], **more: object) -> Tensor:
    """Those of tokens that are not padding."""
    with torch.no_grad():
        found: Tensor = model(**given, **more).logits
    return found if "decoder_input_ids" in given else found[given["attention_mask"].bool()]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


def attention_rows(report: object, family: str) -> list[object]:
    return [row for row in report.rows if row.class_name == CLASSES[family]]


@families
def test_the_logits_are_those_of_the_original(family) -> None:
    model, given = build(family), inputs(family)
    original = logits(model, given)
    report = swap(model)
    with report.counting():
        found = logits(model, given)
    assert_close(found, original)
    rows = attention_rows(report, family)
    assert len(rows) == {"xglm": 2, "mvp": 6}.get(family, 4)
    assert all((row.kernel, row.calls, row.fallbacks) == (KERNELS, 1, {}) for row in rows)
    report.undo()
    assert torch.equal(logits(model, given), original)


@families
def test_it_trains_as_the_original(family) -> None:
    model, given = build(family, attention_dropout=0.0), inputs(family)
    twin = copy.deepcopy(model)
    swap(model)
    for each in (model, twin):
        found = each(**given).logits
        (found if family != "xglm" else found[given["attention_mask"].bool()]).square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None, name
            continue
        scale = max(float(other.grad.abs().max()), 0.1)  # a bias of all keys gets rounding
        torch.testing.assert_close(parameter.grad, other.grad, atol=1e-4 * scale, rtol=0, msg=name)


@families
@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_it_generates_what_the_original_generates(family, more) -> None:
    model, given = build(family), inputs(family)
    given.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 8, "do_sample": False, **more}
    expected = model.generate(**given, **options)
    report = swap(model)
    with report.counting():
        found = model.generate(**given, **options)
    assert torch.equal(found, expected)
    assert all(row.calls and not row.fallbacks for row in attention_rows(report, family))


@families
def test_attention_weights_come_from_the_original(family) -> None:
    model, given = build(family), inputs(family)
    with torch.no_grad():
        expected = model(**given, output_attentions=True)
        report = swap(model)
        with report.counting():
            found = model(**given, output_attentions=True)
    names = ["attentions"] if family == "xglm" else ["decoder_attentions", "cross_attentions"]
    for name in names:
        assert len(found[name]) == 2
        for one, other in zip(found[name], expected[name], strict=True):
            assert_close(one, other)
    reason = "the attention weights are asked for (output_attentions=True)"
    assert all(row.fallbacks == {reason: 1} for row in attention_rows(report, family))
    with report.counting():
        logits(model, given)
    assert not any(row.fallbacks for row in attention_rows(report, family))


@families
def test_dropout_is_drawn_in_training_alone(family) -> None:
    model, given = build(family, attention_dropout=0.4, dropout=0.0, activation_dropout=0.0), inputs(family)
    expected = logits(model, given)
    swap(model)
    model.train()
    drops = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drops.append(logits(model, given))
    assert torch.equal(drops[0], drops[1])
    assert not torch.equal(drops[0], drops[2])
    assert_close(logits(model.eval(), given), expected)


def test_prompts_run_the_original() -> None:
    model, given = build("mvp", use_prompt=True, prompt_length=3, prompt_mid_dim=8), inputs("mvp")
    expected = logits(model, given)
    report = swap(model)
    with report.counting():
        found = logits(model, given)
    assert_close(found, expected)
    assert {reason for row in attention_rows(report, "mvp") for reason in row.fallbacks} == {"it has a prompt"}


def test_a_hook_is_heard() -> None:
    model, given = build("xglm"), inputs("xglm")
    twin = copy.deepcopy(model)
    report = swap(model)
    for each in (model, twin):
        each.model.layers[0].self_attn.v_proj.register_forward_hook(lambda module, args, out: 2 * out)
    with report.counting():
        found = logits(model, given)
    assert_close(found, logits(twin, given))
    assert [list(row.fallbacks) for row in attention_rows(report, "xglm")] == [["v_proj has hooks"], []]


@families
def test_saved_and_copied_it_stays_swapped(family) -> None:
    model, given = build(family), inputs(family)
    swap(model)
    expected = logits(model, given)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other, given), expected)


@pytest.mark.parametrize("family", ["xglm", "mvp"])
def test_it_compiles(family) -> None:
    model, given = build(family), inputs(family)
    expected = logits(model, given)
    swap(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(logits(compiled, given, use_cache=False), expected)


def test_compiled_it_gives_attention_weights_too() -> None:
    model, given = build("xglm"), inputs("xglm")
    with torch.no_grad():
        expected = model(**given, use_cache=False, output_attentions=True).attentions
        swap(model)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")
        found = compiled(**given, use_cache=False, output_attentions=True).attentions
    assert len(found) == 2
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
