"""Which calls swapped modules leave to torch; the GPUs that this is about are stood in for."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastattn
from fastattn.functional import plain
from fastattn.nn import attention as mha
from fastattn.swap.recipes import sdpa


def query(length: int = 1024, dtype: torch.dtype = torch.bfloat16, is_cuda: bool = True) -> Any:
    return SimpleNamespace(is_cuda=is_cuda, dtype=dtype, shape=(1, 8, length, 64), device=torch.device("cuda", 0))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(plain, "_chooses_cudnn", lambda *call: True)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("q", "backend", "left"),
    [
        (query(), None, True),
        (query(dtype=torch.float16), None, True),
        (query(length=512), None, False),
        (query(dtype=torch.float32), None, False),
        (query(is_cuda=False), None, False),
        (query(), "triton", False),
    ],
)
def test_calls_are_left_where_torch_was_measured_to_be_faster(q: Any, backend: str | None, left: bool) -> None:
    assert plain.torch_is_as_fast(q, q, q, True, None, backend) is left


@pytest.mark.usefixtures("hopper")
def test_a_forced_backend_and_other_gpus_keep_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    with fastattn.use_backend("reference"):
        assert not plain.torch_is_as_fast(query(), query(), query(), False, None, None)
    monkeypatch.setattr(plain, "_chooses_cudnn", lambda *call: False)
    assert not plain.torch_is_as_fast(query(), query(), query(), False, None, None)
    monkeypatch.undo()
    monkeypatch.setattr(plain, "_capability", lambda device: (10, 0))
    assert not plain.torch_is_as_fast(query(), query(), query(), False, None, None)


def test_torch_tells_which_kernels_it_would_run() -> None:
    q, k = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    assert not plain._chooses_cudnn(q, k, k, True, None)
    expected = F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=0.5, enable_gqa=True)
    assert torch.equal(plain.on_torch(q, k, k, True, 0.5), expected)


class Asked:
    """Stands for torch_is_as_fast: what it was asked, and yes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        self.causal: list[bool] = []
        for module in modules:
            monkeypatch.setattr(module, "torch_is_as_fast", self)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, *_: object) -> bool:
        self.causal.append(is_causal)
        return True


def test_multihead_attention_asks_for_plain_calls_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.MultiheadAttention(32, 4, batch_first=True)).eval()
    layer = model[0]
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    causal = nn.Transformer.generate_square_subsequent_mask(9)
    padding = torch.arange(9) >= torch.tensor([[9], [5]])
    calls = [
        {},
        {"attn_mask": causal, "is_causal": True},
        {"key_padding_mask": padding},
        {"attn_mask": torch.randn(9, 9, generator=torch.Generator().manual_seed(1))},
    ]
    expected = [layer(x, x, x, need_weights=False, **call)[0] for call in calls]
    report = fastattn.swap(model)
    asked = Asked(monkeypatch, mha)
    with report.counting():
        found = [model[0](x, x, x, need_weights=False, **call)[0] for call in calls]
    assert asked.causal == [False, True]
    assert [row.choices for row in report.rows if row.choices] == [{plain.AS_FAST: 2}]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


class Attention(nn.Module):
    def forward(self, q: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=is_causal)


def test_classes_that_call_torchs_function_do_too(monkeypatch: pytest.MonkeyPatch, long_way: None) -> None:
    model = nn.ModuleList([Attention()]).eval()
    q = torch.randn(2, 4, 9, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    calls: list[dict[str, Any]] = [{}, {"is_causal": True}, {"mask": mask}]
    expected = [model[0](q, **call) for call in calls]
    report = fastattn.swap(model)
    asked = Asked(monkeypatch, sdpa)
    with report.counting():
        found = [model[0](q, **call) for call in calls]
    assert asked.causal == [False, True]
    assert [row.choices for row in report.rows if row.choices] == [{plain.AS_FAST: 2}]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_models_of_transformers_do_too(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from fastattn.integrations import transformers as integration

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=50, n_positions=32)
    model = transformers.GPT2Model(config).eval()
    ids, padded = torch.arange(18).view(2, 9), torch.ones(2, 9, dtype=torch.long)
    padded[1, :3] = 0
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        report = fastattn.swap(model)
        asked = Asked(monkeypatch, integration)
        with report.counting():
            found = model(ids).last_hidden_state
            assert asked.causal == [True]
            model(ids, attention_mask=padded)
    assert asked.causal == [True]
    assert {plain.AS_FAST: 1} in [row.choices for row in report.rows]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
