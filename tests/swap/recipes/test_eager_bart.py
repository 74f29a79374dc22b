"""Copies of BART's attention that ask no interface: TrOCR, XGLM, MVP, and the decoder of LED."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from fastattn.swap import swap


def test_prompts_run_the_original(family_of) -> None:
    mvp = family_of("mvp")
    model, given = mvp.build(use_prompt=True, prompt_length=3, prompt_mid_dim=8), mvp.inputs("left")
    expected = mvp.run(model, given)
    report = swap(model)
    with report.counting():
        found = mvp.run(model, given)
    mvp.assert_close(found, expected)
    assert {reason for row in mvp.rows(report) for reason in row.fallbacks} == {"it has a prompt"}


def test_compiled_it_gives_attention_weights_too(family_of) -> None:
    xglm = family_of("xglm")
    model, given = xglm.build(), xglm.inputs("left")
    expected = xglm.attention_weights(model, given, use_cache=False)
    swap(model)
    torch.compiler.reset()
    found = xglm.attention_weights(torch.compile(model, backend="eager"), given, use_cache=False)
    assert len(found) == 2
    xglm.assert_close(found, expected)
