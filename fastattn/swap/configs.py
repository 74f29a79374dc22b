"""The configs of transformers that a swap replaces, in one model, by copies that name fastattn's attention."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_NAME = "fastattn"
_CHOSEN = "_attn_implementation_internal"  # set alone: the property hands its value on to the configs held


@dataclass
class ConfigMove:
    """A config, its copy, and the modules of the model that hold it (none: it is part of another config alone)."""

    old: Any
    new: Any
    holders: list[nn.Module]
    copies: list[Any]
    """All copies: each has a move of its own. Compared by identity, as a report that was saved finds them again."""
    as_swapped: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """The copy's attributes when the swap was done: the values, and copies of them."""

    def apply(self) -> None:
        """Gives the holders the copy."""
        self.as_swapped = {name: (value, copy.deepcopy(value)) for name, value in self._attributes().items()}
        for holder in self.holders:
            holder.config = self.new

    def undo(self) -> None:
        """Gives the holders the old config back, with what has been changed in the copy since; but for the choice of
        the attention, which is the swap's to give back."""
        found, before = self._attributes(), self.as_swapped
        for name, value in found.items():
            if name not in before or _is_changed(value, *before[name]):
                vars(self.old)[name] = value
        for name in before.keys() - found.keys():
            vars(self.old).pop(name, None)
        for holder in self.holders:
            holder.config = self.old

    def _attributes(self) -> dict[str, Any]:
        own = vars(self.new).items()
        copies = set(map(id, self.copies))
        return {name: value for name, value in own if name != _CHOSEN and id(value) not in copies}


def config_moves(model: nn.Module, read: Iterable[Any]) -> list[ConfigMove]:
    """Copies of the configs in `read`, by which attention modules choose their function, and of the configs that hold
    them, for all modules of the model.

    Always copies: another model may share a config, and nothing says so. Those of one model hold one another as the
    originals do, so that what is asked of a whole model's config reaches the parts.
    """
    named = {id(config): config for config in read}
    olds: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and id(config) not in olds:
            whole = _with_parts(config)
            olds |= whole if whole.keys() & named.keys() else {}
    copied: dict[int, Any] = {}
    for old in olds.values():
        copy.deepcopy(old, copied)
    for config in named.values():
        new = copied[id(config)]
        setattr(new, _CHOSEN if _CHOSEN in vars(new) else "_attn_implementation", _NAME)
    copies = [copied[key] for key in olds]
    return [
        ConfigMove(
            old, copied[key], [module for module in model.modules() if module.__dict__.get("config") is old], copies
        )
        for key, old in olds.items()
    ]


def _with_parts(config: Any) -> dict[int, Any]:
    """A config and those that it holds, by id."""
    found: dict[int, Any] = {}
    waiting = [config]
    while waiting:
        each = waiting.pop()
        if id(each) not in found:
            found[id(each)] = each
            parts = (vars(each).get(name) for name in getattr(each, "sub_configs", ()))
            waiting += [part for part in parts if hasattr(part, "_attn_implementation")]
    return found


def _is_changed(value: Any, was: Any, looked: Any) -> bool:
    """Whether an attribute is another one than it `was`, or no longer what it looked like."""
    if value is was and type(value).__eq__ is object.__eq__:
        return False  # it cannot be told
    try:
        return bool(value != looked)
    except (RuntimeError, ValueError):  # a comparison without an answer, as of tensors
        return value is not was
