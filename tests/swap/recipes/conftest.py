"""Families of models whose attention has a recipe of its own: a small one of each, what it is given, what it answers.

test_every_family.py holds every recipe to the same promises; a family's own file has what only that family does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from fastattn.swap.recipe import parameters

Inputs = dict[str, Tensor]
PADDINGS = ("none", "left", "right", "sides", "middle", "all")
GLOBAL_TOKENS = {  # of each of the samples
    "none": None,
    "first": [[0], [0], [0], [0]],
    "some": [[0, 5, 40], [], [20], [1, 2, 3]],
    "several at one window's edge": [[8, 9, 16, 17, 44], [15], [44], [7, 8]],
}


def padded(kind: str) -> Inputs:
    """Four samples of 13 tokens: one whole, the others padded on the left, on the right and in the middle."""
    ids = torch.randint(3, 64, (4, 13), generator=torch.Generator().manual_seed(1))
    if kind == "none":
        return {"input_ids": ids}
    mask = torch.ones(4, 13, dtype=torch.long)
    if kind in ("left", "sides", "all"):
        mask[1, :5] = 0
    if kind in ("right", "sides", "all"):
        mask[2, 8:] = 0
    if kind in ("middle", "all"):
        mask[3, 4:7] = 0
    return {"input_ids": ids, "attention_mask": mask}


def padded_with_decoder(kind: str) -> Inputs:
    given = padded(kind)
    return {**given, "decoder_input_ids": given["input_ids"][:, :6]}


def images(kind: str) -> Inputs:
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "decoder_input_ids": padded("none")["input_ids"][:, :6]}


def with_global_tokens(kind: str) -> Inputs:
    """Four samples of 45 tokens, no multiple of a window: whole, padded right, left, in the middle of a window."""
    ids = torch.randint(2, 64, (4, 45), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(4, 45, dtype=torch.long)
    mask[1, 30:], mask[2, :7], mask[3, 19:22] = 0, 0, 0
    given = {"input_ids": ids, "attention_mask": mask}
    places = GLOBAL_TOKENS[kind]
    if places is not None:
        given["global_attention_mask"] = torch.zeros_like(ids)
        for entry, each in enumerate(places):
            given["global_attention_mask"][entry, each] = 1
        given["global_attention_mask"] *= mask
    return given


@dataclass(frozen=True)
class Family:
    model: str  # classes of transformers
    config: str
    settings: dict[str, object]  # a small model without dropout
    kernels: dict[str, str]  # classes of the model, the attention's first, and what runs them
    hooked: str  # a linear of the attention
    dropout: str = "dropout"  # the attention's, a module or a rate
    attentions: int = 2
    std: float = 0.3  # of all weights: attention is then far from uniform
    inputs: Callable[[str], Inputs] = padded
    kinds: tuple[str, ...] = PADDINGS  # of inputs
    usual: str = "all"
    answer: str = "logits"
    weights: tuple[str, ...] = ("attentions",)  # of attention, in the model's output
    rows_of_padding: bool = False  # whether they are the original's too
    tolerance: float = 1e-5  # of the largest number
    gradients: float = 5e-5
    half: float = 1.5  # errors of the original in bfloat16
    least_gradient: float = 0.0  # what a bias of all keys gets is rounding: the scores of a query move together
    generations: tuple[dict[str, object], ...] = ()
    compilation: dict[str, object] = field(default_factory=lambda: {"fullgraph": True, "backend": "aot_eager"})
    compiled: tuple[str, ...] = ("all",)  # kinds of inputs
    fewer_layers: tuple[str, ...] = ()  # settings that are 1 where it is compiled: whose layers are all of one kind
    since_5_24: bool = False  # before, the cache has another name, and the attention is left alone

    def build(self, **options: object) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        settings = {**self.settings, **options}
        if self.config == "TrOCRConfig":
            vision = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1}
            encoder = transformers.ViTConfig(**vision, num_attention_heads=4, intermediate_size=48)
            decoder = transformers.TrOCRConfig(**settings, is_decoder=True, add_cross_attention=True)
            config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
            config.decoder_start_token_id, config.pad_token_id = 2, 0
        else:
            config = getattr(transformers, self.config)(**settings)
        model: nn.Module = getattr(transformers, self.model)(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=self.std)
        return model.eval()

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The attentions; a swapped class keeps its name."""
        (name, *_) = self.kernels
        return [module for module in model.modules() if type(module).__name__ == name]

    def set_dropout(self, model: nn.Module, rate: float) -> None:
        for module in self.modules(model):
            if isinstance(getattr(module, self.dropout), nn.Dropout):
                getattr(module, self.dropout).p = rate
            else:
                setattr(module, self.dropout, rate)

    def rows(self, report: object) -> list[object]:
        """Those of a report that tell of the attentions."""
        (name, *_) = self.kernels
        return [row for row in report.rows if row.class_name == name]

    def valid(self, found: Tensor, given: Inputs) -> Tensor:
        """Without the rows of padding, in dimension 1."""
        mask = given.get("attention_mask")
        return found if self.rows_of_padding or mask is None or found.shape[1] != mask.shape[1] else found[mask.bool()]

    def answers(self, model: nn.Module, given: Inputs, **more: object) -> list[Tensor]:
        """The tensors that tell two models apart."""
        if self.answer.endswith("hidden_states"):
            more["output_hidden_states"] = True
        found = model(**given, **more)[self.answer]
        return [self.valid(each, given) for each in ([found] if isinstance(found, Tensor) else found)]

    @torch.no_grad()
    def run(self, model: nn.Module, given: Inputs, **more: object) -> list[Tensor]:
        return self.answers(model, given, **more)

    @torch.no_grad()
    def attention_weights(self, model: nn.Module, given: Inputs, **more: object) -> list[Tensor]:
        """Of every layer, queries before heads."""
        found = model(**given, **more, output_attentions=True)
        weights = [each for name in self.weights for each in found[name]]
        queries = 1 if self.rows_of_padding else 2
        return [self.valid(each.transpose(1, queries), given) for each in weights]

    def drawn(self, model: nn.Module, given: Inputs, seed: int = 0) -> list[Tensor]:
        """The answers with what dropout draws from a seed."""
        torch.manual_seed(seed)
        return self.run(model, given)

    def assert_close(self, found: list[Tensor], expected: list[Tensor], tolerance: float | None = None) -> None:
        for one, other in zip(found, expected, strict=True):
            bound = (tolerance or self.tolerance) * float(other.abs().max())
            torch.testing.assert_close(one, other, atol=bound, rtol=0)

    def backward(self, model: nn.Module, given: Inputs) -> None:
        model.zero_grad()
        self.answers(model, given)[-1].square().sum().backward()

    def assert_same_gradients(self, model: nn.Module, twin: nn.Module) -> None:
        for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            if other.grad is None:
                assert parameter.grad is None, name
                continue
            bound = self.gradients * max(float(other.grad.abs().max()), self.least_gradient)
            torch.testing.assert_close(
                parameter.grad, other.grad, atol=bound, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


TOKENS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
BART = {
    **TOKENS,
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2,
}
DECODER = {
    "generations": ({}, {"num_beams": 3}, {"use_cache": False}),
    "compiled": ("none", "left"),
}


def bart(config: str, model: str, attention: str, settings: dict[str, object], **more: object) -> Family:
    """A copy of BART's attention that asks no interface."""
    return Family(
        model,
        config,
        {**BART, **settings},
        {attention: "attention + linear (q, k, v, out)"},
        hooked="v_proj",
        **{
            "attentions": 4,
            "weights": ("decoder_attentions", "cross_attentions"),
            "fewer_layers": ("encoder_layers", "decoder_layers"),
            **more,
        },
        generations=DECODER["generations"],
        compiled=("left",),
        std=0.2,
        tolerance=2e-5,
        gradients=1e-4,
        least_gradient=0.1,
        since_5_24=True,
    )


def bert(name: str, attention: str = "", **settings: object) -> Family:
    """A copy of BERT's self-attention that asks no interface."""
    return Family(
        f"{name}Model",
        f"{name}Config",
        {**ENCODER, "max_position_embeddings": 64, **settings},
        {attention or f"{name}SelfAttention": "attention + linear (q, k, v)"},
        hooked="key",
        std=0.2,
        answer="last_hidden_state",
        rows_of_padding=True,
        half=2.0,
        fewer_layers=("num_hidden_layers",),
        tolerance=2e-5,
        least_gradient=0.1,
    )


def deberta(**settings: object) -> Family:
    defaults = {
        "max_position_embeddings": 48,
        "relative_attention": True,
        "max_relative_positions": -1,
        "position_biased_input": False,
        "type_vocab_size": 0,
    }
    return Family(
        "DebertaV2Model",
        "DebertaV2Config",
        {**ENCODER, **defaults, **settings},
        {"DisentangledSelfAttention": "attention + linear (q, k, v, distances)"},
        hooked="key_proj",
        answer="last_hidden_state",
        fewer_layers=("num_hidden_layers",),
        tolerance=2e-5,
        gradients=1e-4,
        least_gradient=0.1,
    )


BOTH_WAYS = ["p2c", "c2p"]
FAMILIES = {
    "mpt": Family(
        "MptForCausalLM",
        "MptConfig",
        {
            **TOKENS,
            "d_model": 48,
            "n_layers": 2,
            "n_heads": 6,
            "expansion_ratio": 2,
            "max_seq_len": 40,
            "attn_config": {},
        },
        {"MptAttention": "attention + linear (Wqkv, out_proj)", "MptMLP": "ffn"},
        hooked="Wqkv",
        dropout="attn_dropout_p",
        since_5_24=True,
        fewer_layers=("n_layers",),
        **DECODER,
    ),
    "gpt_neo": Family(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **TOKENS,
            "hidden_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 96,
            "max_position_embeddings": 40,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
        },
        {"GPTNeoSelfAttention": "attention + linear (q, k, v, out)"},
        hooked="k_proj",
        dropout="attn_dropout",
        **DECODER,
    ),
    "bloom": Family(
        "BloomForCausalLM",
        "BloomConfig",
        {**TOKENS, "hidden_size": 48, "n_layer": 2, "n_head": 6},  # no power of two: ALiBi's slopes are of two series
        {"BloomAttention": "attention + linear (query_key_value, dense)", "BloomMLP": "ffn"},
        hooked="query_key_value",
        dropout="attention_dropout",
        generations=(*DECODER["generations"], {"cache_implementation": "static"}),
        compiled=DECODER["compiled"],
        fewer_layers=("n_layer",),
    ),
    "trocr": bart("TrOCRConfig", "VisionEncoderDecoderModel", "TrOCRAttention", {}, inputs=images, kinds=("none",)),
    "xglm": bart(
        "XGLMConfig",
        "XGLMForCausalLM",
        "XGLMAttention",
        {"num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 48},
        attentions=2,
        weights=("attentions",),
        fewer_layers=("num_layers",),
    ),
    "mvp": bart(
        "MvpConfig",
        "MvpForConditionalGeneration",
        "MvpAttention",
        {"max_position_embeddings": 48},
        attentions=6,
        inputs=padded_with_decoder,
    ),
    "led": bart(
        "LEDConfig",
        "LEDForConditionalGeneration",
        "LEDDecoderAttention",
        {"attention_window": 4, "max_encoder_position_embeddings": 48, "max_decoder_position_embeddings": 48},
        inputs=padded_with_decoder,
        compilation={"backend": "eager"},
        fewer_layers=("decoder_layers",),
    ),
    "megatron_bert": bert("MegatronBert"),
    "rembert": bert("RemBert"),
    "tapas": bert("Tapas"),
    "roformer": bert("RoFormer", embedding_size=32),
    "roformer, values too": bert("RoFormer", embedding_size=32, rotary_value=True),
    "visual_bert": bert("VisualBert"),
    "flava": bert("FlavaText", "FlavaSelfAttention"),
    "deberta": deberta(position_buckets=4, share_att_key=True, pos_att_type=BOTH_WAYS, norm_rel_ebd="layer_norm"),
    "deberta, far": deberta(position_buckets=32, share_att_key=True, pos_att_type=BOTH_WAYS),
    "deberta, own projections": deberta(position_buckets=4, share_att_key=False, pos_att_type=BOTH_WAYS),
    "deberta, no buckets": deberta(position_buckets=-1, max_relative_positions=6, pos_att_type=["c2p"]),
    "deberta, one way": deberta(position_buckets=4, share_att_key=True, pos_att_type=["p2c"]),
    "deberta, contents alone": deberta(pos_att_type=[]),
    "deberta, no distances": deberta(relative_attention=False, pos_att_type=["c2p"]),
    "longformer": Family(
        "LongformerModel",
        "LongformerConfig",
        {**ENCODER, "attention_window": [8, 16], "max_position_embeddings": 80},
        {"LongformerSelfAttention": "attention + linear (query, key, value, and those of global tokens)"},
        hooked="value_global",
        std=0.15,
        inputs=with_global_tokens,
        kinds=tuple(GLOBAL_TOKENS),
        usual="some",
        answer="hidden_states",
        weights=("attentions", "global_attentions"),
        rows_of_padding=True,
        gradients=2e-5,
        least_gradient=0.1,
        compilation={"backend": "eager"},
        compiled=("none", "first", "some"),
    ),
}


def checked(name: str) -> Family:
    pytest.importorskip("transformers")
    from transformers.models.mpt.modeling_mpt import MptAttention

    found = FAMILIES[name]
    if found.since_5_24 and "cache" not in parameters(MptAttention.forward):
        pytest.skip("before 5.24 the cache has another name, and the attention is left alone")
    return found


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    """Each of them; a file about one of them has a fixture of this name that gives it alone."""
    return checked(request.param)


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow) if "," in name or name == "led" else name for name in FAMILIES]
)
def compiled_family(request: pytest.FixtureRequest) -> Family:
    """Of a variant of a family, or of one whose attention is another's, the graph is seen by the slow tests alone."""
    return checked(request.param)


@pytest.fixture(params=[name for name, each in FAMILIES.items() if each.generations])
def generating(request: pytest.FixtureRequest) -> Family:
    return checked(request.param)


@pytest.fixture
def family_of() -> Callable[[str], Family]:
    """By its name."""
    return checked


@pytest.fixture
def eager() -> Callable[[nn.Module], nn.Module]:
    """A copy of a model, with transformers' own attention that forms its scores."""

    def copied(model: nn.Module) -> nn.Module:
        other = copy.deepcopy(model)
        other.set_attn_implementation("eager")
        return other

    return copied


@pytest.fixture
def one_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that reached the operator for whole layers."""
    from fastattn.swap.recipes import whole_layer

    shapes: list[tuple[int, ...]] = []
    real = whole_layer.encoder_layer

    def noted(x: Tensor, *weights: Tensor, **options: object) -> Tensor:
        shapes.append(tuple(x.shape))
        return real(x, *weights, **options)

    monkeypatch.setattr(whole_layer, "encoder_layer", noted)
    return shapes
