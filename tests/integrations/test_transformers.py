"""The attention and mask functions against the eager attention of transformers' own models, on valid rows."""

from __future__ import annotations

import copy
import itertools
import types

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from transformers import AttentionInterface, AttentionMaskInterface, masking_utils  # noqa: E402

from fastattn.integrations import transformers as fastattn_transformers  # noqa: E402
from fastattn.integrations import transformers_versions as versions  # noqa: E402
from fastattn.integrations.transformers import attention_forward, attention_mask, register  # noqa: E402

BATCH, LENGTH, VOCABULARY = 3, 11, 64
TOLERANCE = 2e-5
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
NO_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def bert(**options: object) -> nn.Module:
    config = transformers.BertConfig(**COMMON, intermediate_size=64, max_position_embeddings=64, **NO_TOKENS, **options)
    model_class = transformers.BertLMHeadModel if config.is_decoder else transformers.BertModel
    return build(model_class, config)


def llama(**options: object) -> nn.Module:
    config = transformers.LlamaConfig(**COMMON, intermediate_size=64, num_key_value_heads=2, **NO_TOKENS, **options)
    return build(transformers.LlamaForCausalLM, config)


def mistral(**options: object) -> nn.Module:
    config = transformers.MistralConfig(
        **COMMON, intermediate_size=64, num_key_value_heads=2, sliding_window=4, **NO_TOKENS, **options
    )
    return build(transformers.MistralForCausalLM, config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64, **NO_TOKENS)
    return build(transformers.GPT2LMHeadModel, config)


def gemma2() -> nn.Module:
    config = transformers.Gemma2Config(
        **COMMON,
        intermediate_size=64,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        attn_logit_softcapping=2.0,
        **NO_TOKENS,
    )
    return build(transformers.Gemma2ForCausalLM, config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        **COMMON,
        intermediate_size=32,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        num_local_experts=2,
        num_experts_per_tok=1,
        **NO_TOKENS,
    )
    return build(transformers.GptOssForCausalLM, config)


def modernbert() -> nn.Module:
    config = transformers.ModernBertConfig(**COMMON, intermediate_size=64, local_attention=6, **NO_TOKENS)
    return build(transformers.ModernBertModel, config)


def build(model_class: type, config: object) -> nn.Module:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = model_class(config)
    for parameter in model.parameters():  # large enough that attention is far from uniform
        nn.init.normal_(parameter, std=0.15)
    return model.eval()


def padding(kind: str) -> Tensor | None:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if kind == "none":
        return None
    if kind == "left":
        mask[0, :4] = 0
        mask[1, :1] = 0
    if kind == "right":
        mask[0, 6:] = 0
        mask[2, 10:] = 0
    if kind == "middle":
        mask[0, 3:6] = 0
        mask[1, 0] = 0
    if kind == "all of a sample":
        mask[1] = 0
        mask[0, 7:] = 0
    return mask


PADDINGS = ("none", "full", "left", "right", "middle", "all of a sample")


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(2, VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(1))


def with_fastattn(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.set_attn_implementation("fastattn")
    return other


def first_output(model: nn.Module, **inputs: object) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def assert_same_on_valid_rows(found: Tensor, expected: Tensor, mask: Tensor | None) -> None:
    if mask is not None:
        found, expected = found[mask.bool()], expected[mask.bool()]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


MODELS = {
    "bert": bert,
    "bert decoder": lambda: bert(is_decoder=True),
    "llama": llama,
    "mistral": mistral,
    "gpt2": gpt2,
    "gemma2": gemma2,
    "gpt_oss": gpt_oss,
    "modernbert": modernbert,
}


@pytest.mark.parametrize("name", MODELS)
def test_model_equals_eager_for_every_padding(name: str) -> None:
    model = MODELS[name]()
    swapped = with_fastattn(model)
    for kind in PADDINGS:
        mask = padding(kind)
        inputs = {"input_ids": tokens(), "attention_mask": mask}
        found, expected = first_output(swapped, **inputs), first_output(model, **inputs)
        assert torch.isfinite(found).all(), kind
        assert_same_on_valid_rows(found, expected, mask)


IS_NEW = int(transformers.__version__.partition(".")[0]) >= 5
through_the_interface = pytest.mark.skipif(not IS_NEW, reason="BERT and Bloom of transformers 4 ask no interface")


@through_the_interface
def test_a_mask_of_another_length_that_hides_nothing_is_none() -> None:
    """As transformers' sdpa takes it; where it hides something, it is wrong for both."""
    model, longer = bert(), torch.ones(BATCH, LENGTH + 3, dtype=torch.long)
    expected = first_output(model, input_ids=tokens())
    torch.testing.assert_close(
        first_output(with_fastattn(model), input_ids=tokens(), attention_mask=longer), expected, atol=TOLERANCE, rtol=0
    )
    longer[0, 2] = 0
    with pytest.raises(ValueError, match="does not broadcast"):
        first_output(with_fastattn(model), input_ids=tokens(), attention_mask=longer)


@through_the_interface
def test_the_models_reach_the_attention_function(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []

    def spy(module, query, key, value, mask, **kwargs):
        masks.append(mask)
        return attention_forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "fastattn", spy)
    first_output(with_fastattn(bert()), input_ids=tokens())
    first_output(with_fastattn(bert()), input_ids=tokens(), attention_mask=padding("right"))
    first_output(with_fastattn(mistral()), input_ids=tokens(), attention_mask=padding("left"))
    first_output(with_fastattn(llama()), input_ids=tokens(), attention_mask=padding("full"))
    shapes = [None if mask is None else (tuple(mask.shape), mask.dtype) for mask in masks]
    assert shapes[::2] == shapes[1::2]  # two layers each
    assert shapes[::2] == [
        None,
        ((BATCH, 1, 1, LENGTH), torch.bool),
        ((BATCH, 1, LENGTH, 2), torch.int32),
        None,
    ]


@pytest.mark.parametrize("kind", ("none", "right", "middle", "all of a sample"))
def test_cross_attention(kind: str) -> None:
    model = bert(is_decoder=True, add_cross_attention=True)
    states = torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(2))
    encoder_mask = padding(kind)
    inputs = {
        "input_ids": tokens(7),
        "attention_mask": padding("left")[:, :7],
        "encoder_hidden_states": states,
        "encoder_attention_mask": encoder_mask,
    }
    found, expected = first_output(with_fastattn(model), **inputs), first_output(model, **inputs)
    rows = inputs["attention_mask"].bool()
    if encoder_mask is not None:  # eager averages over a wholly padded encoder sample, where there is nothing to see
        rows = rows & encoder_mask.any(-1, keepdim=True)
    assert_same_on_valid_rows(found, expected, rows)


@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("kind", ("none", "left"))
@pytest.mark.parametrize("name", ("llama", "mistral", "gpt2", "bert decoder"))
def test_generate(name: str, kind: str, cache: str) -> None:
    if name == "bert decoder" and cache == "static" and not IS_NEW:
        pytest.skip("transformers 4 gives BERT a mask that BERT refuses")
    model = MODELS[name]()
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "cache_implementation": cache,
        "disable_compile": True,
        "attention_mask": padding(kind) if kind != "none" else torch.ones(BATCH, LENGTH, dtype=torch.long),
    }
    with torch.no_grad():
        expected = model.generate(tokens(), **options)
        found = with_fastattn(model).generate(tokens(), **options)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=TOLERANCE, rtol=0)
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("name", ("llama", "mistral"))
def test_cached_chunk_of_several_tokens(name: str) -> None:
    """A second chunk, attended from an offset, with left padding in the first one."""
    model, mask = MODELS[name](), padding("left")
    swapped, ids, outputs = with_fastattn(model), tokens(), []
    for each in (model, swapped):
        with torch.no_grad():
            cache = each(ids[:, :6], attention_mask=mask[:, :6], use_cache=True).past_key_values
            outputs.append(each(ids[:, 6:], attention_mask=mask, past_key_values=cache).logits)
    assert_same_on_valid_rows(outputs[1], outputs[0], mask[:, 6:])


@pytest.mark.parametrize("name", ("llama", "mistral"))
def test_packed_position_ids(name: str) -> None:
    model = MODELS[name]()
    positions = torch.tensor([[*range(5), *range(4), *range(2)]]).expand(BATCH, -1)
    inputs = {"input_ids": tokens(), "position_ids": positions, "use_cache": False}
    swapped = with_fastattn(model)
    found = first_output(swapped, **inputs)
    torch.testing.assert_close(found, first_output(model, **inputs), atol=TOLERANCE, rtol=0)
    alone = first_output(swapped, input_ids=tokens()[:, 5:9], use_cache=False)
    torch.testing.assert_close(found[:, 5:9], alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", (torch.bool, torch.float32))
def test_mask_given_by_the_user(dtype: torch.dtype) -> None:
    visible = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.6
    visible |= torch.eye(LENGTH, dtype=torch.bool)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    model = llama()
    found = first_output(
        with_fastattn(model), input_ids=tokens(), attention_mask=visible if dtype == torch.bool else additive
    )
    expected = first_output(model, input_ids=tokens(), attention_mask=additive)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_t5_position_bias_and_its_gradient() -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=VOCABULARY, dropout_rate=0.0
    )
    model = build(transformers.T5Model, config)
    gradients, outputs = [], []
    for each in (model, with_fastattn(model)):
        out = each(input_ids=tokens(), attention_mask=padding("right"), decoder_input_ids=tokens(5)).last_hidden_state
        out.square().sum().backward()
        table = each.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        gradients.append(table.grad)
        outputs.append(out.detach())
    torch.testing.assert_close(outputs[1], outputs[0], atol=TOLERANCE, rtol=0)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4 * float(gradients[0].abs().max()), rtol=0)


@pytest.mark.parametrize("kind", ("none", "left"))
@pytest.mark.parametrize("name", ("bert", "llama", "mistral"))
def test_compiled_without_graph_breaks(name: str, kind: str) -> None:
    model, mask = MODELS[name](), padding(kind)
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    if name != "bert":
        inputs["use_cache"] = False
    torch._dynamo.reset()
    compiled = torch.compile(with_fastattn(model), fullgraph=True, backend="aot_eager")
    assert_same_on_valid_rows(first_output(compiled, **inputs), first_output(model, **inputs), mask)


def test_training_gradients_equal_eager() -> None:
    model = llama()
    gradients = []
    for each in (model, with_fastattn(model)):
        ids = tokens()
        each(ids, attention_mask=padding("right"), labels=ids.masked_fill(padding("right") == 0, -100)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in each.named_parameters()})
    for name, expected in gradients[0].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-4 * scale + 1e-7, rtol=0, msg=name)


@pytest.mark.parametrize("name", ("llama", "mistral", "gpt2"))
def test_gradients_per_sample_equal_eager(name: str) -> None:
    """Under torch.vmap nobody may read whether there is padding."""
    model, mask = MODELS[name](), padding("right")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradients = []
    for each in (model, with_fastattn(model)):

        def loss(weights: dict[str, Tensor], ids: Tensor, seen: Tensor, each: nn.Module = each) -> Tensor:
            inputs = {"input_ids": ids[None], "attention_mask": seen[None], "use_cache": False}
            out = torch.func.functional_call(each, weights, (), inputs)[0]
            return (out.square() * seen[None, :, None]).sum()

        gradients.append(torch.vmap(torch.func.grad(loss), (None, 0, 0))(weights, tokens(), mask))
    for name, expected in gradients[0].items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-4 * scale + 1e-7, rtol=0, msg=name)


@through_the_interface
def test_a_model_that_never_calls_the_interface_keeps_its_mask() -> None:
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY)
    model = build(transformers.BloomForCausalLM, config)
    other = copy.deepcopy(model)
    other.config._attn_implementation = "fastattn"  # what from_pretrained(attn_implementation=...) does
    fastattn_transformers._known_masks.clear()
    inputs = {"input_ids": tokens(), "attention_mask": padding("left")}
    with pytest.warns(UserWarning, match="BloomModel never calls the attention interface"):
        found = first_output(other, **inputs)
    assert_same_on_valid_rows(found, first_output(model, **inputs), padding("left"))


_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "dropout": 0.0,
}


@pytest.mark.parametrize("mask", ["none", "right"])
@pytest.mark.parametrize("name", ["NllbMoe", "PegasusX", "BigBirdPegasus"])
def test_models_that_do_not_support_sdpa(name: str, mask: str) -> None:
    """Their code reads the masks (NLLB-MoE's router), or does not say what no mask means (Pegasus-X's decoder)."""
    config = getattr(transformers, f"{name}Config")(**_SEQ2SEQ, **({"num_experts": 4} if name == "NllbMoe" else {}))
    model = build(getattr(transformers, f"{name}Model"), config)
    model.set_attn_implementation("eager")
    ids = tokens()
    inputs = {
        "input_ids": ids,
        "attention_mask": padding(mask),
        "decoder_input_ids": ids,
        "decoder_attention_mask": padding(mask),
    }
    found, expected = (first_output(each, **inputs) for each in (with_fastattn(model), model))
    assert_same_on_valid_rows(found, expected, padding(mask))


@pytest.mark.parametrize("mask", ["none", "right"])
@pytest.mark.filterwarnings("error:Dynamo")
def test_a_compiled_model_that_does_not_support_sdpa(mask: str) -> None:
    config = transformers.BigBirdPegasusConfig(**_SEQ2SEQ)
    model = build(transformers.BigBirdPegasusModel, config)
    ids, given = tokens(), padding(mask)
    inputs = {"input_ids": ids, "decoder_input_ids": ids, "attention_mask": given, "decoder_attention_mask": given}
    with torch.no_grad():
        expected = first_output(model, **inputs)
        torch._dynamo.reset()
        found = first_output(torch.compile(with_fastattn(model), backend="aot_eager"), **inputs)
    assert_same_on_valid_rows(found, expected, given)


def test_one_sink_per_query_is_refused() -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="sinks: the fastattn attention takes one sink per head"):
        attention_forward(types.SimpleNamespace(is_causal=False), q, q, q, None, sinks=torch.zeros(1, 2, 3, 1))


def test_output_attentions_warns_and_gives_none(caplog: pytest.LogCaptureFixture) -> None:
    module = types.SimpleNamespace(is_causal=False)
    q = torch.randn(1, 2, 3, 8)
    fastattn_transformers.logger.addHandler(caplog.handler)
    fastattn_transformers.logger.warning_once.cache_clear()
    try:
        _, weights = attention_forward(module, q, q, q, None, output_attentions=True)
    finally:
        fastattn_transformers.logger.removeHandler(caplog.handler)
    assert weights is None
    assert "output_attentions" in caplog.text


# ---- the attention function alone ------------------------------------------------------------------------------------


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


@pytest.mark.parametrize(
    ("attribute", "asked", "len_q", "len_k", "causal"),
    [
        (True, None, 5, 5, True),
        (False, None, 5, 5, False),
        (None, None, 5, 5, True),
        (True, False, 5, 5, False),
        (False, True, 5, 5, True),
        (True, None, 1, 5, False),
        (True, None, 3, 5, True),
        (True, None, 5, 3, True),
    ],
)
def test_is_causal_rule(attribute: bool | None, asked: bool | None, len_q: int, len_k: int, causal: bool) -> None:
    module = types.SimpleNamespace() if attribute is None else types.SimpleNamespace(is_causal=attribute)
    q, k, v = draw(2, 4, len_q, 8), draw(2, 2, len_k, 8, seed=1), draw(2, 2, len_k, 6, seed=2)
    bias = draw(1, 4, len_q, len_k, seed=3)
    out, weights = attention_forward(module, q, k, v, None, is_causal=asked, position_bias=bias, unknown=1)
    visible = torch.ones(len_q, len_k, dtype=torch.bool).tril() if causal else None
    torch.testing.assert_close(out, plain_attention(q, k, v, visible, bias), atol=TOLERANCE, rtol=0)
    assert weights is None
    assert out.shape == (2, len_q, 4, 6)
    assert out.is_contiguous()


def test_a_mask_switches_is_causal_off() -> None:
    module = types.SimpleNamespace(is_causal=True)
    q = draw(2, 2, 4, 8)
    keys = torch.tensor([[True, True, True, False], [False, True, True, True]])[:, None, None]
    out, _ = attention_forward(module, q, q, q, keys)
    torch.testing.assert_close(out, plain_attention(q, q, q, keys), atol=TOLERANCE, rtol=0)


def test_one_batch_of_queries_for_all_keys() -> None:
    module = types.SimpleNamespace(is_causal=False)
    q, k = draw(1, 2, 4, 8), draw(3, 2, 5, 8, seed=1)
    out, _ = attention_forward(module, q, k, k, None)
    torch.testing.assert_close(out, plain_attention(q.expand(3, -1, -1, -1), k, k), atol=TOLERANCE, rtol=0)


def test_paged_cache_is_refused() -> None:
    q = draw(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"cache: .*paged.*sdpa"):
        attention_forward(types.SimpleNamespace(), q, q, q, None, cache=object())


def test_mask_of_another_implementation_is_refused() -> None:
    q = draw(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"attention_mask: expected None or a 4-D tensor, got shape \(1, 4\)"):
        attention_forward(types.SimpleNamespace(), q, q, q, torch.ones(1, 4, dtype=torch.bool))


def test_register_twice_is_the_same() -> None:
    register()
    register()
    assert AttentionInterface._global_mapping["fastattn"] is attention_forward
    assert AttentionMaskInterface._global_mapping["fastattn"] is versions.taking_positions(attention_mask)


@pytest.mark.parametrize("shape", ((4,), (1, 4, 1, 1), (BATCH, 4, 1, 1)))
@pytest.mark.parametrize("dim", (8, 260))  # of a kernel, and of torch's attention
def test_a_head_mask_multiplies_the_weights_of_each_head(shape: tuple[int, ...], dim: int) -> None:
    q, k, v = (torch.randn(BATCH, 4, LENGTH, dim) for _ in range(3))
    head_mask = torch.rand(shape)
    found, weights = attention_forward(nn.Module(), q, k, v, None, scaling=0.1, is_causal=False, head_mask=head_mask)
    eager = (q @ k.transpose(-1, -2) * 0.1).softmax(-1) * head_mask.reshape(-1, 4, 1, 1)
    torch.testing.assert_close(found, (eager @ v).transpose(1, 2), atol=TOLERANCE, rtol=0)
    assert weights is None


@pytest.mark.parametrize("positions", ([8, 9, 10, 11], [8, 10, 9, 11], [8, 8, 9, 11], [8, 9, 11, 12], [3, 4, 5, 6]))
def test_queries_at_any_positions(positions: list[int]) -> None:
    """As transformers up to 5.3 tells mask functions where queries stand: in trees they do not follow one another."""
    found = versions._first(torch.tensor(positions))
    follow = positions == list(range(positions[0], positions[0] + len(positions)))
    assert found == (positions[0] if follow else None)
    assert versions._first(torch.tensor(positions, device="meta")) is None


# ---- the mask function alone -----------------------------------------------------------------------------------------


def dense_of(mask: Tensor, kv_length: int) -> Tensor:
    """Key ranges as a bool mask; a bool mask as it is."""
    if mask.dtype == torch.bool:
        return mask
    keys = torch.arange(kv_length)
    return (keys >= mask[..., 0:1]) & (keys < mask[..., 1:2])


FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "window 1": masking_utils.sliding_window_causal_mask_function(1),
    "window 3": masking_utils.sliding_window_causal_mask_function(3),
    "window 100": masking_utils.sliding_window_causal_mask_function(100),
}
if hasattr(masking_utils, "sliding_window_bidirectional_mask_function"):
    FUNCTIONS["both sides 2"] = masking_utils.sliding_window_bidirectional_mask_function(2)

looks_both_ways = pytest.mark.skipif(
    versions.bidirectional_mask_function is None, reason="this transformers makes no masks of attention both ways"
)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_key_ranges_say_what_the_dense_mask_says(name: str) -> None:
    function = FUNCTIONS[name]
    offsets = [(0, 0), (3, 0), (7, 4), (torch.tensor(3), 0)]
    for (q_offset, kv_offset), kind, kv_length in itertools.product(offsets, PADDINGS, (2, 5, LENGTH)):
        seen = padding(kind)
        shape = {
            "batch_size": BATCH,
            "q_length": 4,
            "kv_length": kv_length,
            "q_offset": q_offset,
            "kv_offset": kv_offset,
            "mask_function": function,
            "attention_mask": None if seen is None else seen.bool(),
        }
        expected = versions.sdpa_mask(**shape, allow_is_causal_skip=False)
        found = attention_mask(**shape)
        case = f"{name} {shape}"
        if found is None:
            # None leaves it to is_causal: top-left causal, or everything visible.
            triangle = torch.ones(4, kv_length, dtype=torch.bool)
            meant = triangle if name == "both sides 2" else triangle.tril()
            assert (meant == expected).all(), case
            continue
        assert found.shape[0] == BATCH, case
        assert torch.equal(dense_of(found, kv_length), expected), case
        if kind != "middle":
            assert found.dtype == torch.int32, case


def test_one_query_and_no_mask_sees_everything() -> None:
    assert attention_mask(2, 1, 5, q_offset=4) is None
    assert attention_mask(2, 1, 6, q_offset=4) is not None


@looks_both_ways
def test_bidirectional_forms() -> None:
    options = {
        "mask_function": versions.bidirectional_mask_function,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": True,
    }
    assert attention_mask(BATCH, 5, LENGTH, **options) is None
    seen = padding("middle").bool()
    found = attention_mask(BATCH, 5, LENGTH, attention_mask=seen, **options)
    assert torch.equal(found, seen[:, None, None, :])
    assert found.data_ptr() == seen.data_ptr()  # a view: nothing is built
    longer = attention_mask(BATCH, 5, LENGTH + 2, attention_mask=seen, **options)
    assert torch.equal(longer[..., :LENGTH], found)
    assert not longer[..., LENGTH:].any()


def test_whatever_is_not_recognised_is_dense() -> None:
    causal = masking_utils.causal_mask_function
    window = masking_utils.sliding_window_overlay(3)
    strange = [
        masking_utils.or_masks(causal, window),
        masking_utils.and_masks(window, causal, causal),
        masking_utils.and_masks(causal, window),
        masking_utils.and_masks(window, versions.bidirectional_mask_function or window),
        masking_utils.chunked_causal_mask_function(3, torch.zeros(BATCH, dtype=torch.long)),
        masking_utils.and_masks(
            masking_utils.packed_sequence_mask_function(torch.tensor([0, 0, 0, 1, 1, 1]).expand(BATCH, -1)), causal
        ),
        lambda b, h, q, k: k <= q,
    ]
    for function in strange:
        found = attention_mask(BATCH, 6, 6, mask_function=function)
        shape = {"batch_size": BATCH, "q_length": 6, "kv_length": 6, "mask_function": function}
        expected = versions.sdpa_mask(**shape, allow_is_causal_skip=False)
        assert found.dtype == torch.bool
        assert torch.equal(found, expected)


def test_a_caller_that_combines_masks_gets_a_dense_one() -> None:
    for function in {masking_utils.causal_mask_function, versions.bidirectional_mask_function} - {None}:
        found = attention_mask(2, 4, 4, mask_function=function, allow_is_causal_skip=False)
        assert found.dtype == torch.bool
        assert found.shape == (2, 1, 4, 4)
