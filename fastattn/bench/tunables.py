"""What backends have to tune: warps of Triton's norms, and tiles of its attention kernels.

A choice replaces, inside a with block, the function that looks the table up.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from fastattn.backends.triton import interpreting, norm
from fastattn.bench.providers.ours import Ours

_NORM_WIDTHS = (768, 1024, 4096, 8192)
_NORM_WARPS = (1, 2, 4, 8, 16)
_HEAD_DIMS = (64, 128, 256)
_BLOCKS = ((16, 32), (32, 32), (32, 64), (64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128))
_WARPS, _STAGES = (4, 8), (1, 2, 3)


@dataclass(frozen=True)
class Tunable:
    """One entry of a table. name: what it is for. suite, sizes: a case that uses it, as the fields of the case's class.
    choices: the values to try; now: the table's own, None where the table goes by more than the case says. use: makes
    calls inside the block take a value. directions: those in which a value makes a difference."""

    name: str
    suite: str
    sizes: dict[str, Any]
    choices: Sequence[Any]
    now: Any
    use: Callable[[Any], AbstractContextManager[None]]
    directions: tuple[str, ...] = ("forward", "both")


def tunables(device: str) -> dict[str, list[Tunable]]:
    """Every entry of each backend that is usable on that device and offers some; under Triton's interpreter with sizes
    that it gets through."""
    return {"triton": [*_norms(), *_attention()]} if Ours("triton").unavailable_reason(device) is None else {}


def _norms() -> list[Tunable]:
    rows = 4 if interpreting() else 8192
    return [
        Tunable(
            name=f"norm, width {width}: warps",
            suite="norm",
            sizes={"kind": "layer", "rows": rows, "width": width, "residual": True},
            choices=_NORM_WARPS,
            now=norm._block(width)[1],
            use=_norm_warps,
        )
        for width in _NORM_WIDTHS
    ]


@contextlib.contextmanager
def _norm_warps(warps: int) -> Iterator[None]:
    look_up = norm._block
    norm._block = lambda width: (look_up(width)[0], warps)
    try:
        yield
    finally:
        norm._block = look_up


def _attention() -> list[Tunable]:
    """An entry per kernel and head dim."""
    from fastattn.kernels import tiles

    length, heads = (64, 1) if interpreting() else (4096, 16)
    found = []
    for kernel, directions in (("forward", ("forward",)), ("queries", ("both",)), ("keys", ("both",))):
        for dim in _HEAD_DIMS:
            sizes = {"batch": 1, "heads_q": heads, "heads_kv": heads, "len_q": length, "len_k": length, "dim": dim}
            choices = [tiles.Tile(q, k, w, s) for q, k in _BLOCKS for w in _WARPS for s in _STAGES]
            name = f"attention {kernel}, head dim {dim}: tile"
            found.append(Tunable(name, "attention", sizes, choices, None, _tile(kernel), directions))
    return found


def _tile(kernel: str) -> Callable[[Any], AbstractContextManager[None]]:
    tiles: Any = importlib.import_module("fastattn.kernels.tiles")

    @contextlib.contextmanager
    def use(tile: Any) -> Iterator[None]:
        look_up = tiles.attention_tile

        def chosen(asked: str, *arguments: Any) -> Any:
            return tile if asked == kernel else look_up(asked, *arguments)

        tiles.attention_tile = chosen
        try:
            yield
        finally:
            tiles.attention_tile = look_up

    return use
