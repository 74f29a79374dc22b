"""The mask, the bias and the plan of tiles as arguments of the attention kernels (fastattn.kernels.attention)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.backends.triton.launch import launch
from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import Blocks, LoweredMask
from fastattn.packed import Packed

FAR = 1 << 30
_CHUNK = 32  # key tiles that one program of classify_kernel looks at
_LIST_CHUNK = 128


class Mask(NamedTuple):
    """A lowered mask as kernel arguments. entries: batch entries and heads in which the planned states differ."""

    arguments: dict[str, Any]
    entries: tuple[int, int]
    listed: bool

    @property
    def has_blocks(self) -> bool:
        return self.arguments["block_ids"] is not None


class Plan(NamedTuple):
    """The arguments that say which tiles a kernel visits; states (entries, query tiles, key tiles) where listed."""

    arguments: dict[str, Any]
    states: Tensor | None


def mask_arguments(
    mask: LoweredMask,
    batch: int,
    heads: int,
    len_q: int,
    len_k: int,
    packed: Packed | None = None,
    rows_q: int = 0,
    rows_k: int = 0,
) -> Mask:
    """Kernel arguments for a mask whose dense part is expanded to (batch, heads, len_q, len_k), and for the sequences
    of a packed batch among rows_q queries and rows_k keys."""
    dense, flags = mask.dense, None
    if dense is not None and _is_key_mask(dense):
        dense, flags = None, dense
    arguments: dict[str, Any] = {
        "cu_q": None if packed is None else packed.cu_seqlens_q,
        "cu_k": None if packed is None else packed.cu_seqlens_k,
        "rows_q": rows_q,
        "rows_k": rows_k,
        "key_start": mask.key_start,
        "key_end": mask.key_end,
        "key_bits": mask.key_bits,
        "words": 0 if mask.key_bits is None else mask.key_bits.shape[1],
        "key_flags": flags,
        "flags_b": 0 if flags is None else _stride(flags, 0),
        "flags_k": 0 if flags is None else _stride(flags, 3),
        "HAS_BAND": mask.band_left is not None or mask.band_right is not None,
        "band_low": -FAR if mask.band_left is None else near(mask.band_offset - mask.band_left),
        "band_high": FAR if mask.band_right is None else near(mask.band_offset + mask.band_right),
    }
    arguments |= interval_arguments(mask)
    ids = None if mask.blocks is None else _block_ids(mask.blocks, len_k)
    arguments |= {"block_ids": ids, "bitmaps": None if mask.blocks is None else mask.blocks.bitmaps}
    steps = (0, 0, 0) if ids is None else tuple(_stride(ids, d) for d in range(3))
    arguments |= dict(zip(("ids_b", "ids_h", "ids_q"), steps, strict=True))
    steps = (0, 0, 0, 0) if dense is None else tuple(_stride(dense, d) for d in range(4))
    arguments |= {"dense": dense, **dict(zip(("dense_b", "dense_h", "dense_q", "dense_k"), steps, strict=True))}

    by_batch = any(t is not None for t in (mask.key_start, mask.key_end, mask.key_bits, packed))
    for name in ("flags_b", "intervals_b", "ids_b", "dense_b"):
        by_batch |= arguments[name] != 0
    by_head = any(arguments[name] != 0 for name in ("intervals_h", "ids_h", "dense_h"))
    listed = any(arguments[name] is not None for name in ("key_bits", "key_flags", "intervals", "block_ids", "dense"))
    entries = (batch if by_batch else 1, heads if by_head else 1)
    return Mask(arguments, entries, listed and len_q > 0 and len_k > 0)


def interval_arguments(mask: LoweredMask) -> dict[str, Any]:
    """Kernel arguments for the intervals of a mask."""
    intervals = mask.intervals
    steps = (0, 0, 0) if intervals is None else tuple(_stride(intervals, d) for d in range(3))
    return {
        "intervals": intervals,
        "INTERVALS": 0 if intervals is None else intervals.shape[0],
        **dict(zip(("by_interval", "intervals_b", "intervals_h"), steps, strict=True)),
    }


def bias_arguments(bias: LoweredBias, full: tuple[int, int, int, int]) -> dict[str, Any]:
    """Kernel arguments for a bias of a call of B, Hq, Sq, Skv = full."""
    steps = (0, 0, 0, 0) if bias.dense is None else bias.dense.expand(full).stride()
    return {
        "bias": bias.dense,
        **dict(zip(("bias_b", "bias_h", "bias_q", "bias_k"), steps, strict=True)),
        "table": bias.table,
        "table_h": 0 if bias.table is None or bias.table.shape[0] == 1 else bias.table.shape[1],
        "table_first": near(bias.first),
        "table_last": 0 if bias.table is None else bias.table.shape[1] - 1,
        "slopes": bias.slopes,
        "slopes_b": 0 if bias.slopes is None or bias.slopes.shape[0] == 1 else full[1],
        "TOP_LEFT": bias.top_left and (bias.table is not None or bias.slopes is not None),
    }


def plan_keys(mask: Mask, len_q: int, len_k: int, block_q: int, block_k: int) -> Plan:
    """Which key tiles each query tile visits."""
    if not mask.listed:
        return Plan(_unlisted(), None)
    states = _classify(mask, len_q, len_k, block_q, block_k)
    return Plan(_listed(states, mask), states)


def plan_queries(mask: Mask, len_q: int, len_k: int, block_q: int, block_k: int) -> Plan:
    """Which query tiles each key tile visits."""
    if not mask.listed:
        return Plan(_unlisted(), None)
    states = _classify(mask, len_q, len_k, block_q, block_k)
    return Plan(_listed(states.transpose(1, 2), mask), states)


def _unlisted() -> dict[str, Any]:
    absent = dict.fromkeys(("tiles", "full_counts", "partial_counts", "order"))
    return {**absent, "plan_b": 0, "plan_h": 0, "LISTED": False}


def _listed(states: Tensor, mask: Mask) -> dict[str, Any]:
    """The lists of states' last dimension, and the order of its rows from the longest list to the shortest."""
    from fastattn.kernels.attention.mask import compact_kernel

    entries, rows, columns = states.shape
    tiles = torch.empty(entries, rows, columns, dtype=torch.int32, device=states.device)
    full, partial = (torch.empty(entries, rows, dtype=torch.int32, device=states.device) for _ in range(2))
    by_entry, by_row, by_column = states.stride()
    arguments = {
        "states": states,
        "tiles": tiles,
        "full_counts": full,
        "partial_counts": partial,
        "rows": rows,
        "columns": columns,
        "by_entry": by_entry,
        "by_row": by_row,
        "by_column": by_column,
        "CHUNK": _LIST_CHUNK,
    }
    launch(compact_kernel, (entries * rows,), arguments, num_warps=4)
    order = torch.argsort(full + partial, dim=1, descending=True, stable=True).to(torch.int32)
    batches, heads = mask.entries
    return {
        "tiles": tiles,
        "full_counts": full,
        "partial_counts": partial,
        "order": order,
        "plan_b": heads if batches > 1 else 0,
        "plan_h": 1 if heads > 1 else 0,
        "LISTED": True,
    }


def _classify(mask: Mask, len_q: int, len_k: int, block_q: int, block_k: int) -> Tensor:
    """The state of every tile: 0 empty, 1 partial, 2 full; uint8 (entries, query tiles, key tiles)."""
    from fastattn.kernels.attention.mask import classify_dense_kernel, classify_kernel

    batches, heads = mask.entries
    tiles_q, tiles_k = -(-len_q // block_q), -(-len_k // block_k)
    device = next(t.device for t in mask.arguments.values() if isinstance(t, Tensor))
    states = torch.empty(batches * heads, tiles_q, tiles_k, dtype=torch.uint8, device=device)
    arguments = {
        **mask.arguments,
        "states": states,
        "plan_heads": heads,
        "len_q": len_q,
        "len_k": len_k,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "CHUNK": _CHUNK,
    }
    rows = batches * heads * tiles_q
    launch(classify_kernel, (rows, -(-tiles_k // _CHUNK)), arguments, num_warps=4)
    if mask.arguments["dense"] is not None:
        launch(classify_dense_kernel, (rows, tiles_k), arguments, num_warps=4)
    return states


def _block_ids(blocks: Blocks, len_k: int) -> Tensor:
    """Form D as a table (1|B, 1|Hq, query blocks, key blocks) int32 of ids, -1 where a block is empty."""
    from fastattn.kernels.attention.mask import block_ids_kernel

    batches, heads, rows = blocks.row_ptr.shape[0], blocks.row_ptr.shape[1], blocks.row_ptr.shape[2] - 1
    columns = -(-len_k // 64)
    table = torch.full((batches, heads, rows, columns), -1, dtype=torch.int32, device=blocks.col.device)
    arguments = {
        "table": table,
        "row_ptr": blocks.row_ptr,
        "col": blocks.col,
        "id": blocks.id,
        "rows": rows,
        "columns": columns,
        "CHUNK": _LIST_CHUNK,
    }
    launch(block_ids_kernel, (batches * heads * rows,), arguments, num_warps=4)
    return table


def _is_key_mask(dense: Tensor) -> bool:
    return _stride(dense, 1) == 0 and _stride(dense, 2) == 0


def _stride(tensor: Tensor, dim: int) -> int:
    """0 in a dimension of one element: whatever else torch says there, no address differs by it."""
    return 0 if tensor.shape[dim] == 1 else tensor.stride(dim)


def near(number: int) -> int:
    """Band limits beyond any distance become one that sums of positions cannot overflow with."""
    return max(-FAR, min(FAR, number))
