"""Guard bands: out-of-bounds reads turn into NaN, out-of-bounds writes are seen.

`GuardedTensors.embed` copies a tensor into a larger buffer of its own. What lies before it, behind it and in the gaps
between its strides is filled with NaN (integers: with a value that is wrong everywhere), so a kernel that reads past
an edge carries the NaN into its result. `damage` compares every buffer, bit for bit, with what it held before the
call, which also catches a kernel that writes to its inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

GUARD_ELEMENTS = 64
"""Guarded elements on either side. A multiple of 64 keeps the 64-byte alignment that torch gave the storage."""

_INTEGER_FILL = 1 << 20  # far beyond any length drawn here, and it fits every integer type of 32 bits or more
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _span(tensor: Tensor) -> int:
    """Elements from the first to one past the last of a strided tensor."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _filler(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    if dtype is torch.bool:
        return True
    return _INTEGER_FILL if dtype.itemsize >= 4 else torch.iinfo(dtype).max


def _written_once(tensor: Tensor) -> Tensor:
    """The tensor with every expanded (stride 0) dimension cut to one element, so that it can be copied into."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.size(dim) > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


class GuardedTensors:
    """The guarded buffers of one call. `shift` moves every tensor by that many elements off its 64-byte alignment."""

    def __init__(self, shift: int = 0) -> None:
        self._front = GUARD_ELEMENTS + shift
        self._kept: list[tuple[str, Tensor, Tensor]] = []

    def embed(self, name: str, tensor: Tensor) -> Tensor:
        """Returns a copy with the same shape, strides, dtype, device and requires_grad, inside guard bands."""
        source = tensor.detach()
        buffer = torch.full(
            (self._front + _span(source) + GUARD_ELEMENTS,),
            _filler(source.dtype),
            dtype=source.dtype,
            device=source.device,
        )
        view = buffer.as_strided(source.shape, source.stride(), self._front)
        _written_once(view).copy_(_written_once(source))
        bits = buffer.view(_BITS[buffer.element_size()])
        self._kept.append((name, bits, bits.clone()))
        return view.detach().requires_grad_(tensor.requires_grad)

    def damage(self) -> list[str]:
        """Names of the tensors whose buffer, guard bands and gaps included, is not bit for bit what it was."""
        return [name for name, bits, before in self._kept if not torch.equal(bits, before)]


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Inside, torch and the CPU kernels use that many threads; None leaves the count as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def float32_sums() -> Iterator[None]:
    """Inside, torch's matrix products of half dtypes on GPUs add up in float32 alone.

    By default cuBLAS may round partial sums to the half dtype, and which ones depends on the layout. That decides the
    sign of pre-activations near 0, and so derivatives of relu, far beyond the rows that `near_kink` finds; the products
    are torch's own and not under test.
    """
    products = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = {name: getattr(products, name) for name in names}
    for name in names:
        setattr(products, name, False)
    try:
        yield
    finally:
        for name, allowed in before.items():
            setattr(products, name, allowed)


@contextlib.contextmanager
def poisoned_outputs(enabled: bool = True) -> Iterator[None]:
    """Inside, torch.empty and its relatives hand out memory filled with NaN (integers: the largest value).

    This is torch's own `fill_uninitialized_memory`, which works only together with deterministic algorithms; a
    backend therefore takes its deterministic paths inside.
    """
    if not enabled:
        yield
        return
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill
