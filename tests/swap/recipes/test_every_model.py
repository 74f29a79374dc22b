"""Every model of transformers that can be built small: swapped, it says what it said before.

Model types that need packages which are not here, other inputs, or sizes that do not go together are left out; the test
holds the number that is left against what it was, so that it cannot shrink to nothing.
"""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from fastattn.swap import swap  # noqa: E402

pytestmark = pytest.mark.slow

VOCABULARY, LENGTH = 64, 9
_SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "projection_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "depth"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "rotary_dim"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "n_inner", "d_ff", "ffn_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "vocab_size"), VOCABULARY),
    "head_dim": 8,
    "d_kv": 8,
    "image_size": 32,
    "patch_size": 8,
    "moe_intermediate_size": 16,
    "index_topk": 4,
    "index_topk_blocks": 1,
    "index_block_size": 2,
    "attention_dropout": 0.0,
}
_IMAGES, _SOUND, _SPECTRA = "pixel_values", "input_values", "input_features"


def shrink(config: object) -> None:
    """Sets what is known to be a size, in the config and in those that it holds."""
    own = vars(config)
    for name, value in _SMALL.items():
        if type(own.get(name)) in (int, float):
            setattr(config, name, value)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"):
        if isinstance(own.get(name), int):
            setattr(config, name, 0 if name == "pad_token_id" else 1)
    kinds = own.get("layer_types")
    if isinstance(kinds, list) and kinds:
        others = [kind for kind in kinds if kind != kinds[0]]
        config.layer_types = [kinds[0], others[0] if others else kinds[0]]  # type: ignore[attr-defined]
    for value in list(own.values()):
        if isinstance(value, transformers.PretrainedConfig):
            shrink(value)


def small_model(model_type: str) -> nn.Module:
    config_class = transformers.CONFIG_MAPPING[model_type]
    config = config_class()
    shrink(config)
    model_class = transformers.MODEL_MAPPING[config_class]
    model_class = model_class[0] if isinstance(model_class, (list, tuple)) else model_class
    torch.manual_seed(0)
    model = model_class(config).eval()
    if sum(parameter.numel() for parameter in model.parameters()) > 30_000_000:
        raise ValueError("not small")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            nn.init.normal_(parameter, std=0.15)
    return model


def small_inputs(model: nn.Module) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    takes = inspect.signature(model.forward).parameters
    config = model.config
    ids = torch.randint(2, VOCABULARY - 4, (3, LENGTH), generator=draw)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, 6:], mask[2, :3] = 0, 0
    found = {
        "input_ids": lambda: {"input_ids": ids, "attention_mask": mask},
        _IMAGES: lambda: {_IMAGES: torch.randn(3, getattr(config, "num_channels", 3), 32, 32, generator=draw)},
        _SOUND: lambda: {_SOUND: torch.randn(3, 4000, generator=draw)},
        _SPECTRA: lambda: {_SPECTRA: torch.randn(3, getattr(config, "num_mel_bins", 80), 200, generator=draw)},
    }[model.main_input_name]()
    if "decoder_input_ids" in takes:
        found["decoder_input_ids"] = ids[:, :5]
    return {name: value for name, value in found.items() if name in takes}


def output(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Some models draw: which patches they hide, what noise they add."""
    torch.manual_seed(0)
    return tensors(model(**inputs))


def tensors(found: object) -> list[Tensor]:
    """The floating tensors of a model's output, caches left out."""
    if isinstance(found, Tensor):
        return [found] if found.is_floating_point() else []
    if hasattr(found, "items"):
        return [each for name, value in found.items() if "past" not in name for each in tensors(value)]
    return [each for value in found for each in tensors(value)] if isinstance(found, (list, tuple)) else []


def differs(found: Tensor, expected: Tensor, mask: Tensor) -> bool:
    """On tokens that are not padding, where the tensor has some."""
    if found.shape != expected.shape:
        return True
    if found.dim() >= 2 and found.shape[:2] == mask.shape:
        found, expected = found[mask.bool()], expected[mask.bool()]
    if not found.numel():
        return False
    difference = (found - expected).abs().nan_to_num(0.0)  # what was NaN may be a number now
    return float(difference.max()) > 1e-4 * float(expected.abs().nan_to_num().max())


# Held to sdpa, from which eager differs: pooling takes a token that is padding.
_POOL_PADDING = {"clip", "clip_text_model", "clipseg", "clipseg_text_model", "metaclip_2", "metaclip_2_text_model"}


def test_every_model_that_can_be_built_small() -> None:
    built, with_attention, wrong = 0, 0, []
    for model_type in transformers.CONFIG_MAPPING:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            try:
                model = small_model(model_type)
                inputs = small_inputs(model)
                eager = copy.deepcopy(model)
                eager.set_attn_implementation("eager")
                expected = output(model if model_type in _POOL_PADDING else eager, inputs)
            except Exception:  # of the model as it is: not ours to test
                continue
            built += 1
            report = swap(model)
            swapped = [row for row in report.rows if row.action == "swapped"]
            with_attention += any("attention" in row.kernel or "encoder_layer" in row.kernel for row in swapped)
            try:
                found = output(model, inputs)
            except Exception as error:
                wrong.append(f"{model_type}: {type(error).__name__}: {error}")
                continue
            mask = inputs.get("attention_mask", torch.ones(0, 0))
            pairs = zip(found, expected, strict=True)
            if any(differs(one, other, mask) for one, other in pairs):
                wrong.append(f"{model_type}: {[row.class_name + ' ' + row.kernel for row in swapped]}")
    print(f"{built} model types, attention swapped in {with_attention}")
    assert not wrong, "\n".join(wrong)
    assert built >= 250 and with_attention >= 200
