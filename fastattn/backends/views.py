"""How tensors and masks are handed to the native modules: addresses and strides, as csrc/bindings/views.h has them; and
how results lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import Blocks, LoweredMask


def address(tensor: Tensor | None) -> int:
    """The data pointer, 0 for None and for a tensor without elements."""
    return 0 if tensor is None else tensor.data_ptr()


def view(tensor: Tensor | None) -> tuple[int, ...] | None:
    """Data pointer and strides of a tensor of up to four dimensions."""
    return None if tensor is None else (tensor.data_ptr(), *tensor.stride())


def broadcast_view(tensor: Tensor | None) -> tuple[int, ...] | None:
    """As view, with strides 0 in dimensions of one element too: by them the kernels know what is broadcast."""
    if tensor is None:
        return None
    shape, strides = tensor.shape, tensor.stride()
    if 1 in shape:  # what follows is a tenth of a small call's time
        strides = tuple([0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True)])
    return (tensor.data_ptr(), *strides)


def as_matrix(x: Tensor) -> Tensor:
    """(..., N) as (rows, N); N may be 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def is_transposed(weight: Tensor) -> bool:
    """Whether a weight (N, K) lies in memory by its columns, as one transposed does."""
    return weight.stride(1) != 1 and weight.shape[1] != 1


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """grad^T x of matrices of rows by torch, lying in memory as the weight does."""
    return (x.t() @ grad).t() if is_transposed(weight) else grad.t() @ x


def empty_out(q: Tensor, dim_v: int) -> Tensor:
    """An output (B, Hq, Sq, Dv) for q (B, Hq, Sq, D), (B, Sq, Hq, Dv) in memory."""
    batch, heads, len_q, _ = q.shape
    row = max(heads, 1) * dim_v
    return q.new_empty_strided((batch, heads, len_q, dim_v), (max(len_q, 1) * row, dim_v, row, 1))


def writable(grad: Tensor) -> Tensor:
    """The gradient itself, or room for it where its last dimension is not contiguous, in which kernels cannot write."""
    return grad if grad.stride(3) == 1 or grad.shape[3] == 1 else grad.new_empty(grad.shape)


def copied(written: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, with what was written in the room of those that have some."""
    dq, dk, dv = (grad if own is grad else grad.copy_(own) for own, grad in zip(written, grads, strict=True))
    return dq, dk, dv


_NO_DISTANCES = (0, 0, 0, 0, 0, 0, False)


def distance_arguments(bias: LoweredBias) -> tuple[Any, ...]:
    """The parts of a bias that depend on distance alone, as both modules take them."""
    table, slopes = bias.table, bias.slopes
    if table is None and slopes is None:
        return _NO_DISTANCES
    return (
        address(table),
        table.shape[1] if table is not None and table.shape[0] > 1 else 0,
        bias.first,
        0 if table is None else table.shape[1],
        address(slopes),
        slopes.shape[1] if slopes is not None and slopes.shape[0] > 1 else 0,
        bias.top_left,
    )


def mask_arguments(mask: LoweredMask, batch: int, heads: int) -> tuple[Any, ...]:
    """The mask as both modules take it; batch and heads are the sizes that its tensors are expanded to."""
    intervals, blocks = mask.intervals, mask.blocks
    if intervals is not None:
        intervals = intervals.expand(intervals.shape[0], batch, heads, -1, 2)
    return (
        address(mask.key_start),
        address(mask.key_end),
        address(mask.key_bits),
        mask.band_offset,
        mask.band_left,
        mask.band_right,
        None if intervals is None else (intervals.data_ptr(), *intervals.stride()[:4]),
        0 if intervals is None else intervals.shape[0],
        None if blocks is None else _block_arguments(blocks),
        broadcast_view(mask.dense),
    )


def _block_arguments(blocks: Blocks) -> tuple[Any, ...]:
    """Rows of blocks only; a backward by keys is given the columns too."""
    return broadcast_view(blocks.row_ptr), *map(address, (blocks.col, blocks.id, blocks.bitmaps))
