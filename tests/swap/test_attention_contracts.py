"""Models that want more of an attention function than most: wide heads, chosen keys, masks that must not be missing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import fastattn  # noqa: E402
from fastattn.errors import NotSupported  # noqa: E402
from fastattn.integrations import transformers as transformers_attention  # noqa: E402
from fastattn.integrations.transformers import attention_forward  # noqa: E402
from fastattn.swap import swap  # noqa: E402

TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GEMMA = {
    **SIZES,
    **TOKENS,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "tie_word_embeddings": False,
}
DEEPSEEK = {
    **SIZES,
    **TOKENS,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "mlp_layer_types": ["dense", "dense"],
}


def causal_lm(config_name: str, **options: object) -> nn.Module:
    kind = getattr(transformers, config_name, None)
    if kind is None:
        pytest.skip(f"this transformers has no {config_name}")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**options)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def tokens(length: int) -> Tensor:
    return torch.randint(2, 64, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module, length: int, **more: object) -> Tensor:
    return model(tokens(length), **more).logits


# ---- chosen keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [5, 64])
@pytest.mark.parametrize("by_swap", [True, False])
def test_keys_that_an_indexer_chose(chosen, by_swap) -> None:
    model = causal_lm("DeepseekV32Config", **DEEPSEEK, index_topk=chosen)
    expected = logits(model, 21)
    if by_swap:
        report = swap(model)
        assert any(row.kernel == "attention" for row in report.rows)
    else:
        model.set_attn_implementation("fastattn")
    torch.testing.assert_close(logits(model, 21), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float", "ranges"])
def test_chosen_keys_beside_every_mask(kind) -> None:
    draw = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 4, 6, 8, generator=draw) for _ in range(3))
    indices = torch.rand(2, 6, 6, generator=draw).argsort(-1)[..., :3]
    seen = torch.zeros(2, 6, 6, dtype=torch.bool).scatter(2, indices, True)[:, None]
    keep = torch.rand(2, 1, 6, 6, generator=draw) < 0.8
    mask: Tensor | None = None
    if kind == "bool":
        mask, seen = keep, seen & keep
    elif kind == "float":
        mask, seen = torch.zeros(2, 1, 6, 6).masked_fill(~keep, -torch.inf), seen & keep
    elif kind == "ranges":
        mask = torch.tensor([1, 5], dtype=torch.int32).expand(2, 1, 6, 2)
        seen = seen & torch.tensor([False, True, True, True, True, False])
    elif kind == "causal":
        seen = seen & torch.ones(6, 6, dtype=torch.bool).tril()
    scores = (q @ k.mT * 0.3).masked_fill(~seen, -torch.inf)
    expected = (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)
    found, _ = attention_forward(
        nn.Module(), q, k, v, mask, scaling=0.3, is_causal=kind == "causal", indices=indices.to(torch.int32)
    )
    torch.testing.assert_close(found, expected)


def test_chosen_blocks_of_keys_are_left_to_the_model() -> None:
    sizes = {"index_block_size": 4, "index_topk_blocks": 2, "index_local_blocks": 1, "index_n_heads": 2}
    model = causal_lm(
        "MiniMaxM3VLTextConfig",
        **SIZES,
        **TOKENS,
        **sizes,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention", "minimax_m3_sparse"],
    )
    expected = logits(model, 21)
    report = swap(model)
    rows = [row for row in report.rows if row.path.endswith("self_attn")]
    assert rows
    assert all(row.action == "left" and 'where that is "eager" or "sdpa"' in row.reason for row in rows)
    torch.testing.assert_close(logits(model, 21), expected, atol=1e-4, rtol=1e-4)
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="block_indices: the fastattn attention does not know"):
        attention_forward(nn.Module(), x, x, x, None, block_indices=torch.zeros(1))


# ---- masks that must not be missing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_cuts_its_queries(compiled) -> None:
    """Gemma 4, where layers share their keys: only the last queries go through those."""
    model = causal_lm("Gemma4TextConfig", **GEMMA, global_head_dim=8, num_kv_shared_layers=2)
    expected = {kept: logits(model, 12, logits_to_keep=kept) for kept in ((0, 3) if compiled else (0, 1, 3))}
    swap(model)
    run = torch.compile(model, backend="eager") if compiled else model
    for kept, wanted in expected.items():
        torch.testing.assert_close(logits(run, 12, logits_to_keep=kept), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_it_generates_the_same(options) -> None:
    model = causal_lm("Gemma4TextConfig", **GEMMA, global_head_dim=8, num_kv_shared_layers=2)
    twin = copy.deepcopy(model)
    swap(model)
    expected, found = (
        each.generate(tokens(9), attention_mask=torch.ones(2, 9), max_new_tokens=6, do_sample=False, **options)
        for each in (twin, model)
    )
    assert torch.equal(found, expected)


def test_on_a_gpu_without_kernels_torchs_attention_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference, which alone would take the calls, is slower."""
    reason = "no kernels run on this GPU: cuda: too old"
    model = causal_lm("Gemma4TextConfig", **GEMMA, global_head_dim=8)
    expected = logits(model, 12)
    report = swap(model)
    monkeypatch.setattr(transformers_attention, "why_no_kernels", lambda query, backend: reason)
    with report.counting():
        torch.testing.assert_close(logits(model, 12), expected, atol=1e-4, rtol=1e-4)
    counted = [row.fallbacks for row in report.rows if row.path.endswith("self_attn")]
    assert counted and all(fallbacks == {reason: 1} for fallbacks in counted)


# ---- wide heads ------------------------------------------------------------------------------------------------------


def test_some_heads_too_wide_for_the_kernels() -> None:
    model = causal_lm("Gemma4TextConfig", **GEMMA, global_head_dim=264)
    expected = logits(model, 12)
    report = swap(model)
    rows = {row.path.split(".")[-2]: row for row in report.rows if row.path.endswith("self_attn")}
    assert [rows[layer].action for layer in "0123"] == ["swapped", "left"] * 2
    assert rows["1"].reason == "the head dim is 264: the kernels take up to 256"
    torch.testing.assert_close(logits(model, 12), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["BertModel", "MPNetModel"])
def test_an_encoder_with_heads_too_wide_falls_back(name) -> None:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**{**SIZES, **TOKENS, "hidden_size": 600, "num_attention_heads": 2})).eval()
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with torch.no_grad():
        expected = model(tokens(9), attention_mask=mask).last_hidden_state[mask.bool()]
        report = swap(model)
        with report.counting():
            found = model(tokens(9), attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    row = next(row for row in report.rows if "attention" in row.kernel and row.kernel != "encoder_layer")
    assert row.fallbacks == {"the head dim is 300: the kernels take up to 256": 1}
    report.undo()
    swap(model, strict=True)
    with pytest.raises(NotSupported, match="the head dim is 300"), torch.no_grad():
        model(tokens(9), attention_mask=mask)


@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_wide_heads_that_see_nothing(more, dtype) -> None:
    """0 without gradients under -inf; the mean of all values under the smallest number."""
    for lowest in (-torch.inf, torch.finfo(torch.float32).min):
        q, k, v = (torch.randn(1, 2, 4, 320).to(dtype).requires_grad_() for _ in range(3))
        mask = torch.zeros(1, 1, 4, 4)
        mask[:, :, 1] = lowest
        out, _ = attention_forward(nn.Module(), q, k, v, mask, **more)
        expected = torch.zeros(1, 2, 320) if lowest == -torch.inf else v.float().mean(2)
        torch.testing.assert_close(out[:, 1].float(), expected, atol=2e-2, rtol=2e-2)
        gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_backend_is_forced_for_wide_heads_too() -> None:
    x = torch.randn(1, 2, 4, 320)
    with fastattn.use_backend("reference"), pytest.raises(NotSupported, match="the head dim is 320"):
        attention_forward(nn.Module(), x, x, x, None)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float", "ranges"])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"sinks": True}, {"bias": True}], ids=str)
def test_wide_heads_with_every_option(kind, more) -> None:
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, 6, 272, generator=draw) for heads in (4, 2, 2))
    mask: Tensor | None = None
    if kind == "bool":
        mask = torch.rand(2, 1, 6, 6, generator=draw) < 0.5
        mask[0, 0, 2] = False
    elif kind == "float":
        mask = torch.randn(2, 1, 6, 6, generator=draw)
    elif kind == "ranges":
        mask = torch.tensor([[0, 3], [2, 5], [4, 4], [0, 6], [3, 9], [5, 6]], dtype=torch.int32).expand(2, 1, 6, 2)
    sinks = torch.randn(4, generator=draw) if "sinks" in more else None
    bias = torch.randn(1, 4, 6, 6, generator=draw) if "bias" in more else None
    options = {"scaling": 0.1, "is_causal": kind == "causal", "softcap": more.get("softcap"), "s_aux": sinks}
    found, _ = attention_forward(nn.Module(), q, k, v, mask, position_bias=bias, **options)
    # The same scores and values of heads that the kernels take.
    narrow = torch.linalg.qr(torch.cat([q.flatten(1, 2), k.flatten(1, 2)], 1).mT)[0][..., :36]
    narrow_q, narrow_k = ((x.flatten(1, 2) @ narrow).unflatten(1, x.shape[1:3]) for x in (q, k))
    expected = torch.cat(
        [
            attention_forward(nn.Module(), narrow_q, narrow_k, half, mask, position_bias=bias, **options)[0]
            for half in v.chunk(2, dim=-1)
        ],
        dim=-1,
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
