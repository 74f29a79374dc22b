"""DeBERTa-v2 and v3: scores of contents in the kernel, scores of the distances that occur beside them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from fastattn.swap import swap
from fastattn.swap.recipes import deberta as recipe


@pytest.fixture
def family(family_of):
    return family_of("deberta")


@pytest.fixture
def far(family_of):
    """With more buckets of distances than there are tokens."""
    return family_of("deberta, far")


@pytest.mark.parametrize("length", [1, 2, 40])
def test_short_and_long(family, length) -> None:
    ids = torch.randint(2, 64, (4, length), generator=torch.Generator().manual_seed(1))
    model, given = family.build(), {"input_ids": ids}
    expected = family.run(model, given)
    swap(model)
    family.assert_close(family.run(model, given), expected)


def test_distances_that_do_not_occur_are_not_projected(far, monkeypatch) -> None:
    model, given = far.build(), far.inputs("all")
    swap(model)
    projected: dict[str, int] = {}
    real = recipe.linear

    def noted(module: nn.Module, name: str, x: Tensor, part: str) -> Tensor:
        projected[name] = x.shape[1]
        return real(module, name, x, part)

    monkeypatch.setattr(recipe, "linear", noted)
    far.run(model, given)
    # Of the 64 rows for buckets of 32 those from -12 to 12; in the end the same linear projects these.
    assert projected == {"query_proj": 25, "key_proj": 25, "value_proj": 13}


def test_the_dropout_of_distances_is_the_originals(family) -> None:
    """Drawn by torch as before: the same numbers."""
    model, given = family.build().train(), family.inputs("all")
    for attention in family.modules(model):
        attention.pos_dropout.p = 0.5
    twin = copy.deepcopy(model)
    swap(model)
    family.assert_close(family.drawn(model, given), family.drawn(twin, given))


def test_a_replaced_method_runs_the_original(family) -> None:
    model, given = family.build(), family.inputs("all")
    twin = copy.deepcopy(model)
    report = swap(model)
    for each in (model, twin):
        family.modules(each)[0].disentangled_attention_bias = lambda query, *others: torch.zeros(())
    with report.counting():
        found = family.run(model, given)
    family.assert_close(found, family.run(twin, given))
    reason = "its disentangled_attention_bias was replaced"
    assert [list(row.fallbacks) for row in family.rows(report)] == [[reason], []]


def test_a_linear_that_is_called_gets_every_distance(far) -> None:
    """As in the original: a quantised one takes the range of all that it is given for its scale."""
    model, given = far.build(), far.inputs("none")  # rows of padding differ
    twin = copy.deepcopy(model)
    swap(model)
    for each in (model, twin):
        for attention in far.modules(each):
            attention.query_proj.register_forward_hook(lambda module, args, out: out / args[0].abs().amax())
    far.assert_close(far.run(model, given), far.run(twin, given))


def test_distances_of_its_own_run_the_original(family) -> None:
    """A module that is called without distances makes them; of another shape they are its own affair."""
    model = family.build()
    twin = copy.deepcopy(model)
    report = swap(model)
    x, mask = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2)), torch.ones(2, 1, 9, 9)
    with torch.no_grad(), report.counting():
        found, expected = (
            family.modules(each)[0](x, mask, rel_embeddings=each.encoder.get_rel_embedding())[0]
            for each in (model, twin)
        )
    family.assert_close([found], [expected])
    (reason,) = family.rows(report)[0].fallbacks
    assert reason == "its distances are not given, or differ between samples"
