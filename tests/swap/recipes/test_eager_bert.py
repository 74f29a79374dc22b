"""Copies of BERT's self-attention that ask no interface: Megatron-BERT, RemBERT, TAPAS, RoFormer, VisualBERT, Flava."""

from __future__ import annotations

import copy
import dataclasses
import importlib

import pytest
import torch

pytest.importorskip("transformers")

from fastattn.swap import swap
from fastattn.swap.recipes import recipe_for

decoders = pytest.mark.parametrize("name", ["megatron_bert", "rembert", "roformer"])


@decoders
def test_a_decoder_with_a_cache_runs_the_original(family_of, name) -> None:
    family = family_of(name)
    family = dataclasses.replace(family, model=family.model.replace("Model", "ForCausalLM"), answer="logits")
    model, given = family.build(is_decoder=True), family.inputs("all")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    twin = copy.deepcopy(model)
    expected = twin.generate(**given, **options)
    report = swap(model)
    with report.counting():
        found = model.generate(**given, **options)
    assert torch.equal(found, expected)
    assert {reason for row in family.rows(report) for reason in row.fallbacks} <= {"it has a cache"}
    with report.counting():
        found, expected = (family.run(each, given, use_cache=False) for each in (model, twin))
    rows = given["attention_mask"].bool()
    family.assert_close([found[0][rows]], [expected[0][rows]])
    assert not any(row.fallbacks for row in family.rows(report))


@decoders
def test_a_decoder_of_an_encoders_states_runs_the_original(family_of, name) -> None:
    family = family_of(name)
    model = family.build(is_decoder=True, add_cross_attention=True)
    twin = copy.deepcopy(model)
    given = {**family.inputs("all"), "encoder_hidden_states": torch.randn(4, 13, 32), "use_cache": False}
    report = swap(model)
    with report.counting():
        found, expected = (family.run(each, given)[0] for each in (model, twin))
    rows = given["attention_mask"].bool()
    family.assert_close([found[rows]], [expected[rows]])
    reasons = {reason for row in family.rows(report) for reason in row.fallbacks}
    assert reasons == {"it attends to the states of an encoder"}


@pytest.mark.parametrize(("file", "kind"), [("vilt", "ViltSelfAttention"), ("flava", "FlavaSelfAttention")])
def test_copies_of_images_and_text(file, kind) -> None:
    module = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    recipe = recipe_for(getattr(module, kind))
    assert recipe is not None
    assert recipe.kernels["attention"] == "attention"
