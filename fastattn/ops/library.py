"""The operator library "fastattn": registration, vmap rules and the checks that every operator shares.

Operators are plain `Library.define` + `impl` + fake: cheaper per call than custom_op, and autograd lies outside them,
in an autograd.Function, so a call without gradients pays nothing for it. An eager call that nothing would see pass the
dispatcher (`invoke`) goes straight to `impl`: forty arguments take it 22 us there and back. Tensors reach the data
pointer only inside `impl`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from fastattn.graphs import is_exporting
from fastattn.modes import has_function_mode

LIBRARY = torch.library.Library("fastattn", "DEF")

# Looked up once: every eager call asks them all.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_has_transforms = torch._C._are_functorch_transforms_active
_has_function_mode = torch._C._is_torch_function_mode_enabled
_tracing_state = torch._C._get_tracing_state
_has_profiler = torch._C._autograd._profiler_enabled

_IMPLEMENTATIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_VALUES = frozenset({type(None), bool, int, float, str, torch.dtype})

InDims = tuple[int | None, ...]
VmapResult = tuple[tuple[Tensor, ...], tuple[int | None, ...]] | tuple[Tensor, int | None]
Fold = Callable[[int, InDims, tuple[Any, ...]], "VmapResult | None"]


def register(
    name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], fold: Fold
) -> Callable[..., Any]:
    """Defines fastattn::name and returns its overload.

    fold(size, in_dims, args) runs a vmapped call as one call with a larger batch, or returns None where that would not
    be exact; the call then runs once per entry.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _dispatched(name, implementation), "CompositeExplicitAutograd")
    LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")  # not differentiable by itself, at no cost
    qualified = f"fastattn::{name}"
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.fastattn, name).default

    def vmap_rule(info: Any, in_dims: InDims, *args: Any) -> VmapResult:
        folded = fold(info.batch_size, in_dims, args) if info.batch_size else None
        return _each(operator, info.batch_size, in_dims, args) if folded is None else folded

    torch.library.register_vmap(qualified, vmap_rule, lib=LIBRARY)
    _IMPLEMENTATIONS[operator] = implementation
    return operator


def register_exported(function: type[torch.autograd.Function], operator: Callable[..., Any], visible: int) -> None:
    """Defines the operator that a graph of torch.export holds in the place of `function.apply(...)`.

    Export keeps operators and drops autograd.Functions with their gradients, so this one takes gradients by itself.
    Its arguments and results are those of `operator`, but that all after the first `visible` results, which serve a
    backward alone, are empty. What requires a gradient it looks up itself, whatever it was recorded with.
    """
    schema = operator._schema  # type: ignore[attr-defined]
    name = schema.name.removeprefix("fastattn::").removesuffix("_forward")
    names = [argument.name for argument in schema.arguments]
    flags = [i for i, each in enumerate(names) if each.endswith("requires_grad")]
    tracked, *others = flags  # "requires_grad"; the others belong to single tensors: "bias_requires_grad"
    tensors = {i: names.index(names[i].removesuffix("_requires_grad")) for i in others}

    def shown(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*results[:visible], *(result.new_empty(0) for result in results[visible:]))

    def without_gradients(*args: Any) -> tuple[Tensor, ...]:
        return shown(operator(*(False if i in flags else value for i, value in enumerate(args))))

    def with_gradients(*args: Any) -> tuple[Tensor, ...]:
        if forward_ad._current_level >= 0:
            return shown(function.formula(*args))  # type: ignore[attr-defined]
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in args):
            given = list(args)
            given[tracked] = True
            for flag, tensor in tensors.items():
                given[flag] = args[tensor] is not None and args[tensor].requires_grad
            return shown(apply_function(function, *given))
        with torch._C._AutoDispatchBelowAutograd():
            return exported(*args)

    LIBRARY.define(str(schema).replace(f"fastattn::{name}_forward", name), tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, without_gradients, "CompositeExplicitAutograd")
    LIBRARY.impl(name, with_gradients, "Autograd")
    torch.library.register_fake(f"fastattn::{name}", without_gradients, lib=LIBRARY)
    exported: Callable[..., Any] = getattr(torch.ops.fastattn, name).default
    function.exported = staticmethod(lambda *args: exported(*args))  # type: ignore[attr-defined]


def _dispatched(name: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation as the dispatcher gets it: an operator must not return the same tensor twice, and backends may
    share those that stand for results nobody asked for. What has no memory comes here, too (_are_plain)."""

    def run(*args: Any) -> Any:
        for value in args:
            if type(value) in _TENSORS and not value.is_meta and _has_no_memory(value):
                raise RuntimeError(
                    f"a tensor {tuple(value.shape)} given to {name} has no memory: its "
                    "storage was freed (FSDP frees parameters between their uses); call the module that owns it"
                )
        results = implementation(*args)
        if isinstance(results, Tensor):
            return results
        return tuple([t.new_empty(0) if t.shape == (0,) else t for t in results])

    return run


def invoke(operator: Callable[..., Any], *args: Any) -> Any:
    """`operator(*args)`, without the dispatcher where nothing watches it."""
    return operator(*args) if is_watched(args) else _IMPLEMENTATIONS[operator](*args)


def is_watched(args: tuple[Any, ...]) -> bool:
    """Whether anyone could tell a call of an operator from one of its implementation: a compiler, a transform, a mode,
    a tracer, a profiler, or a tensor of another class among the arguments."""
    return (
        torch.compiler.is_compiling()
        or _sees_operators()
        or _has_transforms()
        or _has_profiler()
        or not _are_plain(args)
    )


def is_recorded() -> bool:
    """Whether a tracer or a mode of eager torch, not one of our own, sees each operator: what it makes of them may want
    torch's own."""
    return not torch.compiler.is_compiling() and (_are_dispatched() or has_function_mode())


def _sees_operators() -> bool:
    # The dispatcher takes every function mode off: an implementation makes tensors, which a default device would put
    # elsewhere.
    return _are_dispatched() or _has_function_mode()


def _are_dispatched() -> bool:
    return _dispatch_modes() > 0 or _tracing_state() is not None


def _are_plain(args: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would hand these values to the implementation as they are: not what it has to fill or to
    unwrap, zeros without memory and the batches of autograd's own vmap, say."""
    try:
        for value in args:
            kind = type(value)
            if kind in _VALUES:
                continue
            if kind not in _TENSORS or value.is_neg() or value.is_meta or _has_no_memory(value):
                return False
    except RuntimeError:  # a batch has no data pointer to ask for
        return False
    return True


def _has_no_memory(tensor: Tensor) -> bool:
    return tensor.data_ptr() == 0 and tensor.numel() > 0


def tracks_gradients(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors has to go through autograd, or through a transform of torch.func.

    What torch.jit.trace records always does: a trace is run with gradients or without them, however it was recorded,
    and torch records it once more without them to compare. So does what torch.export records, but under no_grad.
    """
    if torch.compiler.is_compiling():
        return is_differentiated(*tensors) or (is_exporting() and torch.is_grad_enabled())
    return _tracing_state() is not None or is_differentiated(*tensors)


def is_differentiated(*tensors: Tensor | None) -> bool:
    """As `tracks_gradients`, of this call alone, whether it is recorded or not."""
    if torch.compiler.is_compiling():
        _refuse_derivatives_within_a_graph()
    elif _transformed():
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def would_be_differentiated(*tensors: Tensor | None) -> bool:
    """As `is_differentiated`, for a call that has no gradient: under vmap alone such a call is one like any other, and
    what counts are the tensors inside of the batches."""
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return False
    if torch.compiler.is_compiling() or not _is_only_mapped():
        return is_differentiated(*tensors)
    return torch.is_grad_enabled() and any(t is not None and _within_batches(t).requires_grad for t in tensors)


def _is_only_mapped() -> bool:
    """Under torch.func, whose transforms are all vmap."""
    if not torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return all(transform.key() == TransformType.Vmap for transform in torch._C._functorch.get_interpreter_stack() or ())


def _within_batches(tensor: Tensor) -> Tensor:
    while torch._C._functorch.is_batchedtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _refuse_derivatives_within_a_graph() -> None:
    """Dynamo traces an operator under torch.func without its derivative, which then is 0 in silence.

    Any transform but one vmap alone may take derivatives.
    """
    if not torch._C._are_functorch_transforms_active():
        return
    transform = retrieve_current_functorch_interpreter()
    if transform.key() != TransformType.Vmap or transform.level() > 1:
        raise NotImplementedError("derivatives of torch.func inside of torch.compile: take them outside of it")


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, in eager mode without the signature inspection that doubles its cost."""
    if torch.compiler.is_compiling():
        _refuse_derivatives_within_a_graph()
        if torch.compiler.is_exporting():
            return function.exported(*args)  # type: ignore[attr-defined]
        return function.apply(*_distinct(args))
    if forward_ad._current_level >= 0:
        return function.formula(*args)  # type: ignore[attr-defined]
    if _tracing_state() is not None:  # torch.jit.trace records operators, and cannot save a Function
        return function.exported(*args)  # type: ignore[attr-defined]
    return apply_function(function, *args)


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)` in eager mode."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def _distinct(args: tuple[Any, ...]) -> list[Any]:
    """The arguments with a view for a tensor that came before: Dynamo refuses to trace a Function that gets one
    twice."""
    seen: list[Tensor] = []
    result = []
    for value in args:
        if isinstance(value, Tensor):
            for before in seen:
                if value is before:
                    value = value.view_as(value)
                    break
            seen.append(value)
        result.append(value)
    return result


def needs_gradient(tensor: Tensor) -> bool:
    """Whether one tensor of a tracked call may need a gradient; never too few under a transform of torch.func, or where
    torch.jit.trace records (`register_exported`)."""
    if tensor.requires_grad:
        return True
    return not torch.compiler.is_compiling() and (_transformed() or _tracing_state() is not None)


def _transformed() -> bool:
    """Under torch.func, where a batched tensor may hide one that a grad transform tracks, or under forward-mode
    autograd, whose tangents kernels would drop (`apply`)."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def saved_input(x: Tensor, is_read: bool) -> Tensor:
    """What to save of an input for a backward: where that does not read its values, a stand-in of its shape and dtype
    over a single element. The input is then free to go, or to be changed in place, as torch's own linears allow it.

    Where more than plain eager autograd is at work, always the input itself.
    """
    return x if is_read or _wants_all() else x.new_empty(()).expand(x.shape)


def saved_weight(weight: Tensor, is_read: bool) -> Tensor:
    """What to save of a weight: where its values are not read, a view that may be changed in place. It keeps the
    memory, which is the module's anyway, and the strides, in which the gradient is to lie."""
    return weight if is_read or _wants_all() else weight.data


def _wants_all() -> bool:
    return torch.compiler.is_compiling() or _transformed()


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied where its last dimension is not contiguous."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        return tensor.detach().contiguous()
    return tensor


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor, copied where it is not contiguous."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.detach().contiguous()


def matrix(weight: Tensor) -> Tensor:
    """A weight (N, K), copied unless its rows or its columns are contiguous and do not overlap."""
    (rows, columns), (down, across) = weight.shape, weight.stride()
    if (across == 1 and down >= columns) or (down == 1 and across >= rows):
        return weight
    return weight.detach().contiguous()


def in_layout_of(value: Tensor, tensor: Tensor) -> Tensor:
    """`value`, copied where its strides are not those `torch.empty_like(tensor)` would have."""
    if value.numel() == 0 and value.shape != tensor.shape:
        return value  # a gradient that is not asked for
    if tensor.is_contiguous() and value.is_contiguous():
        return value
    expected = torch.empty_like(tensor, dtype=value.dtype)
    return value if value.stride() == expected.stride() else expected.copy_(value)


def is_mapped(in_dims: InDims, *positions: int) -> bool:
    """Whether any of these arguments is batched."""
    return any(in_dims[i] is not None for i in positions)


def fold_dim(tensor: Tensor, dim: int | None, size: int, at: int = 0) -> Tensor:
    """The mapped dimension merged into dimension `at`, in front of what is there; expanded where it is not mapped."""
    return lift(tensor, dim, size).movedim(0, at).flatten(at, at + 1)


def fold_broadcast(tensor: Tensor, dim: int | None, size: int, batch: int, at: int = 0) -> Tensor:
    """As fold_dim, for a tensor whose batch dimension `at` may be 1: that stays 1 where no entry differs."""
    if dim is None:
        return tensor if tensor.shape[at] == 1 else fold_dim(tensor, None, size, at)
    lifted = tensor.movedim(dim, at)
    full = [*lifted.shape[: at + 1], batch, *lifted.shape[at + 2 :]]
    return lifted.expand(full).flatten(at, at + 1)


def lift(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension in front, as one more dimension of rows; expanded where it is not mapped."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _each(operator: Callable[..., Any], size: int, in_dims: InDims, args: tuple[Any, ...]) -> VmapResult:
    """One call per mapped entry, results stacked. Of no entries one of zeros tells the shapes."""

    def entry(tensor: Tensor, dim: int, i: int) -> Tensor:
        return tensor.select(dim, i) if size else tensor.new_zeros((*tensor.shape[:dim], *tensor.shape[dim + 1 :]))

    calls = []
    for i in range(max(size, 1)):
        picked = (a if d is None else entry(a, d, i) for a, d in zip(args, in_dims, strict=True))
        calls.append(operator(*picked))
    if isinstance(calls[0], Tensor):
        return torch.stack(calls)[:size], 0
    results = tuple(torch.stack(column)[:size] for column in zip(*calls, strict=True))
    return results, (0,) * len(results)
