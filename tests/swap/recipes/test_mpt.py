"""MPT: ALiBi's biases, bool masks, a cache, and weights that only the block is asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from fastattn.swap import swap


@pytest.fixture
def family(family_of):
    return family_of("mpt")


@pytest.mark.parametrize("clip", [None, 0.4])
def test_a_scale_and_clipped_projections(family, clip) -> None:
    model = family.build(attn_config={"clip_qkv": clip, "softmax_scale": 0.2})
    expected = {kind: family.run(model, family.inputs(kind)) for kind in family.kinds}
    report = swap(model)
    for kind, answers in expected.items():
        with report.counting():
            family.assert_close(family.run(model, family.inputs(kind)), answers)
        assert not any(row.fallbacks for row in report.rows), kind


def test_checkpointed_it_trains_as_before(family) -> None:
    model, given = family.build().train(), family.inputs("left")
    swap(model)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.zero_grad()
        model(**given).logits.square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_called_by_itself_the_attention_forms_its_weights(family) -> None:
    model = family.build()
    swap(model)
    attention, x = family.modules(model)[0], torch.randn(2, 5, 48)
    original = type(attention).fastattn_original.forward
    with torch.no_grad():
        found, expected = attention(x, None), original(attention, x, None)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("child", ["act", "up_proj"])
def test_a_hook_in_the_block_is_heard(family, child) -> None:
    model, given = family.build(), family.inputs("left")
    twin = copy.deepcopy(model)
    report = swap(model)
    for each in (model, twin):
        getattr(each.transformer.blocks[0].ffn, child).register_forward_hook(lambda module, args, out: 2 * out)
    with report.counting():
        found = family.run(model, given)
    family.assert_close(found, family.run(twin, given))
    (reason,) = {reason for row in report.rows for reason in row.fallbacks}
    assert reason.startswith(child)


class Doubled(nn.Module):
    """Another attention, of the original's arguments alone."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.call = attention.forward

    def forward(self, hidden_states, position_bias, cache=None, attention_mask=None):
        attended, weights = self.call(hidden_states, position_bias, cache, attention_mask)
        return 2 * attended, weights


@pytest.mark.parametrize("situation", ["module", "function"])
def test_another_attention_is_called_as_the_original_calls_it(family, situation) -> None:
    model, given = family.build(), family.inputs("left")
    twin = copy.deepcopy(model)
    swap(model)
    for block in (model.transformer.blocks[0], twin.transformer.blocks[0]):
        if situation == "module":
            block.attn = Doubled(block.attn)
        else:
            block.attn.forward = Doubled(block.attn).forward
    family.assert_close(family.run(model, given), family.run(twin, given))
