"""Longformer, and the encoder of LED: a window and global tokens, on a mask instead of chunks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from fastattn.errors import NotSupported
from fastattn.swap import swap
from fastattn.swap.recipes import longformer as recipe


@pytest.fixture
def family(family_of):
    return family_of("longformer")


@pytest.fixture
def led(family, family_of):
    """LED as told by its encoder, whose inputs are Longformer's."""
    settings = {**family_of("led").settings, "attention_window": [8, 16], "max_encoder_position_embeddings": 80}
    return dataclasses.replace(
        family,
        model="LEDForConditionalGeneration",
        config="LEDConfig",
        settings=settings,
        kernels={"LEDEncoderSelfAttention": "attention"},
        answer="encoder_hidden_states",
    )


def test_without_masks_and_at_a_multiple_of_the_window(family) -> None:
    model = family.build(attention_window=16)
    given = {"input_ids": family.inputs("some")["input_ids"][:, :32]}
    expected = family.run(model, given)
    swap(model)
    family.assert_close(family.run(model, given), expected)


def test_dropout_keeps_the_mean_of_what_it_drops(family) -> None:
    """Rate and scale are the original's: over many draws both models' mean is the same."""
    model = family.build(attention_probs_dropout_prob=0.5)
    attention = family.modules(model)[0]
    x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(3))
    at = torch.zeros(1, 16)
    at[0, 0] = 1.0
    given = (x, at, at < 0, at > 0, True)
    with torch.no_grad():
        expected = attention(*given)[0]
        swap(model)
        attention.train()
        torch.manual_seed(0)
        draws = torch.stack([attention(*given)[0] for _ in range(2000)])
    deviation = draws.std(0) / 2000**0.5
    assert float(deviation.max()) > 0
    assert float(((draws.mean(0) - expected).abs() / deviation.clamp(min=1e-6)).max()) < 5.5


@pytest.mark.parametrize("situation", ["replaced", "linears off", "wide heads"])
def test_what_is_not_plain_runs_as_it_is(family, situation) -> None:
    options = {"hidden_size": 640, "num_attention_heads": 2} if situation == "wide heads" else {}
    model, given = family.build(**options), family.inputs("some")
    twin = copy.deepcopy(model)
    report = swap(model, linears=situation != "linears off")
    if situation == "replaced":
        for each in (model, twin):
            family.modules(each)[0]._compute_global_attn_output_from_hidden = other_global_attention
    with report.counting():
        found = family.run(model, given)
    family.assert_close(found, family.run(twin, given))
    reasons = {
        "replaced": ["its _compute_global_attn_output_from_hidden was replaced"],
        "linears off": [],
        "wide heads": ["the head dim is 320: the kernels take up to 256"],
    }
    assert list(family.rows(report)[0].fallbacks) == reasons[situation]


def other_global_attention(hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
    """Puts 1 where the original attends."""
    slots, batch = int(kwargs["max_num_global_attn_indices"]), hidden_states.shape[1]
    return torch.ones(batch, 4, slots, 8), torch.ones(batch, 4, slots, hidden_states.shape[0])


def test_strict_forbids_attention_weights(family) -> None:
    model, given = family.build(), family.inputs("some")
    swap(model, strict=True)
    with pytest.raises(NotSupported, match="output_attentions=True"):
        model(**given, output_attentions=True)


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the linears that ran."""
    names: list[str] = []

    def noted(linear: Callable[..., Tensor], module: nn.Module, name: str, *others: object) -> Tensor:
        names.append(name)
        return linear(module, name, *others)

    monkeypatch.setattr(recipe, "linear", lambda *args, real=recipe.linear: noted(real, *args))
    return names


def test_a_forced_backend_runs_all_of_it(family, projected) -> None:
    model, given = family.build(), family.inputs("first")
    expected = family.run(model, given)
    swap(model, backend="reference")
    family.assert_close(family.run(model, given), expected)
    assert projected.count("value_global") == 2


@pytest.mark.parametrize("few", [0, 1000])
def test_keys_and_values_of_few_global_tokens_need_no_projection(family, few, projected, monkeypatch) -> None:
    """Batch entries with more, fewer and no global tokens; one with nothing but padding."""
    model, given = family.build(), family.inputs("some")
    given["attention_mask"][1] = 0
    twin = copy.deepcopy(model)
    swap(model)
    monkeypatch.setattr(recipe, "_FEW", few)
    family.assert_close(family.run(model, given), family.run(twin, given))
    assert ("value_global" in projected) == (few == 1000)
    weights = torch.randn(4, 45, 32, generator=torch.Generator().manual_seed(2)) * given["attention_mask"][..., None]
    for each in (model, twin):
        (each.train()(**given).last_hidden_state * weights).sum().backward()
    family.assert_same_gradients(model, twin)


@pytest.mark.parametrize("tokens", ["none", "first", "some"])
def test_under_autocast(family, tokens) -> None:
    model, given = family.build(), family.inputs(tokens)
    expected = family.run(model, given)[-1]
    with torch.autocast("cpu", torch.bfloat16):
        original = family.run(model, given)[-1]
        swap(model)
        found = family.run(model, given)[-1]
    assert found.dtype is original.dtype
    assert float((found - expected).abs().max()) <= 1.5 * float((original - expected).abs().max())


@pytest.mark.parametrize("name", ["query", "value", "query_global", "key_global"])
def test_a_hook_sees_what_it_sees_in_the_original(family, name) -> None:
    model, given = family.build(), family.inputs("some")
    twin = copy.deepcopy(model)
    swap(model)
    seen: list[Tensor] = []
    for each in (model, twin):
        child = getattr(family.modules(each)[0], name)
        child.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        family.run(each, given)
    family.assert_close(seen[:1], seen[1:])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace.:DeprecationWarning")
def test_it_is_traced_as_the_original(family) -> None:
    model = family.build().requires_grad_(False)
    swap(model)
    ids, mask = family.inputs("none").values()
    traced = torch.jit.trace(lambda *args: model(*args, return_dict=False)[0], (ids, mask), check_trace=False)
    family.assert_close([traced(ids.flip(1), mask)], [model(ids.flip(1), mask).last_hidden_state])


def test_the_encoder_of_led(led) -> None:
    model = led.build()
    swapped = copy.deepcopy(model)
    report = swap(swapped)
    assert [row.action for row in led.rows(report)] == ["swapped"] * 2
    given = {
        kind: {**led.inputs(kind), "decoder_input_ids": led.inputs(kind)["input_ids"][:, :6]} for kind in led.kinds
    }
    original = {kind: led.run(model, each) for kind, each in given.items()}
    for kind, each in given.items():
        with report.counting():
            led.assert_close(led.run(swapped, each), original[kind])
        assert [(row.calls, row.fallbacks) for row in led.rows(report)] == [(1, {})] * 2, kind
    report.undo()
    for kind, each in given.items():
        assert all(torch.equal(*pair) for pair in zip(led.run(swapped, each), original[kind], strict=True)), kind


def test_led_generates_what_the_original_generates(led) -> None:
    model, given = led.build(), led.inputs("some")
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**given, **options)
    swap(model)
    found = model.generate(**given, **options)
    assert torch.equal(found.sequences, expected.sequences)
    led.assert_close(found.logits, expected.logits)
