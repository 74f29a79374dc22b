"""prepack: a model's weights are kept as the CPU kernels multiply by them, from one call to the next.

A product of many rows packs its weight first, which is 5 to 30 % of its time. Here is said whose weights may be kept
packed; the binding (csrc/bindings/cpu_packed.cpp) packs each at the first call that reads it with rows enough, in the
part and layout that the call reads, and forgets it when it changes.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fastattn.backends import cpu
from fastattn.backends.codes import DTYPES
from fastattn.backends.cpu.library import native
from fastattn.errors import NotSupported
from fastattn.nn.fused import Fused
from fastattn.swap.table import aligned, merged, without_numbers

_MIB = 2**20
_COLUMNS = ("path", "shape", "dtype", "action", "MiB", "reason")
_WAITS = "no call that gains by it has read it yet"
_CHANGED = "it has changed since; prepack again to keep what it is now"
_MOVED = "its module holds other memory by now; prepack again to keep that"


@dataclass(frozen=True)
class PackedRow:
    """One weight."""

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    action: str
    """"packed", "waits" (for a call that reads it) or "left"."""
    bytes: int = 0
    """Of what is kept packed of it, all parts and layouts together."""
    reason: str = ""


@dataclass
class Prepacked:
    """What `prepack` keeps for a model; printed, a table where layers that differ only by number share a line.

    It does not keep the model alive, and the model does not need it: dropped, the weights stay packed. They are freed
    by `undo`, or with the model. A copy of a handle (deepcopy, pickle), as of a model that holds one, keeps nothing.
    """

    model_name: str
    _weights: list[_Weight] = field(default_factory=list, repr=False)

    @property
    def rows(self) -> list[PackedRow]:
        """Every weight of the model, as it stands now."""
        return [weight.row() for weight in self._weights]

    @property
    def bytes(self) -> int:
        """What is kept beside the weights themselves."""
        return sum(row.bytes for row in self.rows)

    def undo(self) -> None:
        """Frees what is packed; calls pack for themselves again. Calls that run meanwhile end as they began. A second
        time it does nothing, and another prepack of the same model keeps its own."""
        for weight in self._weights:
            weight.forget("undone")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model_name,)

    def __str__(self) -> str:
        return "\n".join([self._headline(), *aligned(_COLUMNS, _table(self.rows), "MiB")])

    def _headline(self) -> str:
        rows = self.rows
        count = {action: sum(row.action == action for row in rows) for action in ("packed", "waits", "left")}
        kept = sum(row.bytes for row in rows) / _MIB
        return (
            f"fastattn prepack of {self.model_name}: {count['packed']} weights packed, {kept:.1f} MiB beside the "
            f"model; {count['waits']} wait for a call, {count['left']} left alone"
        )


def prepack(model: nn.Module) -> Prepacked:
    """Keeps the weights of a swapped model packed for the CPU kernels, in inference.

    A kernel that multiplies many rows brings the weight into the order in which it reads it, in each call. From here on
    that is done once: at the first call that reads a weight with rows enough to gain, the packed form is kept, and the
    next calls read it. So one call, of the length to come, warms a model up; a weight that only ever meets few rows
    takes no memory. Weights, answers and state_dict stay what they are: packed or not, a product of the same kernel is
    bitwise the same, and where fewer rows are now multiplied by the packed weight, within the parity rule.

    Memory: what is packed takes about as much again as the weight. Parts of a weight that calls read apart, as q, k and
    v of an in_proj_weight, are kept apart. Kept are float32, and bfloat16 where the CPU multiplies it (AVX-512 BF16,
    AMX); halves that it multiplies as float32, or in two parts, would take twice their memory, and are left alone.

    A weight that is changed in place, by an optimiser, by load_state_dict or by any other operation that torch counts,
    is no longer read packed from that moment on, and the handle says so. Call prepack again to keep the new values. Of
    what writes past torch's count of changes (`.data`, NumPy, a mapped file) only changes of a whole weight are seen:
    undo before others, or prepack again after them. Before a model goes to another dtype or device, undo: the old
    weights, and what was packed of them, would stay until then, or until the next prepack or print of the handle.

    Args:
        model: a model with modules that `fastattn.swap` has swapped, or of `fastattn.nn`. All its matrices on the CPU
            count, whichever kernel reads them: of linears, attention, blocks and stacked experts.

    Returns:
        A handle. Print it; its `rows` say of every weight whether it is packed, in how many bytes, or why not, and
        `undo()` frees everything: keep it for that. With the model everything is freed, too, handle or not. Copies of
        the model (deepcopy, pickle) are not packed.

    Raises:
        TypeError: model is not an nn.Module.
        ValueError: nothing in it runs on fastattn's kernels.
        NotSupported: the CPU kernels are not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    name = type(model).__name__
    missing = cpu.unavailable_reason()
    if missing is not None:
        raise NotSupported("prepack", name, {cpu.NAME: [missing]}, "There is nothing to pack for without them.")
    if not any(isinstance(module, Fused) for module in model.modules()):
        raise ValueError(
            f"model: nothing in this {name} runs on fastattn's kernels, so there is nothing to pack: call "
            "fastattn.swap(model) first"
        )
    _forget_moved()
    _forget_orphans(model)
    _watch_optimizers()
    return Prepacked(name, [_Weight(path, module, each) for path, module, each in _matrices(model)])


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, module and name of each parameter that a product may read, shared ones once: matrices, and those of all
    experts in one tensor. Embeddings are looked up, unless a linear shares theirs; lazy ones have no shape yet."""
    met: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or is_lazy(parameter) or parameter.is_nested or id(parameter) in met:
                continue
            if parameter.dim() not in (2, 3):
                continue
            met.add(id(parameter))
            yield f"{path}.{name}".lstrip("."), module, name


class _Weight:
    """A parameter that is kept, or the reason why not. It belongs to a module, which it does not keep alive."""

    def __init__(self, path: str, module: nn.Module, name: str) -> None:
        parameter = module._parameters[name]
        assert parameter is not None
        self.path, self.name = path, name
        self.shape, self.dtype = tuple(parameter.shape), parameter.dtype
        self.module = weakref.ref(module)
        self.reason = _why_not(parameter)
        self.token: int | None = None
        if self.reason is None:
            self._keep(module, parameter)

    def _keep(self, module: nn.Module, parameter: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            alias = parameter.detach()
        self.address, size = _extent(alias)
        self.owner = id(module)
        self.token = token = native().keep_packed(alias, self.address, size)
        _kept[token] = self
        # With the module its weights go, and what is packed of them. (A weak reference to a parameter would keep
        # torch.utils.swap_tensors from it.)
        finalizer = weakref.finalize(module, _forget, self.owner, token)
        finalizer.atexit = False
        _finalizers.setdefault(self.owner, {})[token] = finalizer

    def forget(self, reason: str) -> None:
        """Frees what is packed; the reason stands in the report from now on."""
        token, self.token = self.token, None
        if token is not None:
            self.reason = reason
            _forget(self.owner, token)

    def has_moved(self) -> bool:
        """Whether the parameter's memory is another one now, or the module holds another parameter."""
        module = self.module()
        parameter = None if module is None else module._parameters.get(self.name)
        if parameter is None or type(parameter) is not nn.Parameter or _why_not(parameter) is not None:
            return True
        return parameter.data_ptr() != self.address

    def row(self) -> PackedRow:
        if self.token is not None and self.module() is None:
            self.forget("its module is gone")
        elif self.token is not None and self.has_moved():
            self.forget(_MOVED)
        token = self.token
        state = None if token is None else native().packed_state(token)
        if state is None:
            return PackedRow(self.path, self.shape, self.dtype, "left", reason=self.reason or "")
        pieces, size, changed = state
        if changed:
            return PackedRow(self.path, self.shape, self.dtype, "left", reason=_CHANGED)
        if not pieces:
            return PackedRow(self.path, self.shape, self.dtype, "waits", reason=_WAITS)
        parts = f"{pieces} parts" if pieces > 1 else ""
        return PackedRow(self.path, self.shape, self.dtype, "packed", size, parts)


_kept: weakref.WeakValueDictionary[int, _Weight] = weakref.WeakValueDictionary()
"""Of every token whose handle is still there."""


_finalizers: dict[int, dict[int, weakref.finalize[..., nn.Module]]] = {}
"""By the module's id and the token: each frees a weight with its module."""


def _forget(owner: int, token: int) -> None:
    native().forget_packed(token)
    finalizers = _finalizers.get(owner, {})
    finalizer = finalizers.pop(token, None)
    if finalizer is not None:
        finalizer.detach()
    if not finalizers:
        _finalizers.pop(owner, None)


def _forget_orphans(model: nn.Module) -> None:
    """Frees what handles that are gone keep for the model's modules, which nobody can undo: prepack after prepack, they
    would be looked at in every call, and hold parameters that have been replaced."""
    for module in model.modules():
        for token in list(_finalizers.get(id(module), {})):
            if token not in _kept:
                _forget(id(module), token)


def _forget_moved() -> None:
    for reference in _kept.valuerefs():  # a list; its values would be looked for while other threads add theirs
        weight = reference()
        if weight is not None:
            weight.row()


@functools.cache
def _watch_optimizers() -> None:
    """Those with fused=True change parameters without torch's counting it."""
    register_optimizer_step_post_hook(_note_step)


def _note_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
    # Addresses are no part of a graph; what such a step changes is seen in the memory.
    if torch.compiler.is_compiling():
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            is_plain = type(parameter) is nn.Parameter or type(parameter) is Tensor
            if is_plain and parameter.is_cpu and parameter.layout is torch.strided and parameter.numel():
                native().packed_changed(*_extent(parameter))


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The address of a tensor that has elements, and how many bytes they span."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), reach * tensor.element_size()


def _why_not(parameter: Tensor) -> str | None:
    """Why a weight cannot be kept; None where it can."""
    if type(parameter) is not nn.Parameter:
        return f"it is a {type(parameter).__name__}, not a plain parameter"
    if parameter.layout is not torch.strided:
        return f"it is {str(parameter.layout).removeprefix('torch.')}"
    if not parameter.is_cpu:
        return f"it lies on {parameter.device.type}"
    if parameter.dtype not in DTYPES:
        return f"it is {str(parameter.dtype).removeprefix('torch.')}"
    if parameter.is_inference():
        return "it was made in inference mode, where torch does not count its changes"
    if not parameter.numel() or not parameter.untyped_storage().nbytes():
        return "it has no memory"
    if not native().packs(DTYPES[parameter.dtype]):
        return f"{cpu.isa()} keeps no {str(parameter.dtype).removeprefix('torch.')}: it would take twice its memory"
    return None


def _table(rows: list[PackedRow]) -> list[tuple[str, ...]]:
    """One line per group of rows that differ only in the numbers of their path."""
    groups: dict[tuple[object, ...], list[PackedRow]] = {}
    for row in rows:
        groups.setdefault((without_numbers(row.path), row.shape, row.dtype, row.action, row.reason), []).append(row)
    return [
        (
            merged([row.path for row in group]),
            " x ".join(map(str, group[0].shape)),
            str(group[0].dtype).removeprefix("torch."),
            group[0].action,
            f"{sum(row.bytes for row in group) / _MIB:.1f}" if group[0].bytes else "",
            group[0].reason,
        )
        for group in groups.values()
    ]
