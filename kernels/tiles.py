"""How kernels are cut: pieces of head dims, and tile shapes per kernel, architecture, dtype and head dim.

Every row of TABLE says on what it was measured. Those that say "unmeasured" were chosen by what the compiler reports
(`python -m fastattn.kernels.compile_check`: registers, stack, shared memory) and by what is known of others' kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

BASE_BLOCK = 64  # of form D, see fastattn.masks.lowered


class Tile(NamedTuple):
    """queries x keys of a tile, warps and pipeline stages of its kernel, where and when that was measured, and the
    registers a thread may have at most, so that another block fits on a multiprocessor: 0 leaves that to the compiler,
    and so do calls with a bias, softcap, dropout or sparse blocks, which need more."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    measured: str = "unmeasured"
    registers: int = 0

    def options(self, plain: bool) -> dict[str, int]:
        """The compiler's options. plain: a call without bias, softcap, dropout and sparse blocks."""
        limit = {"maxnreg": self.registers} if plain and self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # of one block
# GPUs with 99 KiB of shared memory a block and mma.sync alone: their tiles are those of 86.
_SMALL = (86, 89, 120, 121)

_H100 = "H100 80GB HBM3, Triton 3.6, bfloat16, 4,096 positions, 2026-11-25"

# kernel -> architecture (compute capability; the newest not newer than the device's) -> bytes per element -> rows of
# (greatest sum of pieces of the larger head dim, tile)
TABLE: dict[str, dict[int, dict[int, list[tuple[int, Tile]]]]] = {
    "forward": {
        80: {
            2: [(64, Tile(128, 64, 8, 3)), (128, Tile(128, 64, 8, 3)), (256, Tile(64, 32, 8, 2))],
            4: [(64, Tile(32, 32, 4, 2)), (128, Tile(32, 32, 8, 2)), (256, Tile(16, 32, 8, 2))],
        },
        86: {
            2: [(64, Tile(128, 64, 8, 3)), (128, Tile(128, 64, 8, 2)), (256, Tile(64, 32, 8, 2))],
            4: [(64, Tile(32, 32, 4, 2)), (128, Tile(32, 32, 4, 1)), (256, Tile(16, 32, 4, 1))],
        },
        90: {
            2: [
                (64, Tile(128, 64, 8, 3, _H100, 128)),
                (128, Tile(128, 64, 8, 3, _H100)),
                (256, Tile(128, 64, 8, 2, _H100)),
            ],
            4: [(64, Tile(32, 32, 4, 2)), (128, Tile(32, 32, 8, 2)), (256, Tile(16, 32, 8, 2))],
        },
    },
    "queries": {
        80: {
            2: [(64, Tile(128, 32, 8, 3)), (128, Tile(64, 32, 8, 3)), (256, Tile(64, 32, 8, 1))],
            4: [(64, Tile(32, 32, 4, 2)), (128, Tile(16, 32, 8, 1)), (256, Tile(16, 32, 8, 1))],
        },
        86: {
            2: [(64, Tile(128, 32, 8, 2)), (128, Tile(64, 32, 8, 2)), (256, Tile(32, 32, 8, 1))],
            4: [(64, Tile(32, 32, 4, 1)), (128, Tile(16, 32, 8, 1)), (256, Tile(16, 32, 8, 1))],
        },
        90: {
            2: [(64, Tile(64, 64, 4, 3, _H100)), (128, Tile(64, 64, 4, 2, _H100)), (256, Tile(128, 32, 8, 1, _H100))],
            4: [(64, Tile(32, 32, 4, 2)), (128, Tile(16, 32, 8, 1)), (256, Tile(16, 32, 8, 1))],
        },
        100: {  # where the tiles of 90 spill 456 and 1,056 bytes, these 0 and 152
            2: [(64, Tile(128, 32, 8, 3)), (128, Tile(128, 32, 8, 2)), (256, Tile(128, 32, 8, 1))],
            4: [(64, Tile(32, 32, 4, 2)), (128, Tile(16, 32, 8, 1)), (256, Tile(16, 32, 8, 1))],
        },
    },
    "keys": {
        80: {
            2: [(64, Tile(32, 128, 8, 2)), (128, Tile(32, 64, 8, 2)), (256, Tile(32, 64, 8, 1))],
            4: [(64, Tile(32, 32, 4, 2)), (128, Tile(16, 32, 4, 1)), (256, Tile(16, 32, 8, 1))],
        },
        86: {
            2: [(64, Tile(32, 128, 8, 2)), (128, Tile(32, 64, 8, 2)), (256, Tile(32, 32, 8, 1))],
            4: [(64, Tile(32, 32, 4, 1)), (128, Tile(16, 32, 4, 1)), (256, Tile(16, 32, 8, 1))],
        },
        90: {
            2: [(64, Tile(32, 128, 4, 3, _H100)), (128, Tile(32, 64, 4, 3, _H100)), (256, Tile(32, 32, 4, 2, _H100))],
            4: [(64, Tile(32, 32, 4, 2)), (128, Tile(16, 32, 4, 1)), (256, Tile(16, 32, 8, 1))],
        },
        100: {  # where the tiles of 90 spill 440 and 672 bytes, these nothing
            2: [(64, Tile(32, 128, 8, 2)), (128, Tile(32, 128, 8, 1)), (256, Tile(32, 32, 4, 2))],
            4: [(64, Tile(32, 32, 4, 2)), (128, Tile(16, 32, 4, 1)), (256, Tile(16, 32, 8, 1))],
        },
    },
    "bias": {  # both kernels of bias.py
        80: {
            2: [(64, Tile(64, 64, 8, 2)), (128, Tile(64, 64, 8, 2)), (256, Tile(32, 32, 4, 1))],
            4: [(64, Tile(32, 32, 4, 2)), (128, Tile(32, 32, 4, 1)), (256, Tile(16, 32, 4, 1))],
        },
    },
}
# What calls that are not plain take instead: with the measured tiles, for which registers barely suffice, they would
# spill up to 1,600 bytes.
ROOMY: dict[tuple[str, int, int], list[tuple[int, Tile]]] = {
    ("queries", 90, 2): [(64, Tile(128, 32, 8, 3)), (128, Tile(128, 32, 8, 3)), (256, Tile(128, 32, 8, 1, _H100))],
    ("keys", 90, 2): [(64, Tile(32, 128, 8, 2)), (128, Tile(32, 128, 8, 2)), (256, Tile(32, 32, 4, 2, _H100))],
}
INTERPRETED = Tile(128, 64, 4, 1, "for the interpreter: no speed is meant")
NARROW_HEAD = 16  # columns, padding included, up to which weights of halves are multiplied in float32
NARROW_TILES = {"forward": Tile(64, 64, 4, 2), "queries": Tile(64, 64, 4, 2), "keys": Tile(32, 64, 4, 2)}


def pieces(dim: int) -> tuple[int, int]:
    """Two powers of two, the second perhaps 0, of at least 16 each and together at least dim: 80 is 64 + 16."""
    power = 1 << max(4, (dim - 1).bit_length())
    half = power // 2
    if half < 16:
        return power, 0
    rest = max(16, 1 << (dim - half - 1).bit_length())
    return (half, rest) if half + rest < power else (power, 0)


def bytes_of_pairs(*loaded: Any) -> int:
    """What a loop loads for each pair of a query and a key from those of these tensors that there are."""
    return sum(tensor.element_size() for tensor in loaded if tensor is not None)


def attention_tile(
    kernel: str,
    arch: int,
    itemsize: int,
    dim_qk: int,
    dim_v: int,
    blocks: bool,
    plain: bool = True,
    pair_bytes: int = 0,
) -> Tile:
    """The tile of an attention kernel. arch: compute capability as 90 for 9.0, 0 for the interpreter. With `blocks`
    (form D) a tile has keys of one base block. plain: as in Tile.options. pair_bytes: what the loop loads for each pair
    of a query and a key, from a dense bias, a dense mask and a table."""
    tile = INTERPRETED
    if arch:
        by_arch = TABLE[kernel]
        known = 86 if arch in _SMALL else arch
        known = max(a for a in by_arch if a <= known)
        rows = by_arch[known][itemsize]
        if not plain:
            rows = ROOMY.get((kernel, known, itemsize), rows)
        width = max(sum(pieces(dim_qk)), sum(pieces(dim_v)))
        tile = next(tile for limit, tile in rows if width <= limit)
        if width <= NARROW_HEAD and itemsize == 2:
            tile = NARROW_TILES.get(kernel, tile)
        if kernel == "forward" and pair_bytes:
            tile = _with_room(tile, known, itemsize * width, pair_bytes)
    return tile._replace(block_k=min(tile.block_k, BASE_BLOCK)) if blocks else tile


def takes_tf32(arch: int, itemsize: int, dim_qk: int, dim_v: int) -> bool:
    """Whether products of float32 may round to TF32. It takes more shared memory: of heads beyond 192 a backward has
    114,688 bytes, and no smaller tile has less."""
    return arch not in _SMALL or itemsize != 4 or max(sum(pieces(dim_qk)), sum(pieces(dim_v))) <= 192


def decode_tile(arch: int, rows: int, dim: int, itemsize: int, pair_bytes: int) -> Tile:
    """The tile of the decoding kernel for so many rows, of all query heads of a key head and all new tokens: the
    largest of few tried that spill nothing. dim: the larger head dim. pair_bytes: as in attention_tile."""
    most = 16 if itemsize == 4 else 64 if dim <= 128 else 32
    block_q = min(most, max(16, 1 << (rows - 1).bit_length()))
    if itemsize == 4:
        return Tile(block_q, 16, 4, 3 if dim <= 128 else 2)
    has_room = arch not in _SMALL or (block_q == 16 and pair_bytes <= 4)
    return Tile(block_q, 64 if dim <= 128 else 32, 4, 3 if has_room else 2)


def _with_room(tile: Tile, arch: int, row_bytes: int, pair_bytes: int) -> Tile:
    """The tile of a forward with fewer stages where shared memory is too small for more: the compiler keeps what is
    loaded for pairs as often as keys and values. With half the queries where two stages are still too many."""
    while tile.stages > 2 and _forward_bytes(tile, arch, row_bytes, pair_bytes) > SHARED_BYTES[arch]:
        tile = tile._replace(stages=tile.stages - 1, measured="unmeasured")
    if tile.stages == 2 and _forward_bytes(tile, arch, row_bytes, pair_bytes) > SHARED_BYTES[arch]:
        tile = tile._replace(block_q=tile.block_q // 2, warps=4, measured="unmeasured")
    return tile


def _forward_bytes(tile: Tile, arch: int, row_bytes: int, pair_bytes: int) -> int:
    """As much shared memory as Triton 3.4 to 3.7 take at most for a forward of several stages. Hopper's products read
    the tile that the next one's copy must not overwrite yet."""
    pairs = tile.block_q * tile.block_k
    copies = tile.stages if arch >= 90 else tile.stages - 1
    walked = copies * 2 * tile.block_k * row_bytes + (tile.stages - 1) * pairs * pair_bytes
    return tile.block_q * row_bytes + walked + pairs + 9 * 1024  # to change layouts by
