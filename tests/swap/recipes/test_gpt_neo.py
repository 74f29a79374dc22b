"""GPT-Neo: causal layers and layers of a window, beside the model's mask."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from fastattn.swap import swap


@pytest.fixture
def family(family_of):
    return family_of("gpt_neo")


def test_a_matrix_that_was_changed_is_read(family) -> None:
    """As where a decoder is made to see both ways."""
    model, given = family.build(), family.inputs("sides")
    (before,) = family.run(model, given)
    swap(model)
    family.run(model, given)  # the rule was found to hold
    for attention in family.modules(model):
        attention.bias[:, :, :, 3] = False
    twin = copy.deepcopy(model)
    for attention in family.modules(twin):
        attention.__class__ = type(attention).fastattn_original
    (expected,) = family.run(twin, given)
    family.assert_close(family.run(model, given), [expected])
    assert float((expected - before).abs().max()) > 0.01
    with torch.no_grad():
        x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(3))
        for one, other in zip(family.modules(model), family.modules(twin), strict=True):
            family.assert_close([one(x)[0]], [other(x)[0]])


def test_a_mask_that_adds_to_scores_is_added(family) -> None:
    model = family.build()
    twin = copy.deepcopy(model)
    swap(model)
    draw = torch.Generator().manual_seed(2)
    x, mask = torch.randn(2, 9, 48, generator=draw), torch.randn(2, 1, 9, 9, generator=draw)
    with torch.no_grad():
        for one, other in zip(family.modules(model), family.modules(twin), strict=True):
            family.assert_close([one(x, mask)[0]], [other(x, mask)[0]])


def test_a_replaced_method_runs_the_original(family) -> None:
    model, given = family.build(), family.inputs("left")
    twin = copy.deepcopy(model)
    report = swap(model)
    for each in (model, twin):
        family.modules(each)[0]._attn = lambda query, key, value, mask: (value + query, None)
    with report.counting():
        found = family.run(model, given)
    family.assert_close(found, family.run(twin, given))
    assert [list(row.fallbacks) for row in family.rows(report)] == [["its _attn was replaced"], []]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float64])
def test_a_whole_mask_of_any_numbers_adds_them(family, dtype) -> None:
    model, given = family.build(), family.inputs("none")
    given["attention_mask"] = torch.randint(0, 2, (4, 1, 13, 13), generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.no_grad():
        expected = model(**given).logits
        swap(model)
        family.assert_close([model(**given).logits], [expected])


def test_an_empty_batch(family) -> None:
    model, given = family.build(), family.inputs("left")
    swap(model)
    with torch.no_grad():
        found = model(**{name: tensor[:0] for name, tensor in given.items()}).logits
    assert found.shape == (0, 13, 64)
