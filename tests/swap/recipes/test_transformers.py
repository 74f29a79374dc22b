"""Models of transformers, recognised by what their forwards compute, against their originals."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from transformers.pytorch_utils import Conv1D  # noqa: E402

from fastattn.errors import NotSupported  # noqa: E402
from fastattn.swap import plan, swap  # noqa: E402

VOCABULARY = 64
_SHARED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", _SHARED),
    "llama with biases": ("Llama", {**_SHARED, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "mistral, window": ("Mistral", {**_SHARED, "sliding_window": 4}),
    "qwen2": ("Qwen2", _SHARED),
    "qwen3": ("Qwen3", {**_SHARED, "head_dim": 16}),
    "gemma": ("Gemma", {**_SHARED, "head_dim": 16}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
families = pytest.mark.parametrize("family", _FAMILIES)
gated = pytest.mark.parametrize("family", [name for name in _FAMILIES if name != "gpt2"])


def tiny(family: str, **options: object) -> nn.Module:
    """An eval-mode language model of two layers, every weight drawn."""
    name, settings = _FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None, **{**settings, **options}
    )
    model = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.eval()


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


@families
def test_equals_eager_on_valid_tokens(eager, family, batch, valid_difference) -> None:
    model = tiny(family)
    expected, original, keys = logits(eager(model), batch), logits(model, batch), list(model.state_dict())
    report = swap(model)
    with report.counting():
        found = logits(model, batch)
    assert torch.isfinite(found).all()
    assert valid_difference(found, expected) < 2e-5 * float(expected.abs().max())
    assert report.all_called
    assert not any(row.fallbacks for row in report.rows)
    assert list(model.state_dict()) == keys
    report.undo()
    assert torch.equal(logits(model, batch), original)


@families
def test_generates_what_eager_generates(eager, family) -> None:
    """Prompts padded on the left, then one token at a time over the cache, past the window where there is one."""
    model = tiny(family)
    ids = torch.randint(2, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, :6] = 0, 0
    expected = eager(model).generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    swap(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), expected)


@families
def test_trains_as_the_original(eager, family) -> None:
    settings = {"attention_dropout": 0.0} if family != "gpt2" else dict.fromkeys(("attn_pdrop", "resid_pdrop"), 0.0)
    model = tiny(family, **settings, **({"embd_pdrop": 0.0} if family == "gpt2" else {})).train()
    twin = eager(model)
    swap(model)
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(6))
    for each in (model, twin):
        each(input_ids=ids, labels=ids).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(parameter.grad, other.grad, atol=2e-5 * scale + 1e-8, rtol=0, msg=name)


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_err_as_little_as_the_original(eager, family, dtype, batch, valid_difference) -> None:
    model = tiny(family)
    exact = logits(eager(model), batch)
    half = model.to(dtype)
    bound = 2 * valid_difference(logits(eager(half), batch).float(), exact)
    swap(half)
    assert valid_difference(logits(half, batch).float(), exact) <= bound


@gated
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_norms_of_two_dtypes(family, dtypes) -> None:
    """Input and weight; a float32 weight widens a half input, but Gemma's."""
    model = tiny(family).to(dtypes[1])
    original = copy.deepcopy(model)
    swap(model)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(7)).to(dtypes[0])
    found, expected = (each.model.layers[0].input_layernorm(x) for each in (model, original))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(
        found, expected, atol=0.0, rtol=2**-7 if torch.bfloat16 in (dtypes[0], found.dtype) else 1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compiles_as_one_graph(family, batch) -> None:
    model = tiny(family)
    swap(model)
    expected = logits(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(**batch, use_cache=False).logits
    assert torch.equal(found, expected)


@gated
def test_everything_is_swapped_and_named(family) -> None:
    model = tiny(family)
    names = [type(module).__name__ for module in model.modules()]
    report = swap(model, strict=True)
    kernels = {row.class_name.removeprefix(_FAMILIES[family][0]): row.kernel for row in report.rows}
    assert kernels == {"Attention": "attention", "RMSNorm": "rms_norm", "MLP": "gated_ffn"}
    assert [type(module).__name__ for module in model.modules()] == names
    assert "fastattn.LlamaMLP" in str(model) or family != "llama"


def test_parts_are_swapped_alone(batch) -> None:
    model = tiny("llama")
    assert {row.class_name for row in swap(model, norms=False, ffns=False).rows if row.action == "swapped"} == {
        "LlamaAttention"
    }


def test_the_transposed_linears_of_gpt2_run_in_its_block() -> None:
    model = tiny("gpt2")
    report = swap(model, strict=True)
    assert {row.class_name: row.kernel for row in report.rows} == {
        "LayerNorm": "layer_norm",
        "GPT2Attention": "attention",
        "GPT2MLP": "ffn",
    }


def _hook(linear: nn.Module, monkeypatch: pytest.MonkeyPatch) -> str:
    linear.register_forward_hook(lambda *_: None)
    return "c_fc has hooks"


def _subclass(linear: nn.Module, monkeypatch: pytest.MonkeyPatch) -> str:
    linear.__class__ = type("Conv1D", (Conv1D,), {"__module__": "adapters"})
    return "c_fc is a adapters.Conv1D"


def _replace_forward(linear: nn.Module, monkeypatch: pytest.MonkeyPatch) -> str:
    forward = Conv1D.forward
    monkeypatch.setattr(Conv1D, "forward", lambda self, x: forward(self, x))
    return "c_fc is of a class whose forward was replaced"


def _broadcast_bias(linear: nn.Module, monkeypatch: pytest.MonkeyPatch) -> str:
    linear.bias = nn.Parameter(torch.ones(1))
    return "c_fc has a bias that is broadcast"


@pytest.mark.parametrize("change", [_hook, _subclass, _replace_forward, _broadcast_bias])
def test_changed_transposed_linears_are_called(change, monkeypatch) -> None:
    model = tiny("gpt2")
    block, x = model.transformer.h[0].mlp, torch.randn(2, 5, 32)
    report = swap(model)
    reason = change(block.c_fc, monkeypatch)
    with report.counting(), pytest.warns(UserWarning, match=reason):
        found = block(x)
    row = next(row for row in report.rows if row.path == "transformer.h.0.mlp")
    assert row.fallbacks == {reason: 1}
    report.undo()
    assert torch.equal(found, block(x))


def test_an_activation_without_a_kernel_is_left_with_its_name() -> None:
    rows = swap(tiny("llama", hidden_act="mish")).rows
    reasons = {row.reason for row in rows if row.class_name == "LlamaMLP"}
    assert reasons == {"the activation MishActivation has no kernel"}


class _Adapted(nn.Linear):
    """A stand-in for what an adapter library puts in a linear's place."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1.0


@pytest.mark.parametrize("change", ["adapter", "hook"])
def test_changed_projections_are_called_and_counted(eager, change, batch, valid_difference) -> None:
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    report = swap(model)
    if change == "adapter":
        mlp.up_proj.__class__ = _Adapted
    else:
        mlp.up_proj.register_forward_hook(lambda module, args, output: output + 1.0)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__class__ = vars(type(module)).get("fastattn_original", type(module))
    with report.counting():
        found = logits(model, batch)
    assert valid_difference(found, logits(eager(twin), batch)) < 1e-4
    (row,) = [row for row in report.rows if row.fallbacks]
    assert row.path == "model.layers.0.mlp"
    assert list(row.fallbacks) == [f"up_proj is a {__name__}._Adapted" if change == "adapter" else "up_proj has hooks"]


# ---- encoders, and encoders with decoders ----------------------------------------------------------------------------

_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
_VISION = {key: value for key, value in _ENCODER.items() if key != "vocab_size" and key != "pad_token_id"}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "dropout_rate": 0.0,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
_ENCODERS: dict[str, tuple[str, dict[str, object], set[str]]] = {
    "roberta": ("Roberta", _ENCODER, {"encoder_layer", "layer_norm"}),
    "xlm-roberta": ("XLMRoberta", _ENCODER, {"encoder_layer", "layer_norm"}),
    "electra": ("Electra", {**_ENCODER, "embedding_size": 32}, {"encoder_layer", "layer_norm"}),
    "distilbert": (
        "DistilBert",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": VOCABULARY},
        {"attention", "layer_norm"},
    ),
    "modernbert": ("ModernBert", {**_ENCODER, "local_attention": 4}, {"attention", "layer_norm", "gated_ffn"}),
    "albert": ("Albert", {**_ENCODER, "embedding_size": 32}, {"attention", "layer_norm"}),
    "mpnet": ("MPNet", _ENCODER, {"attention + linear (q, k, v, o)", "linear_act", "layer_norm"}),
    "vit": ("ViT", {**_VISION, "image_size": 16, "patch_size": 4}, {"attention", "layer_norm", "ffn"}),
    "dinov2": ("Dinov2", {**_VISION, "image_size": 16, "patch_size": 4}, {"attention", "layer_norm", "ffn"}),
    "t5": ("T5", _T5, {"attention", "rms_norm", "ffn"}),
    "flan-t5": ("T5", {**_T5, "feed_forward_proj": "gated-gelu"}, {"attention", "rms_norm", "gated_ffn"}),
    "bart": ("Bart", {**_BART, "vocab_size": VOCABULARY}, {"attention", "layer_norm"}),
    "whisper": (
        "Whisper",
        {**_BART, "vocab_size": VOCABULARY, "num_mel_bins": 8, "max_source_positions": 12, "pad_token_id": 0},
        {"attention", "layer_norm"},
    ),
}
encoders = pytest.mark.parametrize("family", _ENCODERS)


def encoder(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """An eval-mode model, every weight drawn, and inputs with padding where it takes any."""
    name, settings, _ = _ENCODERS[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (4, 9), generator=draw)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[1, 5:], mask[2, :3] = 0, 0
    inputs = {
        "pixel_values": {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw)},
        "input_features": {"input_features": torch.randn(2, 8, 24, generator=draw), "decoder_input_ids": ids[:2, :5]},
        "input_ids": {"input_ids": ids, "attention_mask": mask},
    }[model.main_input_name]
    if name in ("T5", "Bart"):
        inputs["decoder_input_ids"] = ids[:, :6]
    return model.eval(), inputs


def states(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The last hidden states, without those of padding."""
    with torch.no_grad():
        found = model(**inputs).last_hidden_state
    mask = inputs.get("attention_mask")
    return found[mask.bool()] if mask is not None and "decoder_input_ids" not in inputs else found


@encoders
def test_an_encoder_equals_eager(eager, family) -> None:
    model, inputs = encoder(family)
    expected, original = states(eager(model), inputs), states(model, inputs)
    report = swap(model)
    with report.counting():
        found = states(model, inputs)
    assert torch.isfinite(found).all()
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())
    swapped = [row for row in report.rows if row.action == "swapped"]
    assert {row.kernel for row in swapped} >= _ENCODERS[family][2]
    assert all(row.calls for row in swapped if "pooler" not in row.path)
    assert not any(row.fallbacks for row in report.rows)
    report.undo()
    assert torch.equal(states(model, inputs), original)


@pytest.mark.parametrize("family", ["roberta", "modernbert", "mpnet", "vit", "flan-t5", "bart"])
def test_an_encoder_trains_as_the_original(eager, family) -> None:
    model, inputs = encoder(family)
    twin = eager(model)
    swap(model)
    mask = inputs.get("attention_mask")
    for each in (model, twin):
        found = each(**inputs).last_hidden_state
        (found if mask is None or "decoder_input_ids" in inputs else found[mask.bool()]).square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None, name
            continue
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(parameter.grad, other.grad, atol=3e-5 * scale + 1e-7, rtol=0, msg=name)


def test_mpnet_forms_attention_weights_where_asked(eager) -> None:
    model, inputs = encoder("mpnet")
    twin = eager(model)
    report = swap(model)
    with torch.no_grad(), report.counting():
        found, expected = (each(**inputs, output_attentions=True).attentions for each in (model, twin))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    reasons = {reason for row in report.rows for reason in row.fallbacks}
    assert reasons == {"the attention weights are asked for (output_attentions=True)"}


_GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 4}


@pytest.mark.parametrize(
    ("name", "more"),
    [("Llama", {}), ("Gemma2", {"head_dim": 8, "sliding_window": 4}), ("GptOss", _GPT_OSS), ("Bert", {})],
)
def test_an_eager_model_forms_attention_weights_where_asked(batch, name, more) -> None:
    torch.manual_seed(0)
    settings = {key: value for key, value in _SHARED.items() if name != "Bert" or key != "num_key_value_heads"}
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, pad_token_id=0, **settings, **more)
    model = getattr(transformers, f"{name}Model")(config).eval()
    model.set_attn_implementation("eager")
    asked = {"output_attentions": True}
    with torch.no_grad():
        expected = model(**batch, **asked).attentions
        report = swap(model)
        with report.counting():
            assert model(**batch).attentions is None
            assert not any(row.fallbacks for row in report.rows)
            found = model(**batch, **asked).attentions
        reasons = {reason for row in report.rows for reason in row.fallbacks}
        assert reasons == {"the attention weights are asked for (output_attentions=True)"}
        seen = batch["attention_mask"].bool()
        for one, other in zip(found, expected, strict=True):
            one, other = one.transpose(1, 2)[seen], other.transpose(1, 2)[seen]
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        report.undo()
        for one, other in zip(model(**batch, **asked).attentions, expected, strict=True):
            assert torch.equal(one, other)
        swap(model, strict=True, ffns=False)
        with pytest.raises(NotSupported, match="output_attentions=True"):
            model(**batch, **asked)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_eager_model_forms_attention_weights_where_its_config_asks(batch, compiled) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, pad_token_id=0, attn_implementation="eager", output_attentions=True, **_SHARED
    )
    model = transformers.LlamaModel(config).eval()
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).attentions
        swap(model)
        found = (torch.compile(model, backend="aot_eager") if compiled else model)(**batch).attentions
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.transpose(1, 2)[seen], other.transpose(1, 2)[seen], atol=1e-5, rtol=1e-4)


def test_a_model_of_sdpa_forms_no_attention_weights(batch) -> None:
    model = tiny("llama")
    swap(model)
    with torch.no_grad():
        assert not any(torch.is_tensor(each) for each in model(**batch, output_attentions=True).attentions or ())


def test_t5_generates_what_eager_generates(eager) -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(**_T5, pad_token_id=0, eos_token_id=None, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.randint(2, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    expected = eager(model).generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    swap(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), expected)


def test_a_half_checkpoint_of_t5_keeps_its_float32_linear(eager) -> None:
    """transformers loads `wo` in float32 beside half weights: the original block runs, and is counted."""
    model, inputs = encoder("flan-t5")
    model.to(torch.bfloat16)
    for name, child in model.named_modules():
        if name.endswith(".wo"):
            child.float()
    expected = states(eager(model), inputs)
    report = swap(model)
    with report.counting():
        found = states(model, inputs)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), atol=0.1 * float(expected.abs().max()), rtol=0)
    assert {reason for row in report.rows for reason in row.fallbacks} == {"wo is float32, not the input's dtype"}


def test_an_attention_function_that_takes_more_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose own attention takes what fastattn's would ignore."""
    from transformers.models.mistral import modeling_mistral

    def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, clock=None, **kwargs):
        raise AssertionError

    monkeypatch.setattr(modeling_mistral, "eager_attention_forward", eager_attention_forward)
    rows = [row for row in plan(tiny("mistral, window")).rows if row.class_name == "MistralAttention"]
    assert {(row.action, row.reason) for row in rows} == {
        ("left", "its attention function takes clock, which fastattn's does not")
    }


@families
def test_a_swapped_model_survives_deepcopy_and_save(family, batch) -> None:
    model = tiny(family)
    swap(model)
    expected = logits(model, batch)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other, batch), expected)
