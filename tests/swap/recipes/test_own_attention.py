"""Models of transformers in which the user has put attention, masks or hooks of their own: they stay, and get what they
got before."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import create_causal_mask, sdpa_mask  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.models.bert import modeling_bert  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

import fastattn  # noqa: E402
from fastattn.swap import SwapReport  # noqa: E402

WORDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones(2, 12, dtype=torch.int64)
PADDED[0, :4] = 0  # on the left


def llama(attention: str, kind: type[nn.Module] = transformers.LlamaForCausalLM) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        attn_implementation=attention,
    )  # fmt: skip
    return drawn(lambda: kind(config))


def bert(attention: str = "sdpa") -> Any:
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        attn_implementation=attention,
    )  # fmt: skip
    return drawn(lambda: transformers.BertModel(config))


def drawn(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def answers(model: Any, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found = model(WORDS, attention_mask=mask)
    found = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return found if mask is None else found[mask.bool()]


def assert_same(one: Any, other: Any, mask: Tensor | None = None) -> None:
    torch.testing.assert_close(answers(one, mask), answers(other, mask), atol=2e-5, rtol=1e-4)


def attention_reasons(report: SwapReport) -> set[str]:
    return {row.reason for row in report.rows if row.path.endswith("self_attn") and row.action == "left"}


# ---- functions of the user's own -------------------------------------------------------------------------------------


def cooled(module: nn.Module, query: Tensor, *args: Any, scaling: float, **options: Any) -> Any:
    return sdpa_attention_forward(module, query, *args, scaling=scaling * 0.25, **options)


def windowed(*args: Any, **options: Any) -> Tensor:
    mask = sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})
    queries, keys = mask.shape[-2:]
    return mask & (torch.arange(keys) > torch.arange(queries)[:, None] - 3)


@pytest.mark.parametrize("kind", ["attention", "mask"])
def test_a_registered_function_stays(kind: str) -> None:
    AttentionInterface.register("the user's", cooled if kind == "attention" else sdpa_attention_forward)
    AttentionMaskInterface.register("the user's", windowed if kind == "mask" else sdpa_mask)
    plain, swapped = llama("the user's"), llama("the user's")
    report = fastattn.swap(swapped)
    assert attention_reasons(report) == {
        f'the {kind} function "the user\'s" that its config asks for is not one of transformers'
    }
    assert_same(swapped, plain)


def test_a_function_in_the_place_of_sdpas_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", cooled)
    plain, swapped = llama("sdpa"), llama("sdpa")
    assert len(attention_reasons(fastattn.swap(swapped))) == 1
    assert_same(swapped, plain)


def test_a_replaced_eager_function_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = modeling_llama.eager_attention_forward

    def colder(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        return eager(module, query, key, value, attention_mask, scaling * 0.25, dropout, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", colder)
    plain, swapped = llama("eager"), llama("eager")
    assert attention_reasons(fastattn.swap(swapped)) == {"its eager_attention_forward is not known"}
    assert_same(swapped, plain)


def test_a_function_in_the_place_of_torchs_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, torchs = [], F.scaled_dot_product_attention

    def theirs(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        return torchs(*args, **options) * 0.5

    plain, swapped = bert(), bert()
    report = fastattn.swap(swapped)
    monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    expected = answers(plain, PADDED)
    assert len(calls) == 2
    with report.counting():
        torch.testing.assert_close(answers(swapped, PADDED), expected, atol=2e-5, rtol=1e-4)
    assert len(calls) == 4
    (reason,) = {name for row in report.rows for name in row.fallbacks}
    assert reason == "torch's scaled_dot_product_attention was replaced"


# ---- others who read the masks ---------------------------------------------------------------------------------------


def own_forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
    """Attention that adds a mask, or asks torch's function, as those of "eager" and "sdpa" take it."""
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k, v = (
        project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
    if self.config._attn_implementation == "sdpa" or attention_mask is None or attention_mask.dtype is torch.bool:
        is_causal = attention_mask is None and q.shape[2] > 1 and self.reads_none
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, is_causal=is_causal)
    else:
        out = (q @ k.transpose(2, 3) * self.scaling + attention_mask).softmax(-1) @ v
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


class OwnAttention(modeling_llama.LlamaAttention):
    forward = own_forward


def put_in(model: Any, how: str, attention: str) -> None:
    layer = model.model.layers[1].self_attn
    layer.reads_none = attention == "sdpa"  # eager gives a mask always
    if how == "class":
        layer.__class__ = OwnAttention
    else:
        layer.forward = types.MethodType(own_forward, layer)


@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["class", "instance"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_of_ones_own_gets_the_masks_that_it_got(
    attention: str, how: str, when: str, mask: Tensor | None
) -> None:
    plain, swapped = llama(attention), llama(attention)
    put_in(plain, how, attention)
    if when == "before":
        put_in(swapped, how, attention)
    fastattn.swap(swapped)
    if when == "after":
        put_in(swapped, how, attention)
    assert_same(swapped, plain, mask)


class EditsItsMask(transformers.LlamaModel):
    """A prefix of four that all see."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        states = self.embed_tokens(input_ids)
        position_ids = torch.arange(states.shape[1])[None]
        mask = create_causal_mask(self.config, states, attention_mask, past_key_values=None)
        if mask is None:
            mask = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool).tril().expand(len(states), 1, -1, -1)
        mask = mask.clone()
        mask[:, :, :4, :4] = True if mask.dtype is torch.bool else 0.0
        rotary = self.rotary_emb(states, position_ids)
        for layer in self.layers:
            states = layer(states, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary)
        return transformers.modeling_outputs.BaseModelOutput(self.norm(states))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_may_edit_its_mask(attention: str) -> None:
    plain, swapped = llama(attention, EditsItsMask), llama(attention, EditsItsMask)
    report = fastattn.swap(swapped)
    assert not attention_reasons(report)
    assert_same(swapped, plain)
    assert_same(swapped, plain, PADDED)


@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
def test_a_hook_may_edit_the_mask(mask: Tensor | None) -> None:
    def knock_out(module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        seen = options["attention_mask"].clone()
        seen[..., -1, 6] = torch.finfo(seen.dtype).min
        return args, {**options, "attention_mask": seen}

    plain, swapped = llama("eager"), llama("eager")
    fastattn.swap(swapped)
    before = answers(swapped, mask)
    for model in (plain, swapped):
        model.model.layers[0].self_attn.register_forward_pre_hook(knock_out, with_kwargs=True)
    assert_same(swapped, plain, mask)
    assert (answers(swapped, mask) - before).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_part_whose_own_swap_is_undone(attention: str) -> None:
    plain, swapped = llama(attention), llama(attention)
    inner = fastattn.swap(swapped.model.layers[0])
    fastattn.swap(swapped)
    inner.undo()
    assert_same(swapped, plain, PADDED)


# ---- classes that are patched after the swap -------------------------------------------------------------------------


@contextmanager
def patched(kind: type[nn.Module], name: str) -> Iterator[None]:
    before = getattr(kind, name)

    def halved(self: Any, *args: Any, **options: Any) -> Any:
        y = before(self, *args, **options)
        return (y[0] * 0.5, *y[1:]) if isinstance(y, tuple) else y * 0.5

    def halved_rows(self: Any, attention_output: Tensor) -> Tensor:  # whose parameters transformers counts
        return halved(self, attention_output)

    setattr(kind, name, halved if name == "forward" else halved_rows)
    try:
        yield
    finally:
        setattr(kind, name, before)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("BertSelfAttention", "forward"), ("BertLayer", "forward"), ("BertLayer", "feed_forward_chunk")],
)
def test_what_a_class_is_given_after_the_swap_is_called(kind: str, name: str) -> None:
    plain, early, late = bert(), bert(), bert()
    fastattn.swap(early)
    before = answers(early)
    with patched(getattr(modeling_bert, kind), name):
        fastattn.swap(late)
        assert (answers(plain) - before).abs().max() > 1e-2
        assert_same(early, plain)
        assert_same(late, plain)
    torch.testing.assert_close(answers(early), before, atol=0.0, rtol=0.0)
