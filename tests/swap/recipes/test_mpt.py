"""MPT: ALiBi's biases, bool masks, a cache, and weights that only the block is asked for."""

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
    "cache" not in parameters(transformers.models.mpt.modeling_mpt.MptAttention.forward),
    reason="before 5.24 the cache has another name, and the attention is left alone",
)

KERNELS = {"MptAttention": "attention + linear (Wqkv, out_proj)", "MptMLP": "ffn"}


def mpt(attention: dict[str, object] | None = None, **options: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {
        "d_model": 48,
        "n_layers": 2,
        "n_heads": 6,
        "expansion_ratio": 2,
        "vocab_size": 64,
        "max_seq_len": 40,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "attn_config": attention or {},
        **options,
    }
    model = transformers.MptForCausalLM(transformers.MptConfig(**settings))
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
@pytest.mark.parametrize("clip", [None, 0.4])
def test_the_logits_are_those_of_the_original(padding, clip) -> None:
    model, given = mpt({"clip_qkv": clip, "softmax_scale": 0.2}), inputs(padding)
    original = logits(model, given)
    report = swap(model)
    with report.counting():
        found = logits(model, given)
    assert_close(found, original)
    kernels = {row.class_name: row.kernel for row in report.rows}
    assert {name: kernels[name] for name in KERNELS} == KERNELS
    assert all(row.calls == 1 and not row.fallbacks for row in report.rows)
    report.undo()
    assert torch.equal(logits(model, given), original)


@paddings
def test_it_trains_as_the_original(padding) -> None:
    model, given = mpt().train(), inputs(padding)
    twin = copy.deepcopy(model)
    swap(model)
    rows = given.get("attention_mask", torch.ones(3, 13)).bool()
    for each in (model, twin):
        each(**given).logits[rows].square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(parameter.grad, other.grad, atol=5e-5 * scale, rtol=0, msg=name)


def test_checkpointed_it_trains_as_before() -> None:
    model, given = mpt().train(), inputs("left")
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


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_it_generates_what_the_original_generates(more) -> None:
    model, given = mpt(), inputs("left")
    options = {"max_new_tokens": 10, "do_sample": False, **more}
    expected = model.generate(**given, **options)
    report = swap(model)
    with report.counting():
        found = model.generate(**given, **options)
    assert torch.equal(found, expected)
    assert not any(row.fallbacks for row in report.rows)


def test_attention_weights_come_from_the_original() -> None:
    model, given = mpt(), inputs("left")
    with torch.no_grad():
        expected = model(**given, output_attentions=True).attentions
        report = swap(model)
        with report.counting():
            found = model(**given, output_attentions=True).attentions
    rows = given["attention_mask"].bool()
    for one, other in zip(found, expected, strict=True):
        assert_close(one.transpose(1, 2)[rows], other.transpose(1, 2)[rows])
    reason = "the attention weights are asked for (output_attentions=True)"
    assert [row.fallbacks for row in report.rows if row.class_name == "MptAttention"] == [{reason: 1}] * 2


def test_called_by_itself_the_attention_forms_its_weights() -> None:
    model = mpt()
    swap(model)
    attention, x = model.transformer.blocks[0].attn, torch.randn(2, 5, 48)
    original = type(attention).fastattn_original.forward
    with torch.no_grad():
        found, expected = attention(x, None), original(attention, x, None)
    assert torch.equal(found[1], expected[1])


def test_dropout_is_drawn_in_training_alone() -> None:
    model, given = mpt(), inputs("left")
    for block in model.transformer.blocks:
        block.attn.attn_dropout_p = 0.4
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


@pytest.mark.parametrize("child", ["attn.Wqkv", "ffn.act", "ffn.up_proj"])
def test_a_hook_is_heard(child) -> None:
    model, given = mpt(), inputs("left")
    twin = copy.deepcopy(model)
    report = swap(model)
    for each in (model, twin):
        each.transformer.blocks[0].get_submodule(child).register_forward_hook(lambda module, args, out: 2 * out)
    with report.counting():
        found = logits(model, given)
    assert_close(found, logits(twin, given))
    reasons = {reason for row in report.rows for reason in row.fallbacks}
    assert len(reasons) == 1
    assert next(iter(reasons)).startswith(child.split(".")[1])


class Doubled(nn.Module):
    """Another attention, of the original's arguments alone."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.call = attention.forward

    def forward(self, hidden_states, position_bias, cache=None, attention_mask=None):
        attended, weights = self.call(hidden_states, position_bias, cache, attention_mask)
        return 2 * attended, weights


@pytest.mark.parametrize("situation", ["module", "function"])
def test_another_attention_is_called_as_the_original_calls_it(situation) -> None:
    model, given = mpt(), inputs("left")
    twin = copy.deepcopy(model)
    swap(model)
    for block in (model.transformer.blocks[0], twin.transformer.blocks[0]):
        if situation == "module":
            block.attn = Doubled(block.attn)
        else:
            block.attn.forward = Doubled(block.attn).forward
    assert_close(logits(model, given), logits(twin, given))


def test_saved_and_copied_it_stays_swapped() -> None:
    model, given = mpt(), inputs("left")
    swap(model)
    expected = logits(model, given)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other, given), expected)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_it_compiles_as_one_graph(padding) -> None:
    model, given = mpt(), inputs(padding)
    expected = logits(model, given)
    swap(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(logits(compiled, given, use_cache=False), expected)
