"""What attention that comes through the interface of transformers has in common."""

from __future__ import annotations

from typing import Any

from fastattn.integrations.transformers import NAME
from fastattn.nn.counting import note_fallback
from fastattn.swap.swapped import Swapped


def note_interface(module: Swapped) -> None:
    """Counts a fallback where the config has since been told to use another attention."""
    config: Any = module.config
    chosen = config._attn_implementation
    if chosen != NAME and "attention" not in module.fastattn_off:
        note_fallback(module, f'the config asks for the attention "{chosen}"')
