"""Attention that calls torch's scaled_dot_product_attention or is written out, as a flag of the module says.

timm's Swin, monai's blocks and x-transformers' Attend are such classes. A module runs as one that calls the function
(recipe sdpa); where its forward did not call it, the next calls run as attention that is written out (written_out),
unless that finds none.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastattn.nn.counting import note_choice
from fastattn.swap.reading import Reading
from fastattn.swap.recipes import sdpa, written_out

FIRST = "its first call showed that it writes its attention out"

_written: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""Modules whose forward did not call the function: whether they write out attention, as far as is known."""


def read(original: type[nn.Module]) -> Reading | None:
    """The reading of a class that calls torch's function; with both ways where it names products, too."""
    written = written_out.attributes_of(original)
    if written is None:
        return sdpa.read(original)
    reading = sdpa.read(original, _otherwise)
    if reading is None:
        return None
    forward = _either(reading.attributes["forward"], written["forward"])
    return replace(reading, attributes={**written, **reading.attributes, "forward": forward})


def _either(calling: Callable[..., Any], writing: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(calling)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _written.get(self):
            return calling(self, *args, **kwargs)
        result = writing(self, *args, **kwargs)
        if written_out.has_none(self):
            _written[self] = False
        return result

    return run


def _otherwise(module: sdpa.CallsSDPA) -> bool:
    """Takes a module whose forward has just not called the function for one that writes its attention out. Not in a
    call that a checkpoint runs again, which has to do the same."""
    if torch.compiler.is_compiling() or module in _written or not written_out.may_change(module):
        return False
    _written[module] = written_out.misfit(module) is None and not written_out.refuse(module)
    if _written[module]:
        note_choice(module, FIRST)
    return _written[module]
