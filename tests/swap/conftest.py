"""Tiny models, drawn from a seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn import dispatch

VOCABULARY = 64


@pytest.fixture(autouse=True)
def fallbacks_warn_again() -> Iterator[None]:
    """A fallback warns once per process; every test starts as if none had."""
    dispatch._warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dispatch.BackendWarning)
        yield


@pytest.fixture
def compiles_whole() -> Callable[[nn.Module, Tensor], None]:
    """compiles_whole(module, x) swaps the module: compiled as one graph it answers as it did before the swap."""

    def check(module: nn.Module, x: Tensor) -> None:
        torch._dynamo.reset()
        expected = module(x)
        fastattn.swap(module)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)

    return check


@pytest.fixture
def tiny_bert() -> Callable[..., nn.Module]:
    """tiny_bert(**config) -> an eval-mode BertModel of two layers, hidden 32."""
    transformers = pytest.importorskip("transformers")

    def make(model_class: str = "BertModel", **options: object) -> nn.Module:
        torch.manual_seed(0)
        settings = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            **options,
        }
        model = getattr(transformers, model_class)(transformers.BertConfig(**settings))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.15)
        return model.eval()

    return make


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Four samples of 9 tokens: whole, padded right, padded left, wholly padded."""
    ids = torch.randint(0, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[1, 5:] = 0
    mask[2, :3] = 0
    mask[3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def valid_difference(batch: dict[str, Tensor]) -> Callable[[Tensor, Tensor], float]:
    """Largest absolute difference of two (4, 9, hidden) outputs on the tokens that are not padding."""
    rows = batch["attention_mask"].bool()
    return lambda a, b: float((a - b)[rows].abs().max())
