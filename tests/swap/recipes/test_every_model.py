"""Every model of transformers that can be built small: swapped, it says what it said before, learns and generates so.

Model types that need packages which are not here, other inputs, or sizes that do not go together are left out; each
test holds the number that is left against what it was, so that it cannot shrink to nothing.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
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


def at_least(number: int, of_older: int) -> int:
    """How many models a test must have met, of this transformers and of those before 5.12."""
    return of_older if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 12) else number


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


def small_model(model_type: str, mapping: Mapping[type, Any] | None = None) -> nn.Module:
    """The model of a type, or that which `mapping` has for its config."""
    config_class = transformers.CONFIG_MAPPING[model_type]
    config = config_class()
    shrink(config)
    model_class = (transformers.MODEL_MAPPING if mapping is None else mapping)[config_class]
    model_class = model_class[0] if isinstance(model_class, (list, tuple)) else model_class
    with contextlib.suppress(NotImplementedError, RuntimeError, TypeError), torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(copy.deepcopy(config)).parameters())
        if count > 30_000_000:
            raise ValueError("not small")
    torch.manual_seed(0)
    model = model_class(config).eval()
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


def seed() -> None:
    """Some models draw: which patches they hide, what noise they add, what of a sound they mask, by NumPy."""
    torch.manual_seed(0)
    np.random.seed(0)


def output(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    seed()
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
    assert built >= at_least(250, 200) and with_attention >= at_least(200, 140)


def without_dropout(model: nn.Module) -> nn.Module:
    """In training, where nothing is drawn."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            rates = {} if holder is None else vars(holder)
            for name in [name for name, rate in rates.items() if "drop" in name and isinstance(rate, float)]:
                setattr(holder, name, 0.0)
    return model


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of all parameters, of what the model says on tokens that are not padding, weighted at random."""
    mask, draw = inputs.get("attention_mask", torch.ones(0, 0)), torch.Generator().manual_seed(5)
    loss = torch.zeros(())
    for found in output(model, inputs):
        weights = torch.randn(found.shape, generator=draw)
        if found.dim() >= 2 and found.shape[:2] == mask.shape:
            weights = weights * mask.view(*mask.shape, *[1] * (found.dim() - 2))
        loss = loss + (found * weights).sum()
    model.zero_grad()
    loss.backward()
    return {name: p.new_zeros(p.shape) if p.grad is None else p.grad for name, p in model.named_parameters()}


def test_every_model_that_can_be_built_small_learns_the_same() -> None:
    built, wrong = 0, []
    for model_type in transformers.CONFIG_MAPPING:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = without_dropout(small_model(model_type))
                inputs = small_inputs(model)
                swapped = copy.deepcopy(model)
                expected, again = gradients(model, inputs), gradients(model, inputs)
            except Exception:  # of the model as it is: not ours to test
                continue
            sizes = {name: float(one.abs().max()) for name, one in expected.items() if one.numel()}
            if any(float((again[name] - expected[name]).abs().max()) > 1e-4 * size for name, size in sizes.items()):
                continue  # it draws
            built += 1
            swap(swapped)
            try:
                found = gradients(swapped, inputs)
            except Exception as error:
                wrong.append(f"{model_type}: {type(error).__name__}: {error}")
                continue
            slack = 1e-5 * max(sizes.values())
            for name, size in sizes.items():
                if not float((found[name] - expected[name]).abs().max()) <= 2e-3 * size + slack:
                    wrong.append(f"{model_type}: {name}")
                    break
    print(f"{built} model types")
    assert not wrong, "\n".join(wrong)
    assert built >= at_least(240, 200)


def generated(model: nn.Module) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Tokens and logits after two prompts, of which one is padded on the left."""
    ids = torch.randint(2, VOCABULARY - 4, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    if model.config.is_encoder_decoder:
        model.generation_config.decoder_start_token_id = 1
    torch.manual_seed(0)
    found = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return found.sequences, found.logits


def test_every_model_that_can_be_built_small_generates_the_same() -> None:
    built, wrong = 0, []
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING):
        for model_type, config_class in transformers.CONFIG_MAPPING.items():
            if config_class not in mapping:
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    model = small_model(model_type, mapping)
                    tokens, expected = generated(model)
                except Exception:  # of the model as it is: not ours to test
                    continue
                built += 1
                swap(model)
                try:
                    own_tokens, found = generated(model)
                except Exception as error:
                    wrong.append(f"{model_type}: {type(error).__name__}: {error}")
                    continue
                start = tokens.shape[1] - len(expected)
                for i, (one, other) in enumerate(zip(found, expected, strict=True)):
                    seen = other.isfinite()
                    if not (one - other)[seen].abs().max() <= 2e-3 * other[seen].abs().max():
                        wrong.append(f"{model_type}: token {i}")
                        break
                    if not torch.equal(own_tokens[:, : start + i + 1], tokens[:, : start + i + 1]):
                        break  # two were as likely: what comes after differs
    print(f"{built} model types")
    assert not wrong, "\n".join(wrong)
    assert built >= at_least(130, 80)
