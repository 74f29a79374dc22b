"""What attention that comes through the interface of transformers has in common."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastattn.integrations.transformers import NAME, eager_function
from fastattn.nn.counting import note_fallback
from fastattn.nn.fused import original_class
from fastattn.swap.swapped import Swapped


def note_interface(module: Swapped) -> None:
    """Counts a fallback where the config has since been told to use another attention."""
    config: Any = module.config
    chosen = config._attn_implementation
    if chosen != NAME and "attention" not in module.fastattn_off:
        note_fallback(module, f'the config asks for the attention "{chosen}"')


def gives_weights(module: nn.Module) -> bool:
    """Whether the attention's config asks for the function of transformers that forms the weights."""
    config: Any = module.config
    return config._attn_implementation == "eager" and eager_function(original_class(module)) is not None
