"""Bloom: ALiBi's biases beside the model's mask, a cache, and a block whose GELU is its own."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from fastattn.errors import NotSupported  # noqa: E402
from fastattn.swap import swap  # noqa: E402

HEADS = 6  # no power of two: ALiBi's slopes come from two series
ATTENTION = "attention + linear (query_key_value, dense)"


def bloom(name: str = "BloomForCausalLM", **options: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {"hidden_size": 48, "n_layer": 2, "n_head": HEADS, "vocab_size": 64, "pad_token_id": 0, **options}
    config = transformers.BloomConfig(**settings, bos_token_id=1, eos_token_id=None)
    model = getattr(transformers, name)(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs(padding: str) -> dict[str, Tensor]:
    ids = torch.randint(2, 64, (3, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 13, dtype=torch.long)
    if padding == "none":
        return {"input_ids": ids}
    if padding in ("left", "both"):
        mask[0, :5] = 0
    if padding in ("right", "both"):
        mask[1, 8:] = 0
    if padding == "middle":
        mask[2, 4:7] = 0
    return {"input_ids": ids, "attention_mask": mask}


paddings = pytest.mark.parametrize("padding", ["none", "left", "right", "both", "middle"])


def logits(model: nn.Module, given: dict[str, Tensor], **more: object) -> Tensor:
    """Those of tokens that are not padding."""
    with torch.no_grad():
        found: Tensor = model(**given, **more).logits
    return found[given["attention_mask"].bool()] if "attention_mask" in given else found


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


@paddings
def test_the_logits_are_those_of_the_original(padding) -> None:
    model, given = bloom(), inputs(padding)
    original = logits(model, given)
    report = swap(model)
    with report.counting():
        found = logits(model, given)
    assert_close(found, original)
    rows = {row.class_name: row for row in report.rows}
    assert (rows["BloomAttention"].kernel, rows["BloomMLP"].kernel) == (ATTENTION, "ffn")
    assert all(row.calls == 1 and not row.fallbacks for row in report.rows if row.class_name.startswith("Bloom"))
    assert not any(row.action == "left" for row in report.rows)
    report.undo()
    assert torch.equal(logits(model, given), original)


@paddings
def test_it_trains_as_the_original(padding) -> None:
    model, given = bloom().train(), inputs(padding)
    twin = copy.deepcopy(model)
    swap(model)
    rows = given.get("attention_mask", torch.ones(3, 13)).bool()
    for each in (model, twin):
        each(**given).logits[rows].square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(parameter.grad, other.grad, atol=5e-5 * scale, rtol=0, msg=name)


@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}])
def test_it_generates_what_the_original_generates(more) -> None:
    model, given = bloom(), inputs("left")
    options = {"max_new_tokens": 10, "do_sample": False, **more}
    expected = model.generate(**given, **options)
    report = swap(model)
    with report.counting():
        found = model.generate(**given, **options)
    assert torch.equal(found, expected)
    assert len({tuple(row) for row in found[:, 13:].tolist()}) > 1  # it does read the prompts
    assert not any(row.fallbacks for row in report.rows)


def test_a_cache_goes_on_where_the_prompt_ends() -> None:
    model, given = bloom(), inputs("left")
    expected = logits(model, given)
    swap(model)
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        first = model(ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
        name = "cache" if "cache" in first else "past_key_values"
        then = model(ids[:, 9:], attention_mask=mask, use_cache=True, **{name: first[name]})
    found = torch.cat([first.logits, then.logits], dim=1)
    assert_close(found[mask.bool()], expected)


def test_dropout_is_drawn_in_training_alone() -> None:
    model, given = bloom(attention_dropout=0.4), inputs("left")
    expected = logits(model, given)
    swap(model)
    model.train()
    drops = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drops.append(logits(model, given))
    assert torch.equal(drops[0], drops[1])
    assert not torch.equal(drops[0], drops[2])
    assert float((drops[0] - expected).abs().max()) > 0.01 * float(expected.abs().max())
    assert_close(logits(model.eval(), given), expected)


def test_hidden_dropout_is_the_originals() -> None:
    """Drawn by torch as before, in the same order: the same numbers."""
    model, given = bloom(hidden_dropout=0.3).train(), inputs("right")
    twin = copy.deepcopy(model)
    swap(model)
    found = []
    for each in (model, twin):
        torch.manual_seed(0)
        found.append(logits(each, given))
    assert_close(*found)


def test_attention_weights_come_from_the_original() -> None:
    model, given = bloom(), inputs("left")
    with torch.no_grad():
        expected = model(**given, output_attentions=True).attentions
        report = swap(model)
        with report.counting():
            found = model(**given, output_attentions=True).attentions
    rows = given["attention_mask"].bool()
    for one, other in zip(found, expected, strict=True):
        assert_close(one.transpose(1, 2)[rows], other.transpose(1, 2)[rows])
    attentions = [row for row in report.rows if row.class_name == "BloomAttention"]
    reason = "the attention weights are asked for (output_attentions=True)"
    assert [row.fallbacks for row in attentions] == [{reason: 1}] * 2
    report.undo()
    swap(model, strict=True)
    with pytest.raises(NotSupported, match="output_attentions=True"):
        model(**given, output_attentions=True)


_REASONS = {
    "hook": "query_key_value has hooks",
    "hook in the block": "gelu_impl has hooks",
    "slices": "the output is computed in slices (slow_but_exact)",
    "wide heads": "the head dim is 288: the kernels take up to 256",
}


@pytest.mark.parametrize("situation", [*_REASONS, "lora"])
def test_what_is_not_plain_runs_as_it_is(situation) -> None:
    options = {"hidden_size": 576, "n_head": 2} if situation == "wide heads" else {}
    model, given = bloom(**options), inputs("left")
    twin = copy.deepcopy(model)
    report = swap(model)
    for each in (model, twin):
        block = each.transformer.h[0]
        if situation == "hook":
            block.self_attention.query_key_value.register_forward_hook(lambda module, args, out: 2 * out)
        elif situation == "hook in the block":
            block.mlp.gelu_impl.register_forward_hook(lambda module, args, out: 2 * out)
        elif situation == "slices":
            for part in (block.self_attention, block.mlp):
                part.pretraining_tp, part.slow_but_exact = 2, True
        elif situation == "lora":
            peft = pytest.importorskip("peft")
            torch.manual_seed(3)
            targets = peft.LoraConfig(target_modules=["query_key_value", "dense_h_to_4h"], init_lora_weights=False)
            peft.inject_adapter_in_model(targets, each)
    with report.counting():
        found = logits(model, given)
    assert_close(found, logits(twin, given), 2e-5)
    reasons = {reason for row in report.rows for reason in row.fallbacks}
    if situation == "lora":
        assert any(reason.startswith("query_key_value is a peft.") for reason in reasons)
        assert any(reason.startswith("dense_h_to_4h is a peft.") for reason in reasons)
    else:
        assert reasons == {_REASONS[situation]}


@pytest.mark.parametrize("on", ["a subclass", "the instance"])
def test_methods_that_were_replaced_are_called(on) -> None:
    model, given = bloom(), inputs("left")
    attention = model.transformer.h[0].self_attention
    original = type(attention)

    def merge_heads(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * original._merge_heads(self, x)

    if on == "a subclass":
        own = {"_merge_heads": merge_heads, "__module__": original.__module__}
        attention.__class__ = type("Doubled", (original,), own)
    else:
        attention._merge_heads = merge_heads.__get__(attention)
    expected = logits(model, given)
    swap(model)
    assert_close(logits(model, given), expected)


def test_a_mask_that_adds_to_scores_is_added() -> None:
    """Called with a mask of its own, the module hides and adds as the original does."""
    model = bloom()
    twin = copy.deepcopy(model)
    swap(model)
    draw = torch.Generator().manual_seed(2)
    x, mask = torch.randn(2, 9, 48, generator=draw), torch.randn(2, 1, 9, 9, generator=draw)
    alibi = torch.randn(2 * HEADS, 1, 9, generator=draw)
    mask = mask.masked_fill(torch.rand(mask.shape, generator=draw) < 0.3, torch.finfo(torch.float32).min)
    with torch.no_grad():
        found, expected = (each.transformer.h[0].self_attention(x, x, alibi, mask)[0] for each in (model, twin))
    assert_close(found, expected)


def test_half_precision_is_no_worse_than_the_original() -> None:
    model, given = bloom(), inputs("left")
    expected = logits(model, given)
    model.to(torch.bfloat16)
    theirs = float((logits(model, given).float() - expected).abs().max())
    swap(model)
    found = logits(model, given)
    assert found.dtype is torch.bfloat16
    assert float((found.float() - expected).abs().max()) <= 1.5 * theirs


def test_saved_and_copied_it_stays_swapped() -> None:
    model, given = bloom(), inputs("left")
    keys = list(model.state_dict())
    swap(model)
    expected = logits(model, given)
    assert list(model.state_dict()) == keys
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert type(other.transformer.h[0].mlp) is type(model.transformer.h[0].mlp)
        assert torch.equal(logits(other, given), expected)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_it_compiles_as_one_graph(padding) -> None:
    model, given = bloom(), inputs(padding)
    expected = logits(model, given)
    swap(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(logits(compiled, given, use_cache=False), expected)
