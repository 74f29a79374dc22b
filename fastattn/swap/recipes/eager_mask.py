"""Masks as attention that asks no interface takes them: added to the scores, or bool."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.integrations.transformers_versions import is_tracing
from fastattn.masks.cache import Cache, stream_of

_remembered = Cache(entries=16, size=1 << 28)
"""All layers of a model get the same mask."""


def can_be_read(tensor: Tensor) -> bool:
    """Whether Python may look at the values: no graph is traced or captured, and torch.func transforms nothing."""
    return not is_tracing(tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def compact(mask: Tensor) -> Tensor:
    """What hides the same keys as a float mask (B, 1|H, 1|Sq, Skv) does.

    A mask of nothing but 0 and the lowest number of its dtype, or -inf, becomes a bool mask, or, where there are
    several queries and each sees one run of keys, int32 key ranges (B, 1|H, Sq, 2). Any other is returned: it adds to
    scores. So is one that wants a gradient, or cannot be read: this reads the device, once for all layers.

    Numbers of other dtypes, of a mask that someone passes whole, add to scores too: they are returned as float32. A
    bool or an int32 mask would mean something else to `attention`.
    """
    if not mask.is_floating_point():
        return mask.float()
    found: tuple[Tensor, ...] = ()
    if not mask.requires_grad and can_be_read(mask):
        found = _remembered.get(("compact", stream_of(mask.device)), (mask,), lambda: _compacted(mask))
    if found:
        return found[0]
    return mask.float() if mask.dtype is torch.float64 else mask


def compact_hidden(hidden: Tensor) -> Tensor:
    """As `compact`, of a bool mask that is True where a key is hidden."""
    if not can_be_read(hidden):
        return ~hidden
    return _remembered.get(("hidden", stream_of(hidden.device)), (hidden,), lambda: _ranges(~hidden))[0]


def compact_seen(seen: Tensor) -> Tensor:
    """As `compact`, of a mask of any dtype that is 0 where a key is hidden."""
    if not can_be_read(seen):
        return seen.bool()
    return _remembered.get(("seen", stream_of(seen.device)), (seen,), lambda: _ranges(seen != 0))[0]


def _compacted(mask: Tensor) -> tuple[Tensor, ...]:
    """The ranges or the bool mask; nothing where there is none."""
    seen = mask == 0
    if not (seen | (mask <= torch.finfo(mask.dtype).min)).all():
        return ()
    return _ranges(seen)


def _ranges(seen: Tensor) -> tuple[Tensor]:
    """The ranges, or the bool mask itself."""
    length = seen.shape[-1]
    if seen.shape[-2] == 1:
        return (seen,)
    key = torch.arange(length, dtype=torch.int32, device=seen.device)
    first = torch.where(seen, key, length).amin(-1)
    end = torch.where(seen, key, -1).amax(-1) + 1
    count = seen.sum(-1)
    if not ((end - first == count) | (count == 0)).all():
        return (seen,)
    return (torch.stack([first, end], dim=-1).to(torch.int32),)
