"""Derivatives that the kernels do not have: second and higher ones, and forward-mode ones.

An operator's formula computes what it does in plain torch operations, those of the reference backend, and torch takes
derivatives of any order and kind through them. Forward-mode calls run on the formula, and so does a backward that is to
be differentiated (create_graph=True). It is as slow as eager torch and keeps Sq x Skv matrices: a fallback like any
other, counted, and refused where a backend is forced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastattn import dispatch
from fastattn.backends.plain import without_autocast
from fastattn.errors import NotSupported
from fastattn.ops.library import apply_function, invoke

Results = tuple[Tensor, ...]


class _Formula(NamedTuple):
    """run takes the operator's arguments and gives its results. Those at `recomputed` it computes anew from the others,
    so that its derivatives by the others are the whole ones."""

    run: Callable[..., Results]
    recomputed: frozenset[int]


_SECOND, _FORWARD_MODE = "second derivatives", "forward-mode derivatives"
_FORMULAS: dict[Callable[..., Any], _Formula] = {}


def register_formulas(
    function: type[torch.autograd.Function],
    forward: tuple[Callable[..., Any], Callable[..., Results]],
    backward: tuple[Callable[..., Any], Callable[..., Results]],
    recomputed: Sequence[int] = (),
) -> None:
    """The formulas of a Function's two operators, each beside its operator. recomputed: positions of the backward's
    arguments that are results of the forward and that its formula does not read."""
    function.formula = staticmethod(lambda *args: _run(forward[0], args, _FORWARD_MODE))  # type: ignore[attr-defined]
    _FORMULAS[forward[0]] = _Formula(forward[1], frozenset())
    _FORMULAS[backward[0]] = _Formula(backward[1], frozenset(recomputed))


def of_reference(function: Callable[..., Results]) -> Callable[..., Results]:
    """A function of the reference backend as autograd sees it: what an operator of the same arguments and the backend's
    name computes."""
    differentiable: Callable[..., Results] = function.__wrapped__  # type: ignore[attr-defined]
    return lambda *args: differentiable(*args[:-1])


def differentiable(operator: Callable[..., Any], *args: Any) -> Results:
    """A backward operator's results, with derivatives where a gradient of gradients may be asked for."""
    results: Results
    if not torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            return _run(operator, args, _FORWARD_MODE)
        if torch.is_grad_enabled():  # create_graph=True
            if not torch._C._are_functorch_transforms_active() and args[-1] in ("", "reference"):
                return _run(operator, args, _SECOND)
            results = apply_function(_Backward, operator, *args)
            return results
    results = invoke(operator, *args)
    return results


class _Backward(torch.autograd.Function):
    """A backward operator, differentiated through its formula if ever: torch.func takes every gradient so that it could
    be differentiated, and a backend that was asked for runs what it has."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Callable[..., Any], *args: Any) -> Results:
        return tuple(operator(*args))  # by the dispatcher: no tensor that calls share may get a place in a graph

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        ctx.set_materialize_grads(False)
        ctx.operator, *args = inputs
        ctx.tensors = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
        ctx.values = [None if isinstance(value, Tensor) else value for value in args]
        ctx.save_for_backward(*(args[i] for i in ctx.tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        args = list(ctx.values)
        for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            args[i] = tensor
        formula = _FORMULAS[ctx.operator]
        wanted = [i for i in ctx.tensors if ctx.needs_input_grad[1 + i] and i not in formula.recomputed]
        gradients: list[Tensor | None] = [None] * len(args)
        if not wanted or all(grad is None for grad in grads):
            return None, *gradients
        _note(ctx.operator, args, _SECOND)

        def product(tensors: tuple[Tensor, ...]) -> Tensor | int:
            values = list(args)
            for i, tensor in zip(wanted, tensors, strict=True):
                values[i] = tensor
            results = zip(formula.run(*values), grads, strict=True)
            return sum((result * grad).sum() for result, grad in results if grad is not None)

        with without_autocast(_device(args)):
            # not vjp, which goes back after it has left its level: within a backward within another, torch fails there
            found = torch.func.grad(product)(tuple(args[i] for i in wanted))
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
        return None, *gradients


def _run(operator: Callable[..., Any], args: Sequence[Any], what: str) -> Results:
    """The formula's results, for the sake of `what`."""
    _note(operator, args, what)
    with without_autocast(_device(args)):
        return _FORMULAS[operator].run(*args)


def _note(operator: Callable[..., Any], args: Sequence[Any], what: str) -> None:
    """Counts the fallback from the device's own backend, or refuses it to a forced one. The backend's name is an
    operator's last argument."""
    name = operator._schema.name.removeprefix("fastattn::").rpartition("_")[0]  # type: ignore[attr-defined]
    passed = args[-1] or dispatch.ORDER.get(_device(args), ("reference",))[0]
    if passed == "reference":
        return
    reason = f"the kernels have no {what}"
    if args[-1]:
        raise NotSupported(name, f"{what} of tensors on {_device(args)}", {passed: [reason]})
    dispatch.note_fallback(name, passed, "reference", reason)


def _device(args: Sequence[Any]) -> str:
    return next(value.device.type for value in args if isinstance(value, Tensor))
