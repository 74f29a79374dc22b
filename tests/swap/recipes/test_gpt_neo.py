"""GPT-Neo: causal layers and layers of a window, beside the model's mask."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from fastattn.swap import swap  # noqa: E402

KERNELS = "attention + linear (q, k, v, out)"
WINDOW = 5


def gpt_neo(**options: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {
        "hidden_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 64,
        "max_position_embeddings": 40,
        "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        **options,
    }
    model = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs(padding: str) -> dict[str, Tensor]:
    ids = torch.randint(2, 64, (3, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 13, dtype=torch.long)
    if padding == "none":
        return {"input_ids": ids}
    if padding in ("left", "both"):
        mask[0, :4] = 0
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


def attention_rows(report: object) -> list[object]:
    return [row for row in report.rows if row.class_name == "GPTNeoSelfAttention"]


def attentions(model: nn.Module) -> list[nn.Module]:
    return [block.attn.attention for block in model.transformer.h]


@paddings
def test_the_logits_are_those_of_the_original(padding) -> None:
    model, given = gpt_neo(), inputs(padding)
    original = logits(model, given)
    report = swap(model)
    with report.counting():
        found = logits(model, given)
    assert_close(found, original)
    assert [(row.kernel, row.calls, row.fallbacks) for row in attention_rows(report)] == [(KERNELS, 1, {})] * 2
    report.undo()
    assert torch.equal(logits(model, given), original)


@paddings
def test_it_trains_as_the_original(padding) -> None:
    model, given = gpt_neo(attention_dropout=0.0).train(), inputs(padding)
    twin = copy.deepcopy(model)
    swap(model)
    rows = given.get("attention_mask", torch.ones(3, 13)).bool()
    for each in (model, twin):
        each(**given).logits[rows].square().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(parameter.grad, other.grad, atol=5e-5 * scale, rtol=0, msg=name)


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_it_generates_what_the_original_generates(more) -> None:
    """Beyond the window's length, from prompts padded on the left."""
    model, given = gpt_neo(), inputs("left")
    options = {"max_new_tokens": 12, "do_sample": False, **more}
    expected = model.generate(**given, **options)
    report = swap(model)
    with report.counting():
        found = model.generate(**given, **options)
    assert torch.equal(found, expected)
    assert not any(row.fallbacks for row in report.rows)


def test_a_matrix_that_was_changed_is_read() -> None:
    """As where a decoder is made to see both ways."""
    model, given = gpt_neo(), inputs("both")
    before = logits(model, given)
    swap(model)
    logits(model, given)  # the rule was found to hold
    for attention in attentions(model):
        attention.bias[:, :, :, 3] = False
    twin = copy.deepcopy(model)
    for attention in attentions(twin):
        attention.__class__ = type(attention).fastattn_original
    expected = logits(twin, given)
    assert_close(logits(model, given), expected)
    assert float((expected - before).abs().max()) > 0.01
    del given["attention_mask"]
    with torch.no_grad():
        x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(3))
        for one, other in zip(attentions(model), attentions(twin), strict=True):
            assert_close(one(x)[0], other(x)[0])


def test_a_mask_that_adds_to_scores_is_added() -> None:
    model = gpt_neo()
    twin = copy.deepcopy(model)
    swap(model)
    draw = torch.Generator().manual_seed(2)
    x, mask = torch.randn(2, 9, 48, generator=draw), torch.randn(2, 1, 9, 9, generator=draw)
    with torch.no_grad():
        for one, other in zip(attentions(model), attentions(twin), strict=True):
            assert_close(one(x, mask)[0], other(x, mask)[0])


def test_dropout_is_drawn_in_training_alone() -> None:
    model, given = gpt_neo(attention_dropout=0.4), inputs("left")
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


def test_attention_weights_come_from_the_original() -> None:
    model, given = gpt_neo(), inputs("left")
    with torch.no_grad():
        expected = model(**given, output_attentions=True).attentions
        report = swap(model)
        with report.counting():
            found = model(**given, output_attentions=True).attentions
    rows = given["attention_mask"].bool()
    for one, other in zip(found, expected, strict=True):
        assert_close(one.transpose(1, 2)[rows], other.transpose(1, 2)[rows])
    reason = "the attention weights are asked for (output_attentions=True)"
    assert [row.fallbacks for row in attention_rows(report)] == [{reason: 1}] * 2


@pytest.mark.parametrize("situation", ["hook", "replaced"])
def test_what_is_not_plain_runs_as_it_is(situation) -> None:
    model, given = gpt_neo(), inputs("left")
    twin = copy.deepcopy(model)
    report = swap(model)
    for each in (model, twin):
        if situation == "hook":
            attentions(each)[0].k_proj.register_forward_hook(lambda module, args, out: 2 * out)
        else:
            attentions(each)[0]._attn = lambda query, key, value, mask: (value + query, None)
    with report.counting():
        found = logits(model, given)
    assert_close(found, logits(twin, given))
    reason = "k_proj has hooks" if situation == "hook" else "its _attn was replaced"
    assert [list(row.fallbacks) for row in attention_rows(report)] == [[reason], []]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float64])
def test_a_whole_mask_of_any_numbers_adds_them(dtype) -> None:
    model, given = gpt_neo(), inputs("none")
    given["attention_mask"] = torch.randint(0, 2, (3, 1, 13, 13), generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        expected = model(**given).logits
        swap(model)
        assert_close(model(**given).logits, expected)


def test_an_empty_batch() -> None:
    model, given = gpt_neo(), inputs("left")
    swap(model)
    with torch.no_grad():
        found = model(**{name: tensor[:0] for name, tensor in given.items()}).logits
    assert found.shape == (0, 13, 64)


def test_saved_and_copied_it_stays_swapped() -> None:
    model, given = gpt_neo(), inputs("left")
    swap(model)
    expected = logits(model, given)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert type(attentions(other)[0]) is type(attentions(model)[0])
        assert torch.equal(logits(other, given), expected)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_it_compiles_as_one_graph(padding) -> None:
    model, given = gpt_neo(), inputs(padding)
    expected = logits(model, given)
    swap(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(logits(compiled, given, use_cache=False), expected)
