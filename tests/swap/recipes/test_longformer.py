"""Longformer, and the encoder of LED: a window and global tokens, on a mask instead of chunks."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from fastattn.errors import NotSupported  # noqa: E402
from fastattn.swap import plan, swap  # noqa: E402
from fastattn.swap.recipes import longformer as recipe  # noqa: E402

LENGTH = 45  # no multiple of a window: the models pad
SIZES = {
    "vocab_size": 64,
    "attention_window": [8, 16],  # of each layer
    "pad_token_id": 0,
}
LONGFORMER = {
    **SIZES,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 80,
}
LED = {
    **SIZES,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_encoder_position_embeddings": 80,
    "max_decoder_position_embeddings": 32,
    "eos_token_id": None,
}
GLOBAL = {
    "none": None,
    "first": [[0], [0], [0], [0]],
    "some": [[0, 5, 40], [], [20], [1, 2, 3]],
    "several at one window's edge": [[8, 9, 16, 17, 44], [15], [44], [7, 8]],
}


def drawn(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.eval()


def longformer(**options: object) -> nn.Module:
    return drawn(transformers.LongformerModel(transformers.LongformerConfig(**{**LONGFORMER, **options})))


def led(name: str = "LEDModel") -> nn.Module:
    return drawn(getattr(transformers, name)(transformers.LEDConfig(**LED)))


def inputs(tokens: str = "some") -> dict[str, Tensor]:
    """Four samples: whole, padded right, padded left, padded in the middle of a window."""
    ids = torch.randint(2, 64, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(4, LENGTH, dtype=torch.long)
    mask[1, 30:], mask[2, :7], mask[3, 19:22] = 0, 0, 0
    found = {"input_ids": ids, "attention_mask": mask}
    places = GLOBAL[tokens]
    if places is not None:
        found["global_attention_mask"] = torch.zeros_like(ids)
        for entry, each in enumerate(places):
            found["global_attention_mask"][entry, each] = 1
        found["global_attention_mask"] *= mask
    return found


def states(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found: tuple[Tensor, ...] = model(**given, output_hidden_states=True).hidden_states
    return found


def assert_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float = 1e-5) -> None:
    """On all rows, those of padding too."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize("tokens", GLOBAL)
def test_the_states_are_those_of_the_original(tokens) -> None:
    model, given = longformer(), inputs(tokens)
    original = states(model, given)
    report = swap(model)
    with report.counting():
        found = states(model, given)
    assert_close(found, original)
    rows = [row for row in report.rows if row.class_name == "LongformerSelfAttention"]
    assert [(row.action, row.calls, row.fallbacks) for row in rows] == [("swapped", 1, {})] * 2
    assert all(row.kernel.startswith("attention") for row in rows)
    assert not any(row.action == "left" for row in report.rows)
    report.undo()
    assert all(torch.equal(one, other) for one, other in zip(states(model, given), original, strict=True))


def test_without_masks_and_at_a_multiple_of_the_window() -> None:
    model = longformer(attention_window=16)
    given = {"input_ids": inputs()["input_ids"][:, :32]}
    expected = states(model, given)
    swap(model)
    assert_close(states(model, given), expected)


@pytest.mark.parametrize("tokens", GLOBAL)
def test_it_trains_as_the_original(tokens) -> None:
    model, given = longformer(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0).train(), inputs(tokens)
    twin = copy.deepcopy(model)
    swap(model)
    weights = torch.randn(4, LENGTH, 32, generator=torch.Generator().manual_seed(2))
    for each in (model, twin):
        (each(**given).last_hidden_state * weights).sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None, name
            continue
        # What a bias of all keys gets is rounding: the scores of a query move together.
        scale = max(float(other.grad.abs().max()), 0.1)
        torch.testing.assert_close(parameter.grad, other.grad, atol=2e-5 * scale, rtol=0, msg=name)


def test_dropout_is_drawn_in_training_alone() -> None:
    model = longformer(attention_probs_dropout_prob=0.4, hidden_dropout_prob=0.0)
    given = inputs()
    expected = states(model, given)
    swap(model)
    model.train()
    drops = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drops.append(states(model, given)[-1])
    assert torch.equal(drops[0], drops[1])
    assert not torch.equal(drops[0], drops[2])
    assert float((drops[0] - expected[-1]).abs().max()) > 0.01
    assert_close(states(model.eval(), given), expected)


def test_dropout_keeps_the_mean_of_what_it_drops() -> None:
    """Rate and scale are the original's: over many draws both models' mean is the same."""
    model = longformer(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    attention = model.encoder.layer[0].attention.self
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


def test_attention_weights_come_from_the_original() -> None:
    model, given = longformer(), inputs()
    with torch.no_grad():
        expected = model(**given, output_attentions=True)
        report = swap(model)
        with report.counting():
            found = model(**given, output_attentions=True)
    for name in ("attentions", "global_attentions"):
        assert_close(getattr(found, name), getattr(expected, name))
    reasons = {reason for row in report.rows for reason in row.fallbacks}
    assert reasons == {"the attention weights are asked for (output_attentions=True)"}


@pytest.mark.parametrize("situation", ["hook", "replaced", "linears off", "wide heads"])
def test_what_is_not_plain_runs_as_it_is(situation) -> None:
    options = {"hidden_size": 640, "num_attention_heads": 2} if situation == "wide heads" else {}
    model, given = longformer(**options), inputs()
    twin = copy.deepcopy(model)
    attentions = [[layer.attention.self for layer in each.encoder.layer] for each in (model, twin)]
    report = swap(model, linears=situation != "linears off")
    if situation == "hook":
        for each in attentions:
            each[0].value_global.register_forward_hook(lambda module, args, out: 2 * out)
        reason = "value_global has hooks"
    elif situation == "replaced":
        for each in attentions:
            each[0]._compute_global_attn_output_from_hidden = other_global_attention
        reason = "its _compute_global_attn_output_from_hidden was replaced"
    else:
        reason = "the head dim is 320: the kernels take up to 256" if situation == "wide heads" else None
    with report.counting():
        found = states(model, given)
    assert_close(found, states(twin, given))
    rows = [row for row in report.rows if row.class_name == "LongformerSelfAttention"]
    assert list(rows[0].fallbacks) == ([] if reason is None else [reason])


def other_global_attention(hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, Tensor]:
    """Puts 1 where the original attends."""
    slots, batch = int(kwargs["max_num_global_attn_indices"]), hidden_states.shape[1]
    return torch.ones(batch, 4, slots, 8), torch.ones(batch, 4, slots, hidden_states.shape[0])


def test_strict_forbids_attention_weights() -> None:
    model, given = longformer(), inputs()
    swap(model, strict=True)
    with pytest.raises(NotSupported, match="output_attentions=True"):
        model(**given, output_attentions=True)


def test_a_forced_backend_runs_all_of_it(monkeypatch) -> None:
    model, given = longformer(), inputs("first")
    expected = states(model, given)
    swap(model, backend="reference")
    projected: list[str] = []
    monkeypatch.setattr(recipe, "linear", noted(recipe.linear, projected))
    assert_close(states(model, given), expected)
    assert projected.count("value_global") == 2


@pytest.mark.parametrize("few", [0, 1000])
def test_keys_and_values_of_few_global_tokens_need_no_projection(few, monkeypatch) -> None:
    """Batch entries with more, fewer and no global tokens; one with nothing but padding."""
    model, given = longformer(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0), inputs("some")
    given["attention_mask"] = given["attention_mask"].clone()
    given["attention_mask"][1] = 0
    twin = copy.deepcopy(model)
    swap(model)
    monkeypatch.setattr(recipe, "_FEW", few)
    projected: list[str] = []
    monkeypatch.setattr(recipe, "linear", noted(recipe.linear, projected))
    assert_close(states(model, given), states(twin, given))
    assert ("value_global" in projected) == (few == 1000)
    weights = torch.randn(4, LENGTH, 32, generator=torch.Generator().manual_seed(2))
    weights *= given["attention_mask"][..., None]
    for each in (model, twin):
        (each.train()(**given).last_hidden_state * weights).sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if other.grad is None:
            assert parameter.grad is None, name
            continue
        scale = max(float(other.grad.abs().max()), 0.1)
        torch.testing.assert_close(parameter.grad, other.grad, atol=2e-5 * scale, rtol=0, msg=name)


def noted(linear: Callable[..., Tensor], names: list[str]) -> Callable[..., Tensor]:
    def run(module: nn.Module, name: str, x: Tensor, part: str) -> Tensor:
        names.append(name)
        return linear(module, name, x, part)

    return run


@pytest.mark.parametrize("tokens", ["none", "first", "some"])
def test_under_autocast(tokens) -> None:
    model, given = longformer(), inputs(tokens)
    expected = states(model, given)[-1]
    with torch.autocast("cpu", torch.bfloat16):
        original = states(model, given)[-1]
        swap(model)
        found = states(model, given)[-1]
    assert found.dtype is original.dtype
    assert float((found - expected).abs().max()) <= 1.5 * float((original - expected).abs().max())


@pytest.mark.parametrize("tokens", ["none", "first", "some"])
def test_half_precision_is_no_worse_than_the_original(tokens) -> None:
    model, given = longformer(), inputs(tokens)
    expected = states(model, given)[-1]
    model.to(torch.bfloat16)
    theirs = float((states(model, given)[-1].float() - expected).abs().max())
    swap(model)
    found = states(model, given)[-1]
    assert found.dtype is torch.bfloat16
    assert float((found.float() - expected).abs().max()) <= 1.5 * theirs


@pytest.mark.parametrize("name", ["query", "value", "query_global", "key_global"])
def test_a_hook_sees_what_it_sees_in_the_original(name) -> None:
    model, given = longformer(), inputs()
    twin = copy.deepcopy(model)
    swap(model)
    seen: list[Tensor] = []
    for each in (model, twin):
        child = getattr(each.encoder.layer[0].attention.self, name)
        child.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        states(each, given)
    assert_close(seen[:1], seen[1:])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace.:DeprecationWarning")
def test_it_is_traced_as_the_original() -> None:
    model = longformer().requires_grad_(False)
    swap(model)
    ids, mask = inputs("none").values()
    traced = torch.jit.trace(lambda *args: model(*args, return_dict=False)[0], (ids, mask), check_trace=False)
    assert_close((traced(ids.flip(1), mask),), (model(ids.flip(1), mask).last_hidden_state,))


def test_saved_and_copied_it_stays_swapped() -> None:
    model, given = longformer(), inputs()
    keys = list(model.state_dict())
    swap(model)
    expected = states(model, given)
    assert list(model.state_dict()) == keys
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert type(other.encoder.layer[0].attention.self) is type(model.encoder.layer[0].attention.self)
        assert all(torch.equal(one, two) for one, two in zip(states(other, given), expected, strict=True))


@pytest.mark.parametrize("tokens", ["none", "first", "some"])
def test_it_compiles(tokens) -> None:
    model, given = longformer(), inputs(tokens)
    expected = states(model, given)
    swap(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    assert_close(states(compiled, given), expected)


@pytest.mark.parametrize("tokens", GLOBAL)
def test_the_encoder_of_led(tokens) -> None:
    model, given = led(), inputs(tokens)
    given["decoder_input_ids"] = given["input_ids"][:, :6]

    def both(model: nn.Module) -> tuple[Tensor, ...]:
        with torch.no_grad():
            found = model(**given, output_hidden_states=True)
        return (*found.encoder_hidden_states, found.last_hidden_state)

    original = both(model)
    report = swap(model)
    with report.counting():
        found = both(model)
    assert_close(found, original)
    rows = [row for row in report.rows if row.class_name == "LEDEncoderSelfAttention"]
    assert [(row.action, row.calls, row.fallbacks) for row in rows] == [("swapped", 1, {})] * 2
    report.undo()
    assert all(torch.equal(one, other) for one, other in zip(both(model), original, strict=True))


def test_led_generates_what_the_original_generates() -> None:
    model, given = led("LEDForConditionalGeneration"), inputs()
    options = {"max_new_tokens": 8, "do_sample": False, "decoder_start_token_id": 2}
    expected = model.generate(**given, **options)
    swap(model)
    assert torch.equal(model.generate(**given, **options), expected)


def test_a_plan_names_the_kernels() -> None:
    rows = [row for row in plan(longformer()).rows if row.class_name == "LongformerSelfAttention"]
    assert {row.kernel for row in rows} == {"attention + linear (query, key, value, and those of global tokens)"}
    assert not any(row.reason for row in rows)
