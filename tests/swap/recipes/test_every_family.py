"""What every recipe of an attention promises, held against the original of each family in conftest.py."""

from __future__ import annotations

import copy
import io

import pytest
import torch

pytest.importorskip("transformers")

from fastattn.swap import plan, swap

WEIGHTS_ASKED_FOR = "the attention weights are asked for (output_attentions=True)"


def test_the_answers_are_those_of_the_original_and_undo_restores_them(family) -> None:
    model = family.build()
    originals = {kind: family.run(model, family.inputs(kind)) for kind in family.kinds}
    planned, report = plan(model), swap(model)
    for told in (planned, report):
        assert {row.class_name: row.kernel for row in told.rows if row.class_name in family.kernels} == family.kernels
        assert [row.reason for row in family.rows(told)] == [""] * family.attentions
    assert not any(row.action == "left" for row in report.rows)
    for kind, original in originals.items():
        with report.counting():
            found = family.run(model, family.inputs(kind))
        family.assert_close(found, original)
        assert all(row.calls == 1 for row in report.rows if row.class_name in family.kernels), kind
        assert not any(row.fallbacks for row in report.rows), kind
    report.undo()
    for kind, original in originals.items():
        again = family.run(model, family.inputs(kind))
        assert all(torch.equal(one, other) for one, other in zip(again, original, strict=True)), kind


def test_it_trains_as_the_original(family) -> None:
    model = family.build().train()
    twin = copy.deepcopy(model)
    swap(model)
    for kind in family.kinds:
        for each in (model, twin):
            family.backward(each, family.inputs(kind))
        family.assert_same_gradients(model, twin)


def test_it_generates_what_the_original_generates(generating) -> None:
    """From prompts padded on the left, beyond the window where there is one."""
    model, given = generating.build(), generating.inputs("left")
    given.pop("decoder_input_ids", None)
    common = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = [model.generate(**given, **common, **more) for more in generating.generations]
    report = swap(model)
    for more, original in zip(generating.generations, expected, strict=True):
        with report.counting():
            found = model.generate(**given, **common, **more)
        assert torch.equal(found.sequences, original.sequences), more
        generating.assert_close(found.logits, original.logits)
        assert not torch.equal(found.logits[-1][0], found.logits[-1][-1])  # it does read the prompts
        assert all(row.calls for row in generating.rows(report))
        assert not any(row.fallbacks for row in report.rows), more


def test_attention_weights_come_from_the_original(family) -> None:
    model, given = family.build(), family.inputs(family.usual)
    expected = family.attention_weights(model, given)
    report = swap(model)
    with report.counting():
        found = family.attention_weights(model, given)
    assert len(found) == 2 * len(family.weights)
    family.assert_close(found, expected)
    assert [row.fallbacks for row in family.rows(report)] == [{WEIGHTS_ASKED_FOR: 1}] * family.attentions
    with report.counting():
        family.run(model, given)
    assert not any(row.fallbacks for row in report.rows)


def test_dropout_is_drawn_in_training_alone(family) -> None:
    model, given = family.build(), family.inputs(family.usual)
    family.set_dropout(model, 0.4)
    expected = family.run(model, given)
    swap(model)
    model.train()
    drops = [family.drawn(model, given, seed)[-1] for seed in (0, 0, 1)]
    assert torch.equal(drops[0], drops[1])
    assert not torch.equal(drops[0], drops[2])
    assert float((drops[0] - expected[-1]).abs().max()) > 0.01 * float(expected[-1].abs().max())
    family.assert_close(family.run(model.eval(), given), expected)


def test_a_hooked_linear_is_called(family) -> None:
    model, given = family.build(), family.inputs(family.usual)
    twin = copy.deepcopy(model)
    report = swap(model)
    for each in (model, twin):
        linear = getattr(family.modules(each)[0], family.hooked)
        linear.register_forward_hook(lambda module, args, out: 2 * out)
    with report.counting():
        found = family.run(model, given)
    family.assert_close(found, family.run(twin, given))
    hooked, *others = family.rows(report)
    assert list(hooked.fallbacks) == [f"{family.hooked} has hooks"]
    assert not any(row.fallbacks for row in others)


def test_half_precision_is_no_worse_than_the_original(family) -> None:
    model = family.build()
    for kind in family.compiled:
        given = family.inputs(kind)
        expected = family.run(model, given)[-1]
        half = copy.deepcopy(model).to(torch.bfloat16)
        given = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in given.items()}
        theirs = float((family.run(half, given)[-1].float() - expected).abs().max())
        swap(half)
        found = family.run(half, given)[-1]
        assert found.dtype is torch.bfloat16
        assert float((found.float() - expected).abs().max()) <= family.half * theirs, kind


def test_saved_and_copied_it_stays_swapped(family) -> None:
    model, given = family.build(), family.inputs(family.usual)
    keys = list(model.state_dict())
    swap(model)
    expected = family.run(model, given)
    assert list(model.state_dict()) == keys
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        found = family.run(other, given)
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_it_compiles(compiled_family) -> None:
    """As one graph, but for what the original does not."""
    family = compiled_family
    model = family.build(**dict.fromkeys(family.fewer_layers, 1))
    more = {"use_cache": False} if family.generations else {}
    expected = {kind: family.run(model, family.inputs(kind)) for kind in family.compiled}
    swap(model)
    torch.compiler.reset()
    compiled = torch.compile(model, **family.compilation)
    for kind, answers in expected.items():
        family.assert_close(family.run(compiled, family.inputs(kind), **more), answers)
