"""The replicas that nn.DataParallel makes at every call run the kernels: their parameters are attributes, copies that
belong to a graph, and they live for one forward. What needs several GPUs is the copying alone, done by hand here."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastattn import swap

# torch.nn.parallel.replicate, by attribute, is the function of that name.
_replicate = sys.modules["torch.nn.parallel.replicate"]


def replicas(model: nn.Module, count: int, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(_replicate, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr("torch.cuda.comm.broadcast_coalesced", lambda buffers, devices: copies(buffers, devices, True))
    found: list[nn.Module] = _replicate.replicate(model, list(range(count)))
    return found


def encoder() -> tuple[nn.Module, dict[str, Any]]:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"src": torch.randn(4, 6, 16)}


def bert() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**sizes, **rates, vocab_size=30)
    model = transformers.BertModel(config, add_pooling_layer=False)
    return model, {"input_ids": torch.randint(1, 30, (4, 7)), "return_dict": False}


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    rates = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    config = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=30, n_positions=16, **rates)
    return transformers.GPT2Model(config), {"input_ids": torch.randint(1, 30, (4, 7)), "use_cache": False}


def llama() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=30))
    return model, {"input_ids": torch.randint(1, 30, (4, 7)), "use_cache": False}


def output(model: nn.Module, given: dict[str, Any]) -> Tensor:
    out = model(**given)
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize("make", [encoder, bert, gpt2, llama])
def test_replicas_run_kernels_and_give_the_originals_gradients(make, monkeypatch):
    torch.manual_seed(0)
    model, given = make()
    weights = torch.randn_like(output(model, given))
    expected = torch.autograd.grad((output(model, given) * weights).sum(), list(model.parameters()))
    report = swap(model)
    halves = [
        {name: t.chunk(2)[i] if isinstance(t, Tensor) else t for name, t in given.items()} for i in range(2)
    ]  # as DataParallel scatters them
    with report.counting():
        copies = replicas(model, 2, monkeypatch)
        out = torch.cat([output(copy, half) for copy, half in zip(copies, halves, strict=True)])
    assert not any(row.fallbacks for row in report.rows), report
    called = [row.calls for row in report.rows if row.action == "swapped"]
    assert called and set(called) == {2}, report
    found = torch.autograd.grad((out * weights).sum(), list(model.parameters()))
    largest = max(float(g.abs().max()) for g in expected)
    for (name, _), a, b in zip(model.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2**-20 * largest, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
