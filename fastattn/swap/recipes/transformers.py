"""Classes of transformers, and of code written for it.

InterfaceAttention   any attention whose forward asks the attention interface for its function
bert, t5             modules whose forwards branch, known in the original and its copies (RoBERTa, Electra, mT5, ...)
distilbert           its feed-forward block
experts, general_experts
                     experts of mixtures
pre_norm             layers of CLIP, SigLIP, ViT and their copies as one call
eager_bert, eager_bart, mpnet, bloom, mpt, gpt_neo, longformer, deberta
                     attention that asks no interface, in the original and its copies

Importing this file registers the attention interface, so that a swapped model that was saved whole runs when it is
loaded in a process that never called swap.
"""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

import torch
from torch import nn

from fastattn.integrations import transformers as interface
from fastattn.integrations.transformers_versions import weights_asked_for
from fastattn.nn.checks import why_not_head_dim
from fastattn.nn.counting import note_call
from fastattn.swap.reading import Reading
from fastattn.swap.recipe import Recipe, parameters
from fastattn.swap.recipes import (
    bert,
    bloom,
    deberta,
    distilbert,
    eager_bart,
    eager_bert,
    free_linear,
    gpt_neo,
    longformer,
    mpnet,
    mpt,
    pre_norm,
    t5,
)
from fastattn.swap.recipes.interface import gives_weights, note_interface, why_not_transformers
from fastattn.swap.recipes.linear import conv1d
from fastattn.swap.swapped import Swapped

try:
    from fastattn.swap.recipes import experts, general_experts
except ImportError:  # transformers 4.57 has no interface of experts
    _EXPERTS: tuple[Any, ...] = ()
else:
    _EXPERTS = (experts, general_experts)

_RECIPES: tuple[Any, ...] = (
    bert,
    eager_bert,
    eager_bart,
    t5,
    mpnet,
    bloom,
    mpt,
    gpt_neo,
    longformer,
    deberta,
    pre_norm,
    distilbert,
    *_EXPERTS,
)

interface.register()


class InterfaceAttention(Swapped):
    """The original forward, whose function the interface gives: the config that swap copied names fastattn's."""

    fastattn_runs_original = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        note_call(self)
        note_interface(self)
        if self.fastattn_forms_weights and kwargs.get("output_attentions") and not torch.compiler.is_compiling():
            with weights_asked_for():
                return super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class that is one of these."""
    if conv1d(module_class):
        return Reading(free_linear.Conv1D, free_linear.recipe)
    for recipes in _RECIPES:
        reading = recipes.read(module_class)
        if reading is not None:
            return reading
    return _interface_attention(module_class)


def _interface_attention(module_class: type[nn.Module]) -> Reading | None:
    forward = inspect.unwrap(module_class.forward)
    if not isinstance(forward, FunctionType):
        return None
    if not {"ALL_ATTENTION_FUNCTIONS", "config", "_attn_implementation"} <= set(forward.__code__.co_names):
        return None
    return Reading(InterfaceAttention, _interface_recipe)


def _interface_recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(
        swapped, kernels={"attention": "attention"}, refuse=_refuse_attention, interface=True, weighs=gives_weights
    )


def _refuse_attention(module: nn.Module) -> list[str]:
    reasons = []
    if not hasattr(getattr(module, "config", None), "_attn_implementation"):
        reasons.append("it has no config that names its attention implementation")
    else:
        reasons += why_not_transformers(module)
    forward: Any = inspect.unwrap(type(module).forward)
    eager = interface.eager_function(type(module))
    unknown = set() if eager is None else set(parameters(eager)) - _KNOWN_ARGUMENTS
    if unknown:
        reasons.append(f"its attention function takes {', '.join(sorted(unknown))}, which fastattn's does not")
    constants = _constants(forward)
    if "sdpa" in constants and "indices" not in constants:
        reasons.append('it gives its attention function another mask where that is "eager" or "sdpa"')
    is_told = hasattr(module, "is_causal") or "is_causal" in constants
    if not is_told and not any("mask" in name for name in parameters(forward)):
        reasons.append("it takes no mask, and does not say whether it is causal")
    widths = [width for name in _HEAD_DIMS if isinstance(width := getattr(module, name, 0), int)]
    too_wide = why_not_head_dim(max(widths))
    return reasons if too_wide is None else [*reasons, too_wide]


_KNOWN_ARGUMENTS = set(parameters(interface.attention_forward)) - {"sinks", "cache", "block_indices"} | {
    "sliding_window"  # the mask holds it already
}
_HEAD_DIMS = ("head_dim", "qk_head_dim", "v_head_dim")


def _constants(function: Any) -> set[object]:
    """The constants of a function, those of tuples one by one: values that it compares with, and names of the keyword
    arguments that it passes on."""
    found: set[object] = set()
    for value in function.__code__.co_consts:
        found |= set(value) if isinstance(value, tuple) else {value}
    return found
