"""What differs between the supported versions of transformers, by the names and arguments of the newest.

Up to 5.3 mask functions are given the positions of the queries (cache_position) instead of their number and the first;
up to 5.1 attention weights are collected by forwards that stand on the modules during a call; 4.57 makes no masks of
attention that looks both ways. Read against transformers 4.57.6, 5.0, 5.3, 5.4 and 5.20 to 5.24 (masking_utils.py,
utils).
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import masking_utils
from transformers.utils import import_utils

from fastattn.masks.cache import is_capturing

try:
    from transformers.utils import output_capturing
except ImportError:
    output_capturing = None

# Where they are missing, what no mask function is or is made by.
bidirectional_mask_function = getattr(masking_utils, "bidirectional_mask_function", None)
sliding_window_bidirectional_overlay: Any = getattr(
    masking_utils, "sliding_window_bidirectional_overlay", lambda size: lambda: size
)

_BY_POSITIONS = "cache_position" in inspect.signature(masking_utils.sdpa_mask).parameters
_SLICES_PADDING = "_slice" in inspect.signature(masking_utils.prepare_padding_mask).parameters


@functools.cache
def taking_positions(mask: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """A mask function to register, of one that takes q_length and q_offset. It also takes cache_position, for
    `sdpa_mask` and `eager_mask`; q_offset is None where the positions do not follow one another, or cannot be read."""
    if not _BY_POSITIONS:
        return mask

    def by_positions(batch_size: int, cache_position: Tensor, kv_length: int, **given: Any) -> Tensor | None:
        return mask(
            batch_size,
            len(cache_position),
            kv_length,
            q_offset=_first(cache_position),
            device=cache_position.device,
            cache_position=cache_position,
            **given,
        )

    return by_positions


def _first(positions: Tensor) -> int | None:
    """The first position where each is one more than that before; None where they are not, or nobody can look."""
    if len(positions) == 0 or positions.is_meta or is_tracing(positions):
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(positions):  # torch 2.7 cannot read one
        return None
    first, follow = torch.stack([positions[0], (positions.diff() == 1).all()]).tolist()
    return first if follow else None


def sdpa_mask(**given: Any) -> Tensor:
    """transformers' dense bool mask."""
    mask: Tensor = masking_utils.sdpa_mask(**_as_taken(given))
    return mask


def eager_mask(**given: Any) -> Tensor:
    """transformers' dense float mask."""
    mask: Tensor = masking_utils.eager_mask(**_as_taken(given))
    return mask


def _as_taken(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that mask functions of this version take."""
    others = {"q_length", "q_offset", "device"} if _BY_POSITIONS else {"cache_position"}
    taken = {name: value for name, value in given.items() if name not in others}
    if _BY_POSITIONS and taken.get("cache_position") is None:
        taken["cache_position"] = torch.arange(given["q_length"], device=given.get("device")) + given.get("q_offset", 0)
    return taken


def padding_mask(padding: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """(B, kv_length) of a mask of all keys seen so far, with False for keys that are still to come."""
    options = {"_slice": False} if _SLICES_PADDING else {}
    padded: Tensor = masking_utils.prepare_padding_mask(padding, kv_length, kv_offset, **options)
    return padded[:, kv_offset : kv_offset + kv_length]


def weights_are_collected(attention: nn.Module | None) -> bool:
    """Whether transformers collects attention weights from the modules' outputs now: from this one's, as far as the
    version says."""
    if output_capturing is None:
        return attention is not None and (_asked.weights or _is_collecting(vars(attention).get("forward")))
    collector = output_capturing._active_collector
    if torch.compiler.is_compiling():  # which does not trace `get`
        collected = collector.global_var if getattr(collector, "compiling", False) else None
    else:
        collected = collector.get()
    return collected is not None and ("attentions" in collected or "cross_attentions" in collected)


class _Asked(threading.local):
    weights = False


_asked = _Asked()


@contextmanager
def weights_asked_for() -> Iterator[None]:
    """Within the block the attention of this thread is to form its weights, where transformers 4 does not tell it."""
    before, _asked.weights = _asked.weights, True
    try:
        yield
    finally:
        _asked.weights = before


def _is_collecting(forward: object) -> bool:
    """Whether a forward on an instance is the one by which transformers up to 5.1 collects what it gives."""
    code = getattr(forward, "__code__", None)
    return code is not None and code.co_name == "wrapped_forward" and "transformers" in code.co_filename


def is_collecting_hook(hook: object) -> bool:
    """Whether a hook is the one by which transformers collects outputs, from 5.2 on; its name was spelt in two ways."""
    return getattr(hook, "__qualname__", "").endswith(".<locals>.output_capturing_hook")


def is_tracing(tensor: Tensor) -> bool:
    """Whether a graph is traced or captured, which cannot look at the tensor's values."""
    if torch.compiler.is_compiling():
        return True
    if hasattr(import_utils, "is_tracing"):
        return bool(import_utils.is_tracing(tensor))
    if torch._C._get_tracing_state() is not None or isinstance(tensor, (FakeTensor, torch.fx.Proxy)):
        return True
    return is_capturing()
