"""What the constructors of masks check, and how masks show their tensors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastattn.masks.cache import Cache

Align = Literal["bottom-right", "top-left"]
Positions = Tensor | tuple[int, ...]
"""One key position per batch entry: an integer tensor (B,), or B numbers."""

_ALIGNMENTS = ("bottom-right", "top-left")
_FAR = 2**30  # beyond every key; larger numbers mean the same
_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
_copied = Cache(entries=128, size=1 << 24)


def check_align(align: Align) -> None:
    """ValueError unless `align` is one of the two alignments."""
    if align not in _ALIGNMENTS:
        raise ValueError(f"align={align!r} is unknown: pass 'bottom-right' or 'top-left'")


def whole(value: Any) -> int | None:
    """`value` as an int where it is a whole number, NumPy's too; None where it is anything else, a bool too."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    return None if isinstance(value, Tensor) or not hasattr(value, "__index__") else operator.index(value)


def as_reach(owner: str, name: str, value: int | None) -> int | None:
    """A number of positions >= 0, or None; TypeError or ValueError for anything else."""
    if value is None:
        return None
    number = whole(value)
    if number is None:
        raise TypeError(
            f"{owner}: {name}={value!r} is a {type(value).__name__}: pass a whole number of positions, or None"
        )
    if number < 0:
        raise ValueError(f"{owner}: {name}={number} is negative: pass 0 or more positions, or None for unbounded")
    return _near(number)


def as_whole(owner: str, name: str, value: int, least: int, of: str) -> int:
    """A number >= least; TypeError or ValueError for anything else. `of` says what it counts, if anything."""
    number = whole(value)
    if number is None:
        raise TypeError(
            f"{owner}: {name}={value!r} is a {type(value).__name__}: pass a whole number{of and f' of {of}'}"
        )
    if number < least:
        raise ValueError(f"{owner}: {name}={number} is too small: pass {least} or more{of and f' {of}'}")
    return number


def as_distance(owner: str, name: str, value: int, least: int, of: str) -> int:
    """As `as_whole`, of positions or blocks of them: far beyond every key one number is as good as another."""
    return _near(as_whole(owner, name, value, least, of))


def _near(number: int) -> int:
    """The number, or the least that means the same: sums and products of two of these stay within 64 bits."""
    return min(number, _FAR) if isinstance(number, int) else number  # symbols of torch.compile stay as they are


def check_bool(owner: str, name: str, value: Tensor) -> None:
    """TypeError unless `value` is a bool tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} is a {type(value).__name__}: pass a bool tensor, True where visible")
    if value.layout is not torch.strided:
        raise TypeError(f"{owner}: {name} has layout {value.layout}: pass a strided tensor, {name}.to_dense()")
    if value.dtype != torch.bool:
        raise TypeError(
            f"{owner}: {name} has dtype {value.dtype}: pass a bool tensor, True where visible "
            "(additive float masks go to attention(bias=...))"
        )


def check_integers(owner: str, name: str, value: Tensor) -> None:
    """TypeError unless `value` is a tensor of whole numbers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} is a {type(value).__name__}: pass an integer tensor")
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{owner}: {name} has dtype {value.dtype}: pass an integer tensor such as torch.int32")


def check_device(name: str, value: Tensor, device: torch.device | None) -> None:
    """ValueError where a tensor of the mask lies elsewhere than q; None is any device."""
    if device is not None and value.device != device:
        raise ValueError(f"{name} lies on {value.device} but q on {device}: move it with .to({str(device)!r})")


def as_positions(owner: str, name: str, value: Tensor | Sequence[int]) -> Positions:
    """One number per batch entry; TypeError or ValueError for anything else."""
    if not isinstance(value, Tensor):
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            raise TypeError(
                f"{owner}: {name}={value!r} is a {type(value).__name__}: pass an int32 tensor of shape (B,) or a list "
                "of B ints"
            )
        numbers = tuple(whole(v) for v in value)
        for given, number in zip(value, numbers, strict=True):
            if number is None:
                raise TypeError(f"{owner}: {name} holds {given!r}: pass whole numbers, one per batch entry")
        return numbers  # type: ignore[return-value]
    if value.dtype not in _INTEGERS:
        raise TypeError(
            f"{owner}: {name} has dtype {value.dtype}: pass an int32 tensor of shape (B,), one per batch entry"
        )
    if value.dim() != 1:
        raise ValueError(
            f"{owner}: {name} has shape {tuple(value.shape)}: pass one number per batch entry, shape (B,) or a list"
        )
    return value


def as_count(owner: str, name: str, value: int | Tensor | Sequence[int], of: str) -> int | Positions:
    """One number >= 0 for all, or one per batch entry. The values of a tensor are not read."""
    if isinstance(value, Tensor) and value.dim() == 0:
        raise ValueError(f"{owner}: {name} is a tensor without dimensions: pass a number, or a tensor of shape (B,)")
    if isinstance(value, (Tensor, Sequence, np.ndarray)) and not isinstance(value, str):
        positions = as_positions(owner, name, value)
        if isinstance(positions, tuple) and any(n < 0 for n in positions):
            raise ValueError(f"{owner}: {name} holds {min(positions)}: pass 0 or more {of} per batch entry")
        return positions
    return as_distance(owner, name, value, 0, of)


def check_positions(name: str, value: Positions, batch: int, device: torch.device | None) -> None:
    """ValueError unless there is one position per batch entry, on `device`."""
    if isinstance(value, Tensor):
        check_device(name, value, device)
    count = value.shape[0] if isinstance(value, Tensor) else len(value)
    if count != batch:
        raise ValueError(f"{name} holds {count} numbers, but q has a batch of {batch}: pass one per batch entry")


def positions_on(value: int | Positions, batch: int, device: torch.device) -> Tensor:
    """int32 (batch,): the positions as a tensor."""
    if isinstance(value, Tensor):
        if value.dtype == torch.int64:
            value = value.clamp(-_FAR, _FAR)
        return value.to(device, torch.int32)
    if isinstance(value, tuple):
        numbers = tuple(min(max(n, -_FAR), _FAR) for n in value)
        if torch.compiler.is_compiling():
            return torch.tensor(numbers, dtype=torch.int32, device=device)
        # A copy to a GPU waits for it, and a CUDA graph cannot hold one.
        return _copied.get((numbers, device), (), lambda: torch.tensor(numbers, dtype=torch.int32, device=device))
    return torch.full((batch,), min(value, _FAR), dtype=torch.int32, device=device)


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


def describe(value: object) -> str:
    """A short text for what a mask holds: dtype, shape and device of a tensor, or the numbers themselves."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor {tuple(value.shape)} on {value.device}"
    return repr(list(value)) if isinstance(value, (tuple, list)) else repr(value)
