"""Whole layers of BERT: one call of the operator, or their children's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

import fastattn.swap.recipes.bert  # noqa: E402, F401  which knows the classes as they are now: tests replace methods
from fastattn.swap import swap  # noqa: E402
from fastattn.swap.recipes import whole_layer  # noqa: E402

VOCABULARY = 64


def run(model: nn.Module, batch: dict[str, torch.Tensor], **more: object) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **more)[0]


def test_a_layer_is_one_call_that_counts_for_its_children(eager, one_calls, tiny_bert, batch, valid_difference) -> None:
    model = tiny_bert()
    expected = run(eager(model), batch)
    report = swap(model)
    with report.counting():
        assert valid_difference(run(model, batch), expected) < 1e-5
    assert one_calls == [(4, 9, 32)] * 2
    assert report.all_called
    assert {row.calls for row in report.rows if row.action == "swapped"} == {1}
    row = next(row for row in report.rows if row.path == "encoder.layer.1")
    assert (row.class_name, row.action, row.kernel) == ("BertLayer", "swapped", "encoder_layer")


def training(model: nn.Module) -> dict[str, object]:
    model.train()
    return {}


def with_gradients(model: nn.Module) -> dict[str, object]:
    torch.set_grad_enabled(True)
    return {}


def only_attention_dropout(model: nn.Module) -> dict[str, object]:
    for layer in model.encoder.layer:
        layer.attention.self.train()
    return {}


def chunked(model: nn.Module) -> dict[str, object]:
    for layer in model.encoder.layer:
        layer.chunk_size_feed_forward = 3
    return {}


def attentions_asked_for(model: nn.Module) -> dict[str, object]:
    return {"output_attentions": True}


def float_mask(model: nn.Module) -> dict[str, object]:
    return {"attention_mask": torch.zeros(4, 1, 9, 9)}


def inputs_that_need_gradients(model: nn.Module) -> dict[str, object]:
    torch.set_grad_enabled(True)
    model.requires_grad_(False)
    return {"input_ids": None, "inputs_embeds": torch.randn(4, 9, 32, requires_grad=True)}


@pytest.mark.parametrize(
    "situation",
    (
        training,
        with_gradients,
        only_attention_dropout,
        chunked,
        attentions_asked_for,
        float_mask,
        inputs_that_need_gradients,
    ),
)
def test_where_a_layer_calls_its_children_as_expected(situation, one_calls, tiny_bert, batch) -> None:
    model = tiny_bert()
    report = swap(model)
    with torch.no_grad(), report.counting():
        model(**{**batch, **situation(model)})
    assert not one_calls
    assert report.all_called


def test_attention_drops_as_the_attention_is_in_training(one_calls, tiny_bert, batch) -> None:
    """Whatever its dropout module says, as in the original."""
    model = tiny_bert(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    swap(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert not torch.equal(run(model, batch), run(model, batch))
    assert not one_calls


def test_autocast_calls_the_children(one_calls, tiny_bert, batch) -> None:
    model = tiny_bert()
    report = swap(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), report.counting():
        run(model, batch)
    assert not one_calls
    assert report.all_called


def test_parameters_that_need_no_gradient_need_no_no_grad(one_calls, tiny_bert, batch) -> None:
    model = tiny_bert().requires_grad_(False)
    swap(model)
    model(**batch)
    assert len(one_calls) == 2


def test_hooks_that_collect_outputs_stop_a_layer_only_while_they_collect(one_calls, tiny_bert, batch) -> None:
    model = tiny_bert()
    report = swap(model)
    with torch.no_grad(), report.counting():
        states = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert len(one_calls) == 2
    assert report.all_called
    run(model, batch, output_attentions=True)
    assert len(one_calls) == 2
    run(model, batch)
    assert len(one_calls) == 4


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("attention", "attention has hooks"),
        ("attention.self", "attention.self has hooks"),
        ("attention.self.value", "attention.self.value has hooks"),
        ("attention.output", "attention.output has hooks"),
        ("attention.output.dense", "attention.output.dense has hooks"),
        ("intermediate", "intermediate has hooks"),
        ("intermediate.intermediate_act_fn", "intermediate.intermediate_act_fn has no kernel"),
        ("output", "output has hooks"),
        ("output.dropout", "output.dropout has hooks"),
    ],
)
def test_whatever_is_hooked_is_called(eager, path, reason, one_calls, tiny_bert, batch, valid_difference) -> None:
    model = tiny_bert()
    twin = eager(model)
    report = swap(model)
    seen = []
    for each in (model, twin):
        child = each.encoder.layer[1].get_submodule(path)
        child.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
        child.register_forward_pre_hook(lambda module, args: tuple(a * 1.5 for a in args[:1]) + args[1:])
    with report.counting():
        found = run(model, batch)
    assert valid_difference(found, run(twin, batch)) < 2e-5
    assert len(seen) == 2
    assert len(one_calls) == 1
    row = next(row for row in report.rows if row.path == "encoder.layer.1")
    assert (row.calls, row.fallbacks) == (1, {reason: 1})


def test_a_replaced_child_is_called(one_calls, tiny_bert, batch) -> None:
    class Silent(nn.Module):
        def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(input_tensor)

    model = tiny_bert()
    report = swap(model)
    model.encoder.layer[1].output = Silent()
    model.encoder.layer[0].feed_forward_chunk = lambda attention_output: torch.ones_like(attention_output)
    with report.counting():
        assert not run(model, batch).any()
    assert not one_calls
    row = next(row for row in report.rows if row.path == "encoder.layer.1")
    (reason,) = row.fallbacks
    assert reason.startswith("output is a ") and reason.endswith("Silent")


def test_a_layer_whose_parts_are_turned_off_or_unknown_is_left(tiny_bert) -> None:
    rows = {row.path: row for row in swap(tiny_bert(), norms=False, ffns=False).rows}
    row = rows["encoder.layer.0"]
    assert (row.action, row.reason) == ("left", "turned off: norms=False, ffns=False")
    rows = {row.path: row for row in swap(tiny_bert(hidden_act="mish")).rows}
    assert rows["encoder.layer.0"].reason == "the activation MishActivation has no kernel"
    assert rows["encoder.layer.0.output"].action == "swapped"


def test_a_decoder_without_cache_is_causal_in_one_call(eager, one_calls, tiny_bert) -> None:
    model = tiny_bert("BertLMHeadModel", is_decoder=True)
    twin = eager(model)
    swap(model)
    ids = torch.randint(2, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5))
    padded = torch.ones_like(ids)
    padded[0, :2] = 0
    for mask in (None, torch.ones_like(ids), padded):
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        rows = torch.ones_like(ids).bool() if mask is None else mask.bool()
        torch.testing.assert_close(run(model, inputs)[rows], run(twin, inputs)[rows], atol=1e-4, rtol=1e-4)
    assert len(one_calls) == 6


def test_a_dense_bool_mask_is_served_in_one_call(eager, one_calls, tiny_bert, batch) -> None:
    model = tiny_bert()
    twin = eager(model)
    swap(model)
    seen = torch.rand(4, 1, 9, 9, generator=torch.Generator().manual_seed(2)) < 0.6
    seen |= torch.eye(9, dtype=torch.bool)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    found, expected = run(model, {**batch, "attention_mask": seen}), run(twin, {**batch, "attention_mask": added})
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert len(one_calls) == 2


def test_the_backend_of_the_swap_reaches_the_layer(tiny_bert, batch, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    real = whole_layer.encoder_layer
    monkeypatch.setattr(whole_layer, "encoder_layer", lambda *a, **o: names.append(o["backend"]) or real(*a, **o))
    model = tiny_bert()
    swap(model, backend="reference")
    run(model, batch)
    assert names == ["reference"] * 2


@pytest.mark.parametrize("name", ["BertAttention", "BertSelfAttention", "BertSelfOutput", "BertIntermediate"])
def test_a_class_patched_by_another_library(
    eager, name, one_calls, tiny_bert, batch, valid_difference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the swap the layer is not one call; afterwards, it is one again."""
    model = tiny_bert()
    expected = run(eager(model), batch)
    kind = getattr(transformers.models.bert.modeling_bert, name)
    original = kind.forward
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs))
        report = swap(model)
        assert valid_difference(run(model, batch), expected) < 1e-5
        assert not one_calls
        report.undo()
    swap(model)
    assert valid_difference(run(model, batch), expected) < 1e-5
    assert len(one_calls) == 2
    if name != "BertSelfAttention":  # which the swap replaced
        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", lambda self, *args, **kwargs: original(self, *args, **kwargs))
            assert valid_difference(run(model, batch), expected) < 1e-5
            assert len(one_calls) == 2
