"""Triton's interpreter at a bearable speed.

Nearly all the time of a small kernel goes into what surrounds its arithmetic. Within one launch
- the builtins that a module sees are replaced once, and not at every call of a device function;
- operators on tensors of one type, and a few functions, go to NumPy directly, without type promotion, copies to
  broadcast and a check for overflow that takes ten operators more;
- what follows from a type and a shape, such as that each length is a power of two, is found once;
- matrix products are torch's, on one thread: NumPy's own threads take milliseconds to share a tile.
The results are those of Triton's way. It is taken wherever a shortcut does not know what to do, and altogether where
the interpreter is not the one known here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

_MISSING = object()

# Operators of tensors: the function, and the kinds of types that it is known for here.
_OPERATORS: dict[str, tuple[Callable[..., Any], str]] = {
    "__add__": (np.add, "if"),
    "__sub__": (np.subtract, "if"),
    "__mul__": (np.multiply, "if"),
    "__mod__": (np.fmod, "i"),
    "__floordiv__": (lambda a, b: (a - np.fmod(a, b)) // b, "i"),  # towards 0, as in C
    "__rshift__": (np.right_shift, "iu"),
    "__and__": (np.bitwise_and, "biu"),
    "__or__": (np.bitwise_or, "biu"),
    "__xor__": (np.bitwise_xor, "biu"),
    "__lt__": (np.less, "if"),
    "__le__": (np.less_equal, "if"),
    "__gt__": (np.greater, "if"),
    "__ge__": (np.greater_equal, "if"),
    "__eq__": (np.equal, "if"),
    "__ne__": (np.not_equal, "if"),
}
_REFLECTED = {"__radd__": "__add__", "__rmul__": "__mul__", "__rsub__": "__sub__"}
_TYPES = {"int1": np.bool_, "int32": np.int32, "int64": np.int64, "uint32": np.uint32, "float32": np.float32}
_INTS = {t: (int(np.iinfo(t).min), int(np.iinfo(t).max)) for t in (np.int32, np.int64, np.uint32)}


@contextlib.contextmanager
def at_speed() -> Iterator[None]:
    """Within the block, a single launch, the interpreter works as this module says."""
    changes, threads = _Changes(), torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.suppress(AttributeError, ImportError):
        _speed_up(changes)
    try:
        yield
    finally:
        changes.undo()
        torch.set_num_threads(threads)


class _Changes:
    """Attributes that are set for a while."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def undo(self) -> None:
        for owner, name, value in reversed(self._before):
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _speed_up(changes: _Changes) -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder, shortcuts = interpreter.interpreter_builder, _shortcuts()
    changes.set(interpreter, "_patch_lang", _patching_once(interpreter._patch_lang))
    changes.set(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
    changes.set(builder, "create_dot", shortcuts.dot(builder.create_dot))
    changes.set(builder, "cast_impl", shortcuts.cast(builder.cast_impl))
    changes.set(interpreter, "_get_np_dtype", shortcuts.numpy_type_of)
    for name, (function, kinds) in _OPERATORS.items():
        changes.set(tl.tensor, name, shortcuts.operator(getattr(tl.tensor, name), function, kinds))
    for name, plain in _REFLECTED.items():
        function, kinds = _OPERATORS[plain]
        changes.set(tl.tensor, name, shortcuts.operator(getattr(tl.tensor, name), _swapped(function), kinds))
    changes.set(tl.tensor, "__getitem__", shortcuts.index(tl.tensor.__getitem__))
    changes.set(tl.tensor, "to", shortcuts.to(tl.tensor.to))
    changes.set(tl.tensor, "__init__", shortcuts.tensor_made(tl.tensor.__init__))
    changes.set(tl.block_type, "__init__", shortcuts.block_type_made(tl.block_type.__init__))
    for module in (tl, tl.core):
        changes.set(module, "where", shortcuts.where(module.where))
        changes.set(module, "load", shortcuts.load(module.load))


def _swapped(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: function(b, a)


def _patching_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch(function)

    return patch_once


def _cached(numpy_type: Callable[[Any], Any]) -> Callable[[Any], Any]:
    found: dict[str, Any] = {}

    def look_up(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in found:
            found[name] = numpy_type(dtype)
        return found[name]

    return look_up


@functools.cache
def _shortcuts() -> _Shortcuts:
    return _Shortcuts()


class _Shortcuts:
    """Makes what stands in for a function of Triton, and calls that one where it does not know what to do itself."""

    def __init__(self) -> None:
        import triton.language as tl
        from triton.runtime import interpreter

        self.tensor, self.constant, self.block_type = tl.tensor, tl.constexpr, tl.block_type
        self.handle, self.semantic = interpreter.TensorHandle, interpreter.interpreter_semantic
        self.numpy_type = {getattr(tl, name).name: np.dtype(numpy) for name, numpy in _TYPES.items()}
        self.types = {np.dtype(numpy): getattr(tl, name) for name, numpy in _TYPES.items()}
        self.numpy_type_of, self.memory = _cached(interpreter._get_np_dtype), interpreter._interpreter
        # What tensors and block types hold besides their data, by the names of types and by shapes.
        self.forms: dict[tuple[str, tuple[int, ...] | None], dict[str, Any]] = {}
        self.named_forms: dict[str, dict[str, Any]] = {}
        self.block_forms: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def wrap(self, data: Any, is_block: bool, dtype: Any = None) -> Any:
        """A tensor that holds `data`. What Triton derives from type and shape is derived once."""
        dtype = self.types[data.dtype] if dtype is None else dtype
        handle = self.handle(data, dtype)
        key = (dtype.name, data.shape if is_block else None)
        form = self.forms.get(key)
        if form is None:
            made = self.tensor(handle, self.block_type(dtype, list(data.shape)) if is_block else dtype)
            self.forms[key] = vars(made).copy()
            return made
        found = self.tensor.__new__(self.tensor)
        found.__dict__.update(form)
        found.handle = handle
        return found

    def tensor_made(self, slow: Any) -> Any:
        def tensor_made(tensor: Any, handle: Any, kind: Any) -> None:
            form = self.named_forms.get(kind.name)
            if form is None:
                slow(tensor, handle, kind)
                self.named_forms[kind.name] = vars(tensor).copy()
            else:
                tensor.__dict__.update(form)
                tensor.handle = handle

        return tensor_made

    def block_type_made(self, slow: Any) -> Any:
        def block_type_made(block: Any, element: Any, shape: Any) -> None:
            key = (element.name, tuple([s.value if s.__class__ is self.constant else s for s in shape]))
            form = self.block_forms.get(key)
            if form is None:
                slow(block, element, shape)
                self.block_forms[key] = vars(block).copy()
            else:
                block.__dict__.update(form)

        return block_type_made

    def known(self, value: Any) -> Any:
        """The array of a tensor whose type is known here, else None."""
        data = value.handle.data
        return data if self.numpy_type.get(value.dtype.name) == data.dtype else None

    def beside(self, value: Any, data: Any) -> Any:
        """What `value` is as the other operand of `data`: an array or NumPy number of its type; None if not known."""
        if value.__class__ is self.tensor:
            other = self.known(value)
            if other is None or other.dtype == data.dtype or other.dtype.kind == data.dtype.kind == "i":
                return other
            return None
        if value.__class__ is self.constant:
            value = value.value
        if value.__class__ is int:
            if data.dtype.kind == "f":
                return data.dtype.type(value)
            low, high = _INTS.get(data.dtype.type, (1, 0))
            return data.dtype.type(value) if low <= value <= high else None
        return data.dtype.type(value) if value.__class__ is float and data.dtype.kind == "f" else None

    def operator(self, slow: Any, function: Callable[..., Any], kinds: str) -> Any:
        pointers = function is np.add

        def operate(one: Any, other: Any) -> Any:
            data = self.known(one)
            if data is not None and data.dtype.kind in kinds:
                beside = self.beside(other, data)
                if beside is not None:
                    is_block = one.type.is_block() or (other.__class__ is self.tensor and other.type.is_block())
                    return self.wrap(function(data, beside), is_block)
            elif pointers and other.__class__ is self.tensor and one.dtype.is_ptr():
                offset = self.known(other)
                if offset is not None and offset.dtype.kind == "i":
                    bytes_each = max(1, one.dtype.element_ty.primitive_bitwidth // 8)
                    address = one.handle.data + bytes_each * offset.astype(np.uint64)
                    return self.wrap(address, one.type.is_block() or other.type.is_block(), one.dtype)
            return slow(one, other, _semantic=self.semantic)

        return operate

    def index(self, slow: Any) -> Any:
        """x[:, None] and its like."""

        def index(one: Any, key: Any) -> Any:
            if key.__class__ is tuple and one.type.is_block() and all(k is None or k == slice(None) for k in key):
                return self.wrap(one.handle.data[key], True, one.dtype)
            return slow(one, key, _semantic=self.semantic)

        return index

    def to(self, slow: Any) -> Any:
        """Conversions that lose nothing."""
        widening = {("fp16", "fp32"), ("int32", "int64"), ("int1", "int32"), ("int1", "int64")}

        def convert(one: Any, dtype: Any, *options: Any, **named: Any) -> Any:
            wanted = dtype.value if dtype.__class__ is self.constant else dtype
            if not options and not named:
                names = one.dtype.name, wanted.name
                if names[0] == names[1]:
                    return one
                data = one.handle.data
                if names in widening:
                    return self.wrap(data.astype(self.numpy_type[names[1]]), one.type.is_block())
                if names == ("bf16", "fp32"):
                    return self.wrap((data.astype(np.uint32) << 16).view(np.float32), one.type.is_block())
            return slow(one, dtype, *options, **named, _semantic=self.semantic)

        return convert

    def where(self, slow: Any) -> Any:
        def where(condition: Any, x: Any, y: Any, **named: Any) -> Any:
            if condition.__class__ is self.tensor and condition.dtype.name == "int1":
                tensors = [t for t in (x, y) if t.__class__ is self.tensor]
                first = self.known(tensors[0]) if tensors else None
                if first is not None:
                    one, two = self.beside(x, first), self.beside(y, first)
                    if one is not None and two is not None and one.dtype == two.dtype:
                        is_block = any(t.type.is_block() for t in (condition, *tensors))
                        return self.wrap(np.where(condition.handle.data, one, two), is_block)
            return slow(condition, x, y, **{**named, "_semantic": self.semantic})

        return where

    def load(self, slow: Any) -> Any:
        """A block through its pointers, with what lies outside of the mask a number."""

        def load(pointer: Any, mask: Any = None, other: Any = None, **named: Any) -> Any:
            other = other.value if other.__class__ is self.constant else other
            known = pointer.type.is_block() and (mask is None or mask.__class__ is self.tensor)
            if named or not known or other.__class__ not in (float, int, type(None)):
                return slow(pointer, mask, other, **{**named, "_semantic": self.semantic})
            element, addresses = pointer.dtype.element_ty, pointer.handle.data
            numpy_type = self.numpy_type_of(element)
            if element.name == "int1" or (numpy_type.kind != "f" and other):
                return slow(pointer, mask, other, _semantic=self.semantic)
            fill = np.full(addresses.shape, other or 0, numpy_type)
            visible = np.ones(addresses.shape, bool) if mask is None else mask.handle.data
            if visible.shape != addresses.shape:
                visible = np.broadcast_to(visible, addresses.shape)
            return self.wrap(self.memory.load(addresses, visible, fill, numpy_type), True, element)

        return load

    def cast(self, slow: Any) -> Any:
        """float32 to bfloat16, cut off as Triton's way does, which takes denormal numbers to be others."""

        def cast(source: Any, wanted: Any) -> Any:
            if source.dtype.scalar.name == "fp32" and wanted.scalar.name == "bf16":
                bits = source.data.view(np.uint32)
                if not np.any((bits & 0x7F800000 == 0) & (bits & 0x7FFFFF != 0)):
                    return self.handle((bits >> 16).astype(np.uint16), wanted.scalar)
            return slow(source, wanted)

        return cast

    def dot(self, slow: Any) -> Any:
        def dot(a: Any, b: Any, d: Any, *options: Any) -> Any:
            if not a.data.dtype == b.data.dtype == d.data.dtype == np.float32:
                return slow(a, b, d, *options)
            product = torch.from_numpy(a.data) @ torch.from_numpy(b.data)
            return self.handle(product.numpy() + d.data, d.dtype)

        return dot
