"""What the recipes for models of transformers share.

Importing this file registers the attention interface, so that a swapped model that was saved whole runs when it is
loaded in a process that never called swap.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers import activations

from fastattn.integrations import transformers as interface
from fastattn.nn.activations import activation_name as torch_activation_name
from fastattn.nn.checks import why_not_unwatched
from fastattn.nn.counting import note_call, note_fallback
from fastattn.swap.swapped import Swapped

interface.register()


class InterfaceAttention(Swapped):
    """Attention whose original forward asks the interface for the function: the config that swap copied names it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        note_call(self)
        note_interface(self)
        return super().forward(*args, **kwargs)


def note_interface(module: Swapped) -> None:
    """Counts a fallback where the config has since been told to use another attention."""
    chosen = module.config._attn_implementation
    if chosen != interface.NAME and "attention" not in module.fastattn_off:
        note_fallback(module, f'the config asks for the attention "{chosen}"')


def activation_name(function: object) -> str | None:
    """The fastattn name of an activation module of transformers or torch, None where no kernel computes exactly it."""
    if not isinstance(function, nn.Module) or why_not_unwatched(function) is not None:
        return None
    kind = type(function)
    if kind.__module__.startswith("torch."):
        return torch_activation_name(function)
    if kind is activations.GELUActivation:
        return "gelu" if function.act in (nn.functional.gelu, function._gelu_python) else None
    if kind is activations.GELUTanh:
        return "gelu_tanh" if _is_gelu_tanh(function) else None
    return _ACTIVATION_MODULES.get(kind)


def _is_gelu_tanh(function: activations.GELUTanh) -> bool:
    act = function.act
    if isinstance(act, functools.partial):
        return act.func is nn.functional.gelu and not act.args and act.keywords == {"approximate": "tanh"}
    return act == function._gelu_tanh_python


_ACTIVATION_MODULES: dict[type, str] = {
    activations.NewGELUActivation: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    activations.ReLUSquaredActivation: "relu2",
    activations.SiLUActivation: "silu",
}
