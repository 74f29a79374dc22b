"""Masks over the keys of each batch entry: lengths, ranges, bool key masks; and the dense mask.

A key that no query of its batch entry may see under these masks is zero-filled on load: whatever is stored there,
NaN included, changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.masks.base import Mask
from fastattn.masks.lowered import LoweredMask

_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


class KeyLengths(Mask):
    """Keeps the first lengths[b] keys of batch entry b.

    lengths: an integer tensor (B,) on q's device, or a list of B ints. Lengths beyond Skv keep all keys.
    """

    def __init__(self, lengths: Tensor | Sequence[int]) -> None:
        self.lengths = _as_key_positions("lengths", lengths)

    def lower(self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device) -> LoweredMask:
        return LoweredMask(key_end=_lower_positions("lengths", self.lengths, batch, device))

    def to_dense(
        self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device | str | None = None
    ) -> Tensor:
        lengths = torch.as_tensor(self.lengths, device=device)
        key = torch.arange(len_k, device=lengths.device)
        return (key < lengths[:, None])[:, None, None, :].expand(batch, heads, len_q, len_k)

    def __repr__(self) -> str:
        return f"KeyLengths({describe(self.lengths)})"


class KeyRange(Mask):
    """Keeps the keys start[b] <= j < end[b] of batch entry b.

    start, end: integer tensors (B,) on q's device, or lists of B ints.
    """

    def __init__(self, start: Tensor | Sequence[int], end: Tensor | Sequence[int]) -> None:
        self.start = _as_key_positions("start", start)
        self.end = _as_key_positions("end", end)

    def lower(self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device) -> LoweredMask:
        start = _lower_positions("start", self.start, batch, device)
        return LoweredMask(key_start=start, key_end=_lower_positions("end", self.end, batch, device))

    def to_dense(
        self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device | str | None = None
    ) -> Tensor:
        start = torch.as_tensor(self.start, device=device)
        end = torch.as_tensor(self.end, device=start.device)
        key = torch.arange(len_k, device=start.device)
        seen = (start[:, None] <= key) & (key < end[:, None])
        return seen[:, None, None, :].expand(batch, heads, len_q, len_k)

    def __repr__(self) -> str:
        return f"KeyRange({describe(self.start)}, {describe(self.end)})"


class KeyMask(Mask):
    """Keeps key j of batch entry b where keep[b, j] is True. keep: bool (B, Skv), or (1, Skv), on q's device."""

    def __init__(self, keep: Tensor) -> None:
        _check_bool("KeyMask", "keep", keep)
        if keep.dim() != 2:
            raise ValueError(f"KeyMask: keep has shape {tuple(keep.shape)}: pass a bool tensor of shape (B, Skv)")
        self.keep = keep

    def lower(self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device) -> LoweredMask:
        _check_device("KeyMask", self.keep, device)
        if self.keep.shape[1] != len_k or self.keep.shape[0] not in (1, batch):
            raise ValueError(
                f"KeyMask: keep has shape {tuple(self.keep.shape)}, but this call has B={batch} and Skv={len_k}: "
                f"pass ({batch}, {len_k})"
            )
        return LoweredMask(dense=self.keep[:, None, None, :])

    def to_dense(
        self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device | str | None = None
    ) -> Tensor:
        return self.keep.to(device)[:, None, None, :].expand(batch, heads, len_q, len_k)

    def __repr__(self) -> str:
        return f"KeyMask({describe(self.keep)})"


class Dense(Mask):
    """Keeps what a bool tensor says, True is visible; any shape that broadcasts to (B, Hq, Sq, Skv), on q's device."""

    def __init__(self, tensor: Tensor) -> None:
        _check_bool("Dense", "tensor", tensor)
        if tensor.dim() > 4:
            raise ValueError(f"Dense: tensor has shape {tuple(tensor.shape)}: at most 4 dimensions (B, Hq, Sq, Skv)")
        self.tensor = tensor

    def lower(self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device) -> LoweredMask:
        _check_device("Dense", self.tensor, device)
        return LoweredMask(dense=as_4d("mask", self.tensor, (batch, heads, len_q, len_k)))

    def to_dense(
        self, batch: int, heads: int, len_q: int, len_k: int, device: torch.device | str | None = None
    ) -> Tensor:
        return self.tensor.to(device).expand(batch, heads, len_q, len_k)

    def __repr__(self) -> str:
        return f"Dense({describe(self.tensor)})"


def as_4d(name: str, tensor: Tensor, full: tuple[int, int, int, int]) -> Tensor:
    """`tensor` with leading dimensions of size 1 up to 4; ValueError where it does not broadcast to `full`."""
    shape = tensor.shape
    lead = 4 - len(shape)
    fits = lead >= 0
    for i in range(len(shape)):
        fits = fits and (shape[i] == 1 or shape[i] == full[lead + i])
    if not fits:
        raise ValueError(
            f"{name} has shape {tuple(shape)}, which does not broadcast to (B, Hq, Sq, Skv) = {tuple(full)}: "
            "pass each dimension as 1 or in full"
        )
    return tensor if lead == 0 else tensor[(None,) * lead]


def describe(value: Tensor | Sequence[int]) -> str:
    """A short text for a mask's tensor: dtype, shape and device, or the list itself."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor {tuple(value.shape)} on {value.device}"
    return repr(list(value))


def _as_key_positions(name: str, value: Tensor | Sequence[int]) -> Tensor | tuple[int, ...]:
    if not isinstance(value, Tensor):
        wrong = [v for v in value if isinstance(v, bool) or not isinstance(v, int)]
        if wrong:
            raise TypeError(f"{name} holds {wrong[0]!r}: pass whole numbers, one per batch entry")
        return tuple(value)
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{name} has dtype {value.dtype}: pass an int32 tensor of shape (B,), one per batch entry")
    if value.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: pass one number per batch entry, shape (B,)")
    return value


def _lower_positions(name: str, value: Tensor | tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        _check_device(name, value, device)
        positions = value.to(torch.int32)
    else:
        positions = torch.tensor(value, dtype=torch.int32, device=device)
    if positions.shape[0] != batch:
        raise ValueError(
            f"{name} holds {positions.shape[0]} numbers, but q has a batch of {batch}: pass one per batch entry"
        )
    return positions


def _check_bool(owner: str, name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} is a {type(value).__name__}: pass a bool tensor, True where visible")
    if value.dtype != torch.bool:
        raise TypeError(
            f"{owner}: {name} has dtype {value.dtype}: pass a bool tensor, True where visible "
            "(additive float masks go to attention(bias=...))"
        )


def _check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} lies on {value.device} but q on {device}: move it with .to({str(device)!r})")
