"""The configs of transformers that a swap replaces, in one model, by copies that name fastattn's attention."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_INTERFACE_NAME = "fastattn"


@dataclass
class ConfigMove:
    """A config, its copy, and the modules of the model that hold it (none: it is part of another config alone)."""

    old: Any
    new: Any
    holders: list[nn.Module]
    as_swapped: dict[str, Any] = field(default_factory=dict)
    """The copy's own attributes when the swap was done."""

    def apply(self) -> None:
        """Gives the holders the copy."""
        self.as_swapped = copy.deepcopy(_own_attributes(self.new))
        for holder in self.holders:
            holder.config = self.new

    def undo(self) -> None:
        """Gives the holders the old config back, with what has been changed in the copy since."""
        found, before = _own_attributes(self.new), self.as_swapped
        vars(self.old).update({name: value for name, value in found.items() if _is_new(name, value, before)})
        for name in before.keys() - found.keys():
            vars(self.old).pop(name, None)
        for holder in self.holders:
            holder.config = self.old


def config_moves(model: nn.Module, read: Iterable[Any]) -> list[ConfigMove]:
    """Copies of the configs in `read`, by which attention modules choose their function, and of the configs that hold
    them, for all modules of the model.

    Always copies: another model may share a config, and nothing says so. Those of one model hold one another as the
    originals do, so that what is asked of a whole model's config reaches the parts.
    """
    named = {id(config) for config in read}
    held = {id(config): config for module in model.modules() if (config := module.__dict__.get("config")) is not None}
    tops = [config for config in held.values() if any(id(each) in named for each in _with_parts(config))]
    copied: dict[int, Any] = {}
    olds: dict[int, Any] = {}
    for top in tops:
        copy.deepcopy(top, copied)
        olds |= {id(each): each for each in _with_parts(top)}
    moves = [
        ConfigMove(old, copied[key], [module for module in model.modules() if module.__dict__.get("config") is old])
        for key, old in olds.items()
    ]
    for move in moves:  # holders before what they hold: a config hands its attention on
        move.new._attn_implementation = _INTERFACE_NAME if id(move.old) in named else move.old._attn_implementation
    return moves


def _with_parts(config: Any) -> Iterator[Any]:
    """A config and those that it holds, each after its holder."""
    yield config
    for name in _parts(config):
        yield from _with_parts(vars(config)[name])


def _parts(config: Any) -> list[str]:
    """The attributes of a config that are configs."""
    if not hasattr(config, "sub_configs"):
        return []
    return [name for name in config.sub_configs if hasattr(vars(config).get(name), "_attn_implementation")]


def _own_attributes(config: Any) -> dict[str, Any]:
    """All but the configs that it holds and the attention, which is the swap's to give back."""
    others = {*_parts(config), "_attn_implementation_internal"}
    return {name: value for name, value in vars(config).items() if name not in others}


def _is_new(name: str, value: object, before: dict[str, Any]) -> bool:
    try:
        return name not in before or bool(before[name] != value)
    except (RuntimeError, ValueError):  # a comparison without an answer, as of tensors
        return True
