"""What lowering remembers: results that a mask's next call, in the next layer or the next step, takes as they are.

Keys name tensors (and functions) by identity and version: writing to a tensor in place makes its results stale. The
cache holds neither, only weak references, and drops what belonged to those that died. It is bounded in entries and in
bytes, and may be used from any thread.

A CUDA graph that is captured holds addresses, and keeps alive nothing that was made before it: what a capture takes
from here stays for good, beside these bounds.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastattn.locks import Lock

T = TypeVar("T")


def stream_of(device: torch.device) -> Any:
    """What a key holds where the value is not finished when it is made: another stream would not wait for it. None on
    a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class _Entry(NamedTuple):
    value: Any
    size: int
    watched: tuple[weakref.ref[Any], ...]


class Cache:
    """A least-recently-used cache whose keys may depend on objects that it does not keep alive."""

    def __init__(self, entries: int, size: int) -> None:
        self._most_entries, self._most_bytes = entries, size
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._bytes = 0
        self._captured: dict[int, Any] = {}  # by identity: the values that some CUDA graph reads
        self._dead: deque[Hashable] = deque()  # a collection may strike inside any call: it only appends here
        self._lock = Lock()

    def __len__(self) -> int:
        with self._lock:
            self._bury()
            return len(self._entries)

    def clear(self) -> None:
        """Forgets everything but what CUDA graphs read."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0

    def get(self, key: Hashable, watched: Sequence[Any], make: Callable[[], T]) -> T:
        """The value remembered for `key` and these objects, or `make()`, remembered.

        watched: tensors and functions whose identity is part of the key. A value made under a dispatch mode, as
        torch.func's wrapper, from tensors whose writes torch does not count, or from a function to which there are no
        weak references, is not remembered.
        """
        if _get_current_dispatch_mode() is not None or any(_is_unwatchable(x) for x in watched):
            return make()
        full = (key, tuple((id(x), x._version if isinstance(x, Tensor) else 0) for x in watched))
        with self._lock:
            self._bury()
            entry = self._entries.get(full)
            if entry is not None:
                self._entries.move_to_end(full)
                if is_capturing():
                    self._captured[id(entry.value)] = entry.value
                return entry.value
        # Inference tensors could not be saved for the backward of a later call.
        with torch.inference_mode(False), torch.no_grad():
            value = make()
        self._put(full, watched, value)
        return value

    def _put(self, key: Hashable, watched: Sequence[Any], value: Any) -> None:
        found = tensors_in(value)
        if any(_is_wrapped(t) for t in found) or is_capturing():
            return  # what a capture makes has no values before the graph runs, and others after each replay
        bury = self._dead.append
        references = tuple(weakref.ref(x, lambda _: bury(key)) for x in watched)
        entry = _Entry(value, sum(t.nbytes for t in found), references)
        with self._lock:
            self._drop(key)
            self._entries[key] = entry
            self._bytes += entry.size
            while len(self._entries) > 1 and (
                len(self._entries) > self._most_entries or self._bytes > self._most_bytes
            ):
                self._drop(next(iter(self._entries)))

    def _bury(self) -> None:
        while self._dead:
            self._drop(self._dead.popleft())

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.size


def is_capturing() -> bool:
    """Whether this thread captures a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nest of tuples."""
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in tensors_in(item)] if isinstance(value, tuple) else []


def _is_wrapped(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor)) or type(tensor) is not Tensor


def _may_be_written_by_others(tensor: Tensor) -> bool:
    """Whether its memory is not torch's own but, say, an array of NumPy's, which is filled anew for every batch."""
    return tensor.layout is torch.strided and not tensor.untyped_storage().resizable()


def _is_unwatchable(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_inference() or _is_wrapped(value) or _may_be_written_by_others(value)
    return type(value).__weakrefoffset__ == 0  # an instance of a class with __slots__, say
