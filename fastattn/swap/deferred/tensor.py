"""The tensor that stands for scores nobody has computed, and the function mode that makes it.

An operation that steps.py knows leaves it deferred. Any other first makes the tensor that the original would have had,
by the original's own operations in their order, and goes on with that.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fastattn.modes import Transparent
from fastattn.swap.deferred.scores import Scores, drawn_weights

Function = Callable[..., Any]
PLAIN = (Tensor, nn.Parameter)


class Node:
    """Deferred scores: what they are, and the step that makes them, in whose arguments nodes stand for tensors."""

    __slots__ = (
        "__weakref__",
        "_args",
        "_function",
        "_kwargs",
        "_made",
        "_saving",
        "_values",
        "_versions",
        "dtype",
        "is_made",
        "is_used",
        "is_view",
        "requires_grad",
        "scores",
        "tracks",
    )

    def __init__(
        self, scores: Scores, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
    ) -> None:
        self.scores, self.dtype = scores, dtype
        self.is_view = self.is_used = self.is_made = False
        self.tracks = torch.is_grad_enabled()
        self.requires_grad = False
        self._function, self._kwargs = function, kwargs
        self._made: Tensor | None = None
        self._values: Tensor | None = None
        self._saving = saving_hooks()
        self._versions: list[tuple[Tensor, int]] = []
        stored: list[Any] = []
        for value in args:
            kind = type(value)
            if kind is Deferred:
                value.node.is_used = True
                self.requires_grad = self.requires_grad or (self.tracks and value.node.requires_grad)
                value = value.node
            elif kind is Tensor or kind is nn.Parameter:
                self.requires_grad = self.requires_grad or (self.tracks and value.requires_grad)
                if not value.is_inference():
                    self._versions.append((value, value._version))
            stored.append(value)
        self._args: tuple[Any, ...] = tuple(stored)

    def drops(self) -> bool:
        """Whether its step is the dropout, and not one that follows it."""
        before = [value.scores for value in self._args if isinstance(value, Node) and not value.is_made]
        return bool(self.scores.seeds) and not any(scores.seeds for scores in before)

    def sources(self) -> list[Tensor]:
        """The tensors that it is made of, beside other nodes."""
        return [value for value in self._args if isinstance(value, Tensor)]

    def check(self) -> None:
        """Raises where a tensor that it is made of has been written to, by something that no mode sees."""
        check_versions(self._versions)
        for value in self._args:
            if isinstance(value, Node) and not value.is_made:
                value.check()

    def make(self) -> Tensor:
        """The tensor."""
        if self._made is None:
            self.check()
            with torch._C.DisableTorchFunction(), torch.set_grad_enabled(self.tracks), _as_at_first(self._saving):
                if self.scores.seeds and self.scores.seeds[0]:
                    self._made = drawn_weights(self.scores, _backend())
                else:
                    args = [value.make() if isinstance(value, Node) else value for value in self._args]
                    self._made = self._function(*args, **self._kwargs)
            self.is_made = True
            self._args, self._kwargs, self._versions = (), {}, []
            self.scores = None  # type: ignore[assignment]
        return self._made

    def values(self) -> Tensor:
        """The numbers alone, for who asks below autograd, where the tensor would be made without its graph."""
        if self._made is not None:
            return self._made
        if self._values is None:
            self.check()
            with torch._C.DisableTorchFunction(), torch.no_grad():
                if self.scores.seeds:
                    self._values = drawn_weights(self.scores, _backend())  # which attention will drop alike
                else:
                    args = [value.values() if isinstance(value, Node) else value for value in self._args]
                    self._values = self._function(*args, **self._kwargs)
        return self._values

    def become(self, tensor: Tensor) -> None:
        """Stands for a tensor from now on."""
        self._made, self.is_made = tensor, True


def check_versions(versions: list[tuple[Tensor, int]]) -> None:
    """Raises where one of the tensors has been written to."""
    if any(tensor._version != version for tensor, version in versions):
        raise RuntimeError(
            "fastattn: queries, keys or a mask were written to in place, by code that torch functions do not show, "
            "before attention was computed: leave this module out of the swap"
        )


def _backend() -> str | None:
    return running.deferral.backend if running.deferral else None


@contextmanager
def _as_at_first(saving: object) -> Iterator[None]:
    """Under what a node was deferred under: no autocast, and the hooks of saved tensors that there were then. Those of
    checkpointing, met since, would find other tensors where the same is run again on what is made."""
    hooks: list[Any] = []
    while TELLS_SAVING_HOOKS and (top := saving_hooks()) is not None and top != saving:
        hooks.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        if torch._C._is_any_autocast_enabled():
            with torch.autocast("cpu", enabled=False):
                yield
        else:
            yield
    finally:
        for pack, unpack in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


class Deferred(Tensor):
    """Scores, or weights, that have a shape and no data."""

    node: Node

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Reached from C++ alone, as by TorchScript, below autograd: gradients are those of _Link."""
        if func._schema.is_mutable:
            raise RuntimeError(f"fastattn: {func} writes to attention scores: leave this module out of the swap")
        if running.deferral is not None:
            running.deferral.note_made(func, args)
        return func(*tree_map(_values, args), **tree_map(_values, kwargs or {}))


def made(value: Any) -> Any:
    """The tensor that a deferred one stands for; anything else as it is."""
    return value.node.make() if isinstance(value, Deferred) else value


def _values(value: Any) -> Any:
    return value.node.values() if isinstance(value, Deferred) else value


def deferred(
    scores: Scores, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> Deferred:
    """A tensor that stands for function(*args, **kwargs)."""
    node = Node(scores, function, args, kwargs, dtype)
    if node.requires_grad:
        tensors = [value for value in args if isinstance(value, Tensor)]
        with torch._C.DisableTorchFunctionSubclass():
            tensor: Deferred = _Link.apply(node, scores.shape, dtype, *tensors)
    else:
        tensor = _empty(scores.shape, dtype)
    tensor.node = node
    deferral = running.deferral
    if deferral is not None:
        deferral.live.append(weakref.ref(node))
    return tensor


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Deferred:
    return Tensor._make_wrapper_subclass(Deferred, shape, dtype=dtype)


class _Link(torch.autograd.Function):
    """Joins a deferred tensor to the graph of autograd, for what takes it without asking for its values: a
    torch.autograd.Function of the model's, which is then handed them. Nothing else comes here: operations on a made
    tensor have graphs of their own.
    """

    @staticmethod
    def forward(ctx: Any, node: Node, shape: tuple[int, ...], dtype: torch.dtype, *tensors: Tensor) -> Deferred:
        ctx.function, ctx.args, ctx.kwargs, ctx.versions = node._function, node._args, node._kwargs, node._versions
        ctx.tensors = [t.node if isinstance(t, Deferred) else t for t in tensors]
        ctx.node = node if node.drops() else None
        return _empty(shape, dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        check_versions(ctx.versions)
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Of each its own: one may be made of another, as keys of queries, and gradients end at what they stand for.
            own = {id(value): _alias(value) for value in ctx.tensors}
            args = [own.get(id(value), value) for value in ctx.args]
            out = _dropped(args[0], ctx.node) if ctx.node is not None else ctx.function(*args, **ctx.kwargs)
        tensors = [own[id(value)] for value in ctx.tensors]
        first = {id(tensor): i for i, tensor in reversed(list(enumerate(tensors)))}
        indices = [i for i, tensor in enumerate(tensors) if tensor.requires_grad and first[id(tensor)] == i]
        wanted = [tensors[i] for i in indices]
        found = torch.autograd.grad(out, wanted, gradient, allow_unused=True, create_graph=again)
        gradients: list[Tensor | None] = [None] * len(tensors)
        for i, each in zip(indices, found, strict=True):
            gradients[i] = each
        return (None, None, None, *gradients)


def _alias(value: Tensor | Node) -> Tensor:
    tensor = value.make() if isinstance(value, Node) else value
    return tensor.view_as(tensor)


def _dropped(weights: Tensor, node: Node) -> Tensor:
    """The weights after the dropout that was drawn. Of a weight of 0, which has no gradient to pass on, nothing is
    known."""
    drawn = node.values().detach()
    return weights * torch.where(weights == 0, 0.0, drawn / weights).detach()


class _Relink(torch.autograd.Function):
    """Gives a deferred tensor that was written to the place in the graph of what it now stands for."""

    @staticmethod
    def forward(ctx: Any, written: Deferred, new: Tensor) -> Deferred:
        ctx.mark_dirty(written)
        return written

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return None, gradient


def write(target: Deferred, new: Tensor) -> None:
    """The target, written to in place, stands for `new` from now on, deferred or not."""
    if isinstance(new, Deferred):
        target.node = new.node
    else:
        target.node.become(new)
    if torch.is_grad_enabled() and (target.node.requires_grad if isinstance(new, Deferred) else new.requires_grad):
        with torch._C.DisableTorchFunctionSubclass():
            _Relink.apply(target, new)


# ---- what is done to them --------------------------------------------------------------------------------------------


Step = Callable[[Function, tuple[Any, ...], dict[str, Any]], Any]
STEPS: dict[Any, Step] = {}
"""Operations that need no values; filled by steps.py. Each gives NotImplemented for a call that does."""


def run(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """function(*args, **kwargs), where an argument is deferred."""
    step = STEPS.get(function)
    if step is not None:
        result = step(function, args, kwargs)
        if result is not NotImplemented:
            return result
    deferral = running.deferral
    if deferral is not None:
        deferral.note_made(function, args)
    if may_write(function, args, kwargs):
        return _run_in_place(function, args, kwargs)
    return function(*_tensors(args), **_tensors(kwargs))


def _tensors(values: Any) -> Any:
    return tree_map(made, values)


def _run_in_place(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Everything that could see the write is made before."""
    deferral = running.deferral
    while deferral is not None:
        deferral.make_all()
        deferral = deferral._outer
    written = [value for value in (*args, *kwargs.values()) if isinstance(value, Deferred)]
    before = [(target, target.node.make()) for target in written]
    versions = [None if tensor.is_inference() else tensor._version for _, tensor in before]
    result = function(*_tensors(args), **_tensors(kwargs))
    for (target, tensor), version in zip(before, versions, strict=True):
        if version is not None and tensor._version != version:
            write(target, tensor)
    return result


_writes: dict[Any, bool] = {}


def may_write(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a torch function may write to one of its arguments, by its name or its arguments."""
    known = _writes.get(function)
    if known is None:
        name = getattr(function, "__name__", "_")
        plain = name.removeprefix("__").removesuffix("__")
        known = (name.endswith("_") and not name.endswith("__")) or (
            name != plain and (plain in ("setitem", "set", "setstate", "delete") or plain in _AUGMENTED)
        )
        schema = getattr(function, "_schema", None)
        known = known or (schema is not None and schema.is_mutable) or hasattr(function, "overloads")
        if not name.startswith("__get"):  # bound to what they get: new objects every time
            _writes[function] = known
    return known or "out" in kwargs or bool(kwargs.get("inplace")) or any(value is True for value in args)


_AUGMENTED = frozenset(
    f"i{name}"
    for name in (
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
)


# ---- the mode --------------------------------------------------------------------------------------------------------


class _Running(threading.local):
    """The deferral at work in this thread."""

    def __init__(self) -> None:
        self.deferral: Deferral | None = None


running = _Running()


class Deferral(Transparent):
    """While it is on, products of queries and keys give deferred tensors.

    backend: that of attention.
    attended: how many products of weights and values ran on attention.
    reason: why the first scores were computed that were. They may have been a bias: of positions, say.
    lost: why weights were computed.
    """

    def __init__(self, products: dict[Any, Step], backend: str | None, smallest: int) -> None:
        super().__init__()
        self.backend = backend
        self.smallest = smallest
        self.attended = 0
        self.reason: str | None = None
        self.lost: str | None = None
        self.is_small = False
        self.live: list[weakref.ref[Node]] = []
        self.outputs: dict[int, torch.UntypedStorage] = {}
        self.turned: list[weakref.ref[Tensor]] = []
        """Copies of tensors whose last two dimensions had changed places."""
        self.left_first: set[tuple[int, ...]] = set()
        """Shapes of scores that were too few where channels come first: values times such weights look like queries
        times keys."""
        self._apart: list[tuple[int, int]] = []
        """Storages of outputs, and of their copies in another shape, that a product and its view would share."""
        self._products = products
        self._outer: Deferral | None = None
        self.tracks = torch.is_grad_enabled()
        self._saving = saving_hooks()

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if types and Deferred in types:
            return run(func, args, kwargs)
        product = self._products.get(func)
        if product is not None:
            result = product(func, args, kwargs)
            if result is not NotImplemented:
                return result
        elif self.outputs and func in _STRIDES:
            return self._of_strides(func, args, kwargs)
        elif (self.live or self._apart or self._outer is not None) and may_write(func, args, kwargs):
            self._before_write(args, kwargs)
        return func(*args, **kwargs)

    def keep(self, output: Tensor) -> Tensor:
        """An output of attention, which lies in memory as no product does: (B, Sq, H, Dv) for (B, H, Sq, Dv)."""
        if not output.is_contiguous():
            self.outputs[storage_of(output)] = output.untyped_storage()  # held: numbers are used again
        return output

    def __enter__(self) -> Deferral:
        outer = running.deferral
        self._outer = outer
        if outer is not None:  # which would be asked, too
            torch._C._pop_torch_function_stack()
        running.deferral = self
        torch._C._push_on_torch_function_stack(self)
        return self

    def __exit__(self, *error: object) -> None:
        torch._C._pop_torch_function_stack()
        running.deferral = self._outer
        if self._outer is not None:
            torch._C._push_on_torch_function_stack(self._outer)

    def defers_here(self) -> bool:
        """Not where forward has turned gradients off, or watches what they keep: activation checkpointing, which runs
        the same operations again outside of this mode; nor under autocast or torch.func."""
        return (
            torch.is_grad_enabled() == self.tracks
            and saving_hooks() == self._saving
            and not torch._C._is_any_autocast_enabled()
            and not torch._C._are_functorch_transforms_active()
        )

    def note_made(self, function: Function, args: tuple[Any, ...]) -> None:
        """A reason for a module's fallback."""
        nodes = [value.node for value in args if isinstance(value, Deferred) and not value.node.is_made]
        name = getattr(function, "__name__", "a function")
        if self.lost is None and any(node.scores.is_softmaxed for node in nodes):
            self.lost = f"its attention weights are used by {name}"
        if self.reason is None:
            self.reason = f"its attention scores are used by {name}"

    def make_all(self) -> None:
        """Makes what is deferred still."""
        for node in self.deferred_still():
            node.make()

    def deferred_still(self) -> list[Node]:
        """What this mode has deferred, and is not made."""
        return [node for node in self.held() if not node.is_made]

    def held(self) -> list[Node]:
        """Those of its nodes that somebody holds."""
        return [node for reference in self.live if (node := reference()) is not None]

    def _before_write(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Makes all that is deferred before one of the tensors that it is made of is written to."""
        written = {storage_of(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        if any(
            (one in written and self._is_held(other)) or (other in written and self._is_held(one))
            for one, other in self._apart
        ):
            raise RuntimeError(
                "fastattn: an output of attention, or a view of it, is written to after it was viewed in another "
                "shape: leave this module out of the swap"
            )
        each: Deferral | None = self
        while each is not None:
            if any(storage_of(source) in written for node in each.deferred_still() for source in node.sources()):
                each.reason = each.reason or "queries, keys or masks are written to in place after their product"
                each.make_all()
            each = each._outer

    def _of_strides(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What depends on the strides of a tensor: those of an output of attention become a product's where need be.

        What is made of it then shares no memory with the output any more, and neither may be written to.
        """
        target: Any = args[0] if args else None
        if type(target) not in PLAIN or storage_of(target) not in self.outputs or target.is_contiguous():
            return function(*args, **kwargs)
        if function in (Tensor.view, Tensor.view_as):
            try:
                return function(*args, **kwargs)
            except RuntimeError:  # it may have been fine for a product
                pass
        copy = target.contiguous()
        result = function(copy, *args[1:], **kwargs)
        self.outputs[storage_of(copy)] = copy.untyped_storage()
        self._apart.append((storage_of(target), storage_of(copy)))
        return result

    def _is_held(self, storage: int) -> bool:
        """Whether a tensor still lies in an output's storage, which is held here once."""
        return torch._C._storage_Use_Count(self.outputs[storage]._cdata) > 1


def storage_of(tensor: Tensor) -> int:
    if type(tensor) not in PLAIN or tensor.layout is not torch.strided:
        return 0
    return 0 if torch._C._functorch.is_functorch_wrapped_tensor(tensor) else tensor.untyped_storage()._cdata


_STRIDES = frozenset({Tensor.view, Tensor.view_as, torch.as_strided, Tensor.as_strided})


TELLS_SAVING_HOOKS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
"""Whether torch tells what hooks its saved tensors have, those of checkpointing say. 2.7 does not."""


def saving_hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) if torch.is_grad_enabled() else None
