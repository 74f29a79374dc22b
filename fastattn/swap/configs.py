"""The configs of transformers that a swap replaces, in one model, by copies that name fastattn's attention."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastattn.integrations import mask_readers
from fastattn.nn.checks import holds_its_own_forward
from fastattn.nn.fused import Fused, original_class
from fastattn.swap.recipe import parameters

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
    masks: str
    """Which masks the model took: "sdpa" or "eager"."""
    watched: list[nn.Module]
    """The attention that runs on fastattn's, and what holds it: whether others are to read the masks shows there."""
    as_swapped: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """The copy's attributes when the swap was done: the values, and copies of them."""

    def apply(self) -> None:
        """Gives the holders the copy."""
        self.as_swapped = {name: (value, copy.deepcopy(value)) for name, value in self._attributes().items()}
        for holder in self.holders:
            holder.config = self.new
        mask_readers.watch(self.new, self.masks, self.watched)

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


def config_moves(model: nn.Module, attentions: list[nn.Module]) -> list[ConfigMove]:
    """Copies of the configs by which these attention modules choose their function, and of the configs that hold them,
    for all modules of the model.

    Always copies: another model may share a config, and nothing says so. Those of one model hold one another as the
    originals do, so that what is asked of a whole model's config reaches the parts.
    """
    named: dict[int, Any] = {id(module.config): module.config for module in attentions}
    if not named:
        return []
    olds: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and id(config) not in olds:
            whole = _with_parts(config)
            olds |= whole if whole.keys() & named.keys() else {}
    copied: dict[int, Any] = {}
    for old in olds.values():
        copy.deepcopy(old, copied)
    watched, others = _readers(model, attentions)
    chosen = {key: "eager" if config._attn_implementation == "eager" else "sdpa" for key, config in named.items()}
    for key, config in named.items():
        new = copied[id(config)]
        setattr(new, _CHOSEN if _CHOSEN in vars(new) else "_attn_implementation", _NAME)
        if others:
            setattr(new, mask_readers.MARK, chosen[key])
    copies = [copied[key] for key in olds]
    return [
        ConfigMove(
            old,
            copied[key],
            [module for module in model.modules() if module.__dict__.get("config") is old],
            copies,
            chosen.get(key, "sdpa"),
            watched if key in chosen else [],
        )
        for key, old in olds.items()
    ]


def _readers(model: nn.Module, attentions: list[nn.Module]) -> tuple[list[nn.Module], bool]:
    """The attention modules and what holds them, whose masks are fastattn's; and whether something else in the model
    reads masks: attention of the user's own within a part of transformers, or a model that makes them itself."""
    own = {id(module) for module in attentions}
    modules = dict(model.named_modules())
    read = {path: module for path, module in modules.items() if id(module) in own or _is_interface(module)}
    above = {path.rpartition(".")[0] for path in read} - read.keys()
    for path in list(above):
        while path:
            path = path.rpartition(".")[0]
            above.add(path)
    watched = [modules[path] for path in {**read, **dict.fromkeys(above)} if path]
    for path, module in modules.items():
        if path in read:
            continue
        if path in above:
            if not _is_librarys(module) and _makes_masks(module):
                return watched, True
        elif _is_librarys(modules[path.rpartition(".")[0]]) and _is_own(module) and _takes_masks(module):
            return watched, True
    return watched, any(map(mask_readers.is_touched, watched))


def _is_interface(module: nn.Module) -> bool:
    """Whether an earlier swap moved it."""
    return isinstance(module, Fused) and getattr(module.__dict__.get("config"), "_attn_implementation", None) == _NAME


def _is_librarys(module: nn.Module) -> bool:
    return str(original_class(module).__module__).startswith(("transformers.", "torch."))


def _is_own(module: nn.Module) -> bool:
    return not _is_librarys(module) or ("forward" in module.__dict__ and not holds_its_own_forward(module))


def _takes_masks(module: nn.Module) -> bool:
    try:
        return "attention_mask" in parameters(module.forward)
    except AttributeError:  # not a function of Python's
        return False


def _makes_masks(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(original_class(module).forward), "__code__", None)
    return any(
        name.startswith("create_") and name.endswith(("_mask", "_masks")) for name in getattr(code, "co_names", ())
    )


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
