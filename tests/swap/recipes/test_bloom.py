"""Bloom: ALiBi's biases beside the model's mask, a cache, and a block whose GELU is its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from fastattn.errors import NotSupported
from fastattn.swap import swap


@pytest.fixture
def family(family_of):
    return family_of("bloom")


def test_a_cache_goes_on_where_the_prompt_ends(family) -> None:
    model, given = family.build(), family.inputs("left")
    expected = family.run(model, given)
    swap(model)
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        first = model(ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
        name = "cache" if "cache" in first else "past_key_values"
        then = model(ids[:, 9:], attention_mask=mask, use_cache=True, **{name: first[name]})
    found = torch.cat([first.logits, then.logits], dim=1)
    family.assert_close([family.valid(found, given)], expected)


def test_hidden_dropout_is_the_originals(family) -> None:
    """Drawn by torch as before, in the same order: the same numbers."""
    model, given = family.build(hidden_dropout=0.3).train(), family.inputs("right")
    twin = copy.deepcopy(model)
    swap(model)
    family.assert_close(family.drawn(model, given), family.drawn(twin, given))


def test_strict_forbids_attention_weights(family) -> None:
    model = family.build()
    swap(model, strict=True)
    with pytest.raises(NotSupported, match="output_attentions=True"):
        model(**family.inputs("left"), output_attentions=True)


_REASONS = {
    "hook in the block": "gelu_impl has hooks",
    "slices": "the output is computed in slices (slow_but_exact)",
    "wide heads": "the head dim is 288: the kernels take up to 256",
}


@pytest.mark.parametrize("situation", [*_REASONS, "lora"])
def test_what_is_not_plain_runs_as_it_is(family, situation) -> None:
    model = family.build(**({"hidden_size": 576, "n_head": 2} if situation == "wide heads" else {}))
    twin, given = copy.deepcopy(model), family.inputs("left")
    report = swap(model)
    for each in (model, twin):
        block = each.transformer.h[0]
        if situation == "hook in the block":
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
        found = family.run(model, given)
    family.assert_close(found, family.run(twin, given), 2e-5)
    reasons = {reason for row in report.rows for reason in row.fallbacks}
    if situation == "lora":
        assert any(reason.startswith("query_key_value is a peft.") for reason in reasons)
        assert any(reason.startswith("dense_h_to_4h is a peft.") for reason in reasons)
    else:
        assert reasons == {_REASONS[situation]}


@pytest.mark.parametrize("on", ["a subclass", "the instance"])
def test_methods_that_were_replaced_are_called(family, on) -> None:
    model, given = family.build(), family.inputs("left")
    attention = family.modules(model)[0]
    original = type(attention)

    def merge_heads(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * original._merge_heads(self, x)

    if on == "a subclass":
        own = {"_merge_heads": merge_heads, "__module__": original.__module__}
        attention.__class__ = type("Doubled", (original,), own)
    else:
        attention._merge_heads = merge_heads.__get__(attention)
    expected = family.run(model, given)
    swap(model)
    family.assert_close(family.run(model, given), expected)


def test_a_mask_that_adds_to_scores_is_added(family) -> None:
    """Called with a mask of its own, the module hides and adds as the original does."""
    model = family.build()
    twin = copy.deepcopy(model)
    swap(model)
    draw = torch.Generator().manual_seed(2)
    x, mask = torch.randn(2, 9, 48, generator=draw), torch.randn(2, 1, 9, 9, generator=draw)
    alibi = torch.randn(2 * 6, 1, 9, generator=draw)
    mask = mask.masked_fill(torch.rand(mask.shape, generator=draw) < 0.3, torch.finfo(torch.float32).min)
    with torch.no_grad():
        found, expected = (family.modules(each)[0](x, x, alibi, mask)[0] for each in (model, twin))
    family.assert_close([found], [expected])
