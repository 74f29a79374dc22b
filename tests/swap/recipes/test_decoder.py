"""The recipes of Llama and its relatives, and of GPT-2, against transformers' own models."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from fastattn.swap import NotSwapped, plan, swap  # noqa: E402

VOCABULARY = 64
_SHARED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", _SHARED),
    "llama with biases": ("Llama", {**_SHARED, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "mistral, window": ("Mistral", {**_SHARED, "sliding_window": 4}),
    "qwen2": ("Qwen2", _SHARED),
    "qwen3": ("Qwen3", {**_SHARED, "head_dim": 16}),
    "gemma": ("Gemma", {**_SHARED, "head_dim": 16}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}
families = pytest.mark.parametrize("family", _FAMILIES)
gated = pytest.mark.parametrize("family", [name for name in _FAMILIES if name != "gpt2"])


def tiny(family: str, **options: object) -> nn.Module:
    """An eval-mode language model of two layers, every weight drawn."""
    name, settings = _FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None, **{**settings, **options}
    )
    model = getattr(transformers, f"{name}{'LMHeadModel' if name == 'GPT2' else 'ForCausalLM'}")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.eval()


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def eager(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    return other


@families
def test_equals_eager_on_valid_tokens(family, batch, valid_difference) -> None:
    model = tiny(family)
    expected, original, keys = logits(eager(model), batch), logits(model, batch), list(model.state_dict())
    report = swap(model)
    with report.counting():
        found = logits(model, batch)
    assert torch.isfinite(found).all()
    assert valid_difference(found, expected) < 2e-5 * float(expected.abs().max())
    assert report.all_called
    assert not any(row.fallbacks for row in report.rows)
    assert list(model.state_dict()) == keys
    report.undo()
    assert torch.equal(logits(model, batch), original)


@families
def test_generates_what_eager_generates(family) -> None:
    """Prompts padded on the left, then one token at a time over the cache, past the window where there is one."""
    model = tiny(family)
    ids = torch.randint(2, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, :6] = 0, 0
    expected = eager(model).generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    swap(model)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), expected)


@families
def test_trains_as_the_original(family) -> None:
    settings = {"attention_dropout": 0.0} if family != "gpt2" else dict.fromkeys(("attn_pdrop", "resid_pdrop"), 0.0)
    model = tiny(family, **settings, **({"embd_pdrop": 0.0} if family == "gpt2" else {})).train()
    twin = eager(model)
    swap(model)
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(6))
    for each in (model, twin):
        each(input_ids=ids, labels=ids).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(parameter.grad, other.grad, atol=2e-5 * scale + 1e-8, rtol=0, msg=name)


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_err_as_little_as_the_original(family, dtype, batch, valid_difference) -> None:
    model = tiny(family)
    exact = logits(eager(model), batch)
    half = model.to(dtype)
    bound = 2 * valid_difference(logits(eager(half), batch).float(), exact)
    swap(half)
    assert valid_difference(logits(half, batch).float(), exact) <= bound


@gated
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_norms_of_two_dtypes(family, dtypes) -> None:
    """Input and weight; a float32 weight widens a half input, but Gemma's."""
    model = tiny(family).to(dtypes[1])
    original = copy.deepcopy(model)
    swap(model)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(7)).to(dtypes[0])
    found, expected = (each.model.layers[0].input_layernorm(x) for each in (model, original))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(
        found, expected, atol=0.0, rtol=2**-7 if torch.bfloat16 in (dtypes[0], found.dtype) else 1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compiles_as_one_graph(family, batch) -> None:
    model = tiny(family)
    swap(model)
    expected = logits(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(**batch, use_cache=False).logits
    assert torch.equal(found, expected)


@gated
def test_everything_is_swapped_and_named(family) -> None:
    model = tiny(family)
    names = [type(module).__name__ for module in model.modules()]
    report = swap(model, strict=True)
    kernels = {row.class_name.removeprefix(_FAMILIES[family][0]): row.kernel for row in report.rows}
    assert kernels == {"Attention": "attention", "RMSNorm": "rms_norm", "MLP": "gated_ffn"}
    assert [type(module).__name__ for module in model.modules()] == names


def test_parts_are_swapped_alone(batch) -> None:
    model = tiny("llama")
    assert {row.class_name for row in swap(model, norms=False, ffns=False).rows if row.action == "swapped"} == {
        "LlamaAttention"
    }


def test_gpt2_keeps_its_feed_forward_block_and_says_so() -> None:
    model = tiny("gpt2")
    left = [row for row in plan(model).rows if row.action == "left"]
    assert {(row.class_name, row.reason) for row in left} == {("GPT2MLP", "no recipe for class GPT2MLP")}
    with pytest.raises(NotSwapped, match="GPT2MLP"):
        swap(model, strict=True)


def test_an_activation_without_a_kernel_is_left_with_its_name() -> None:
    rows = swap(tiny("llama", hidden_act="mish")).rows
    reasons = {row.reason for row in rows if row.class_name == "LlamaMLP"}
    assert reasons == {"the activation MishActivation has no kernel"}


class _Adapted(nn.Linear):
    """A stand-in for what an adapter library puts in a linear's place."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1.0


@pytest.mark.parametrize("change", ["adapter", "hook"])
def test_changed_projections_are_called_and_counted(change, batch, valid_difference) -> None:
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    report = swap(model)
    if change == "adapter":
        mlp.up_proj.__class__ = _Adapted
    else:
        mlp.up_proj.register_forward_hook(lambda module, args, output: output + 1.0)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__class__ = vars(type(module)).get("fastattn_original", type(module))
    with report.counting():
        found = logits(model, batch)
    assert valid_difference(found, logits(eager(twin), batch)) < 1e-4
    (row,) = [row for row in report.rows if row.fallbacks]
    assert row.path == "model.layers.0.mlp"
    assert list(row.fallbacks) == [f"up_proj is a {__name__}._Adapted" if change == "adapter" else "up_proj has hooks"]


@families
def test_a_swapped_model_survives_deepcopy_and_save(family, batch) -> None:
    model = tiny(family)
    swap(model)
    expected = logits(model, batch)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(logits(other, batch), expected)
