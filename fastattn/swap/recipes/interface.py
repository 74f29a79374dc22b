"""What attention that comes through the interface of transformers has in common."""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastattn.integrations.transformers import NAME, eager_function
from fastattn.nn.counting import note_fallback
from fastattn.nn.fused import original_class
from fastattn.swap.code import is_copy
from fastattn.swap.swapped import Swapped


def note_interface(module: Swapped) -> None:
    """Counts a fallback where the config has since been told to use another attention."""
    config: Any = module.config
    chosen = config._attn_implementation
    if chosen != NAME and "attention" not in module.fastattn_off:
        note_fallback(module, f'the config asks for the attention "{chosen}"')


def why_not_transformers(module: nn.Module) -> list[str]:
    """Reasons where the attention or the masks that the module's config asks for are not those of transformers: a
    function of the user's own under a name of its own, or in the place of another one."""
    config: Any = module.config
    chosen = config._attn_implementation
    for kind, functions in (("attention", ALL_ATTENTION_FUNCTIONS), ("mask", ALL_MASK_ATTENTION_FUNCTIONS)):
        function = functions.get(chosen)
        if function is not None and not _is_of_transformers(function):
            return [f'the {kind} function "{chosen}" that its config asks for is not one of transformers']
    eager = eager_function(original_class(module)) if chosen == "eager" else None
    if eager is not None and not _is_of_transformers(eager) and not _is_usual(eager):
        return ["its eager_attention_forward is not known"]
    return []


def _is_of_transformers(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", "")).partition(".")[0] in ("transformers", "fastattn")


def _is_usual(eager: object) -> bool:
    """Whether it is a copy of what one of these models runs."""
    for name in ("llama", "bert", "gemma2", "gpt_oss", "clip"):
        file = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        known = getattr(file, "eager_attention_forward", None)
        if _is_of_transformers(known) and is_copy(eager, known):
            return True
    return False


def gives_weights(module: nn.Module) -> bool:
    """Whether the attention's config asks for the function of transformers that forms the weights."""
    config: Any = module.config
    return config._attn_implementation == "eager" and eager_function(original_class(module)) is not None
