"""Who else reads the masks of a model whose attention a swap moved to fastattn's.

What `attention_mask` makes, key ranges, small bool masks or none, `attention_forward` alone understands. Attention of
the user's own in such a model, or a model or a hook that edits masks, takes what it got before: the masks of "sdpa" or
of "eager". A swap that meets such a reader leaves a mark on the copied config, which stays with copies of the model;
what is replaced later is looked for in every eager forward.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from fastattn.nn.checks import holds_its_own_forward

MARK = "_fastattn_masks"
"""The attribute of a config that says which masks its model takes, "sdpa" or "eager", where others read them."""


class _Watched(NamedTuple):
    config: weakref.ref[Any]
    masks: str
    modules: tuple[tuple[weakref.ref[nn.Module], type], ...]


_watched: dict[int, _Watched] = {}


def watch(config: Any, masks: str, modules: Iterable[nn.Module]) -> None:
    """Looks from now on whether these modules, attention and what holds it, stay what they are."""
    key = id(config)
    seen = tuple((weakref.ref(module), type(module)) for module in modules)
    _watched[key] = _Watched(weakref.ref(config, lambda _: _watched.pop(key, None)), masks, seen)


def masks_of_others(config: Any) -> str | None:
    """Which masks to make, "sdpa" or "eager", for the sake of other readers; None where there is none."""
    marked: str | None = getattr(config, MARK, None)
    if marked is not None or torch.compiler.is_compiling():
        return marked
    found = _watched.get(id(config))
    if found is None or found.config() is not config:
        return None
    for reference, kind in found.modules:
        module = reference()
        if module is not None and (type(module) is not kind or is_touched(module)):
            return found.masks
    return None


def is_touched(module: nn.Module) -> bool:
    """Whether the instance has a forward or a hook before it that may be the user's."""
    if "forward" in module.__dict__ and not holds_its_own_forward(module):
        return _package(module.forward) != "accelerate"  # which calls the one before
    hooks = module._forward_pre_hooks
    return bool(hooks) and any(_package(hook) not in _LIBRARIES for hook in hooks.values())


_LIBRARIES = frozenset({"torch", "transformers", "accelerate", "peft", "deepspeed", "fastattn"})


def _package(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    home = getattr(function, "__module__", None) or type(function).__module__
    return str(home).partition(".")[0]
