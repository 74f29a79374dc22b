"""The linear and feed-forward operators, their fake tensors and vmap rules, and the autograd.Functions over them.

linear_act, ffn and gated_ffn, forward and backward; shapes and results: `fastattn.backends.protocol`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn import dispatch
from fastattn.backends import reference
from fastattn.ops.formulas import differentiable, of_reference, register_formulas
from fastattn.ops.library import (
    InDims,
    VmapResult,
    dense,
    in_layout_of,
    invoke,
    is_mapped,
    lift,
    matrix,
    register,
    register_exported,
    saved_input,
    saved_weight,
)
from fastattn.problems import LinearProblem


def problem_fields(
    op: str, x: Tensor, hidden: Tensor | None, out: Tensor, activation: str, dropout_p: float, requires_grad: bool
) -> tuple[Any, ...]:
    """The fields of this call's LinearProblem, in order. hidden: the weight into the hidden features, out: the last
    one."""
    *lead, width = x.shape
    return (
        op,
        x.device.type,
        x.dtype,
        out.dtype,
        activation,
        math.prod(lead),
        width,
        0 if hidden is None else hidden.shape[0],
        out.shape[0],
        dropout_p != 0.0,
        requires_grad,
    )


def _linear_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, requires_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    fields = problem_fields("linear_act", x, None, weight, activation, 0.0, requires_grad)
    y, pre = dispatch.choose(LinearProblem, fields, backend).linear_act_forward(
        dense(x), matrix(weight), dense(bias), activation, requires_grad
    )
    return y, pre


def _linear_act_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: str,
    x_requires_grad: bool,
    weight_requires_grad: bool,
    bias_requires_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    fields = problem_fields("linear_act", x, None, weight, activation, 0.0, True)
    dx, dweight, dbias = dispatch.choose(LinearProblem, fields, backend).linear_act_backward(
        dense(grad_y),
        _read_input(x, weight_requires_grad),
        matrix(weight),
        dense(pre),
        activation,
        x_requires_grad,
        weight_requires_grad,
        bias_requires_grad,
    )
    return dx, in_layout_of(dweight, weight), dbias


def _ffn_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    dropout_seed: Tensor | None,
    activation: str,
    dropout_p: float,
    requires_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    fields = problem_fields("ffn", x, w1, w2, activation, dropout_p, requires_grad)
    y, pre = dispatch.choose(LinearProblem, fields, backend).ffn_forward(
        dense(x), matrix(w1), dense(b1), matrix(w2), dense(b2), dropout_seed, activation, dropout_p, requires_grad
    )
    return y, pre


def _ffn_backward(
    grad_y: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    pre: Tensor,
    dropout_seed: Tensor | None,
    activation: str,
    dropout_p: float,
    *flags_and_backend: Any,
) -> tuple[Tensor, ...]:
    *flags, backend = flags_and_backend
    x = _read_input(x, flags[1])
    fields = problem_fields("ffn", x, w1, w2, activation, dropout_p, True)
    dx, *others = dispatch.choose(LinearProblem, fields, backend).ffn_backward(
        dense(grad_y), x, matrix(w1), matrix(w2), dense(pre), dropout_seed, activation, dropout_p, *flags
    )
    return dx, *_in_layout_of_weights(others, (w1, w2))


def _gated_ffn_forward(
    x: Tensor,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    dropout_seed: Tensor | None,
    activation: str,
    dropout_p: float,
    requires_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    fields = problem_fields("gated_ffn", x, w_gate, w_down, activation, dropout_p, requires_grad)
    y, gate, up = dispatch.choose(LinearProblem, fields, backend).gated_ffn_forward(
        dense(x),
        matrix(w_gate),
        dense(b_gate),
        matrix(w_up),
        dense(b_up),
        matrix(w_down),
        dense(b_down),
        dropout_seed,
        activation,
        dropout_p,
        requires_grad,
    )
    return y, gate, up


def _gated_ffn_backward(
    grad_y: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    dropout_seed: Tensor | None,
    activation: str,
    dropout_p: float,
    *flags_and_backend: Any,
) -> tuple[Tensor, ...]:
    *flags, backend = flags_and_backend
    x = _read_input(x, flags[1] or flags[3])
    fields = problem_fields("gated_ffn", x, w_gate, w_down, activation, dropout_p, True)
    weights = (w_gate, w_up, w_down)
    dx, *others = dispatch.choose(LinearProblem, fields, backend).gated_ffn_backward(
        dense(grad_y),
        x,
        *map(matrix, weights),
        dense(gate),
        dense(up),
        dropout_seed,
        activation,
        dropout_p,
        *flags,
    )
    return dx, *_in_layout_of_weights(others, weights)


def _read_input(x: Tensor, is_read: bool) -> Tensor:
    """x for the gradients of weights; where none is wanted it may be a stand-in (saved_input)."""
    return x.detach().contiguous() if is_read and not x.is_contiguous() else x


def _in_layout_of_weights(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of weights and biases in turn, those of weights as their weights lie in memory."""
    result: list[Tensor] = []
    for weight, dweight, dbias in zip(weights, gradients[::2], gradients[1::2], strict=True):
        result += (in_layout_of(dweight, weight), dbias)
    return tuple(result)


def _wide(x: Tensor, weight: Tensor, wanted: bool = True) -> Tensor:
    """A fake result of x W^T, or an empty one."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]) if wanted else (0,))


def _gradients(x: Tensor, weights: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """Fake gradients where they are wanted: of x, and of each weight and its bias."""
    gradients = [x.new_empty(x.shape)]
    for weight in weights:
        gradients += (torch.empty_like(weight, dtype=x.dtype), x.new_empty(weight.shape[:1]))
    return tuple(t if asked else x.new_empty(0) for t, asked in zip(gradients, wanted, strict=True))


def _fake_linear_act_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, requires_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return _wide(x, weight), _wide(x, weight, requires_grad and activation != "none")


def _fake_linear_act_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, pre: Tensor, activation: str, dx: bool, dw: bool, db: bool, backend: str
) -> tuple[Tensor, ...]:
    return _gradients(x, (weight,), (dx, dw, db))


def _fake_ffn_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    dropout_seed: Tensor | None,
    activation: str,
    dropout_p: float,
    requires_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _wide(x, w2), _wide(x, w1, requires_grad)


def _fake_ffn_backward(grad_y: Tensor, x: Tensor, w1: Tensor, w2: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _gradients(x, (w1, w2), rest[4:9])


def _fake_gated_ffn_forward(
    x: Tensor, w_gate: Tensor, b_gate: Tensor | None, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    requires_grad = rest[4]
    return _wide(x, w_down), _wide(x, w_gate, requires_grad), _wide(x, w_up, requires_grad)


def _fake_gated_ffn_backward(
    grad_y: Tensor, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return _gradients(x, (w_gate, w_up, w_down), rest[5:12])


def _drops(args: tuple[Any, ...], activation: int) -> bool:
    """Whether the call drops hidden features, whose masks count rows; dropout_p, where there is one, follows the
    activation."""
    return isinstance(args[activation + 1], float) and args[activation + 1] != 0.0


def _fold_forward(operator: str, activation: int) -> Any:
    """The vmap rule of a forward: x's mapped dimension joins its rows, unless another tensor is mapped or hidden
    features are dropped. activation: its position among the arguments."""

    def fold(size: int, dims: InDims, args: tuple[Any, ...]) -> VmapResult | None:
        if is_mapped(dims, *range(1, activation)) or _drops(args, activation):
            return None
        results = getattr(torch.ops.fastattn, operator)(lift(args[0], dims[0], size), *args[1:])
        return results, tuple(None if t.shape == (0,) else 0 for t in results)

    return fold


def _fold_backward(operator: str, weights: int, saved: int, flags: int) -> Any:
    """The vmap rule of a backward (grad_y, x, weights, saved, ..., activation, ..., flags, backend).

    Rows fold, unless a weight or a seed is mapped, a weight needs a gradient of its own per entry, or hidden features
    are dropped. The first flag is x_requires_grad.
    """

    def fold(size: int, dims: InDims, args: tuple[Any, ...]) -> VmapResult | None:
        end_of_rows = 2 + weights + saved
        first_flag = len(args) - 1 - flags
        others = [*range(2, 2 + weights), *range(end_of_rows, first_flag)]
        if is_mapped(dims, *others) or any(args[first_flag + 1 : -1]) or _drops(args, first_flag - 2):
            return None
        folded = list(args)
        for i in (0, 1, *range(2 + weights, end_of_rows)):
            if args[i].shape != (0,):
                folded[i] = lift(args[i], dims[i], size)
        results = getattr(torch.ops.fastattn, operator)(*folded)
        return results, (0 if args[first_flag] else None, *(None,) * (len(results) - 1))

    return fold


linear_act_forward = register(
    "linear_act_forward",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, bool requires_grad, str backend) -> (Tensor, Tensor)",
    _linear_act_forward,
    _fake_linear_act_forward,
    _fold_forward("linear_act_forward", activation=3),
)
linear_act_backward = register(
    "linear_act_backward",
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor pre, str activation, bool x_requires_grad, "
    "bool weight_requires_grad, bool bias_requires_grad, str backend) -> (Tensor, Tensor, Tensor)",
    _linear_act_backward,
    _fake_linear_act_backward,
    _fold_backward("linear_act_backward", weights=1, saved=1, flags=3),
)
ffn_forward = register(
    "ffn_forward",
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? dropout_seed, str activation, float dropout_p, "
    "bool requires_grad, str backend) -> (Tensor, Tensor)",
    _ffn_forward,
    _fake_ffn_forward,
    _fold_forward("ffn_forward", activation=6),
)
ffn_backward = register(
    "ffn_backward",
    "(Tensor grad_y, Tensor x, Tensor w1, Tensor w2, Tensor pre, Tensor? dropout_seed, str activation, "
    "float dropout_p, bool x_requires_grad, bool w1_requires_grad, bool b1_requires_grad, bool w2_requires_grad, "
    "bool b2_requires_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _ffn_backward,
    _fake_ffn_backward,
    _fold_backward("ffn_backward", weights=2, saved=1, flags=5),
)
gated_ffn_forward = register(
    "gated_ffn_forward",
    "(Tensor x, Tensor w_gate, Tensor? b_gate, Tensor w_up, Tensor? b_up, Tensor w_down, Tensor? b_down, "
    "Tensor? dropout_seed, str activation, float dropout_p, bool requires_grad, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _gated_ffn_forward,
    _fake_gated_ffn_forward,
    _fold_forward("gated_ffn_forward", activation=8),
)
gated_ffn_backward = register(
    "gated_ffn_backward",
    "(Tensor grad_y, Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down, Tensor gate, Tensor up, "
    "Tensor? dropout_seed, str activation, float dropout_p, bool x_requires_grad, bool w_gate_requires_grad, "
    "bool b_gate_requires_grad, bool w_up_requires_grad, bool b_up_requires_grad, bool w_down_requires_grad, "
    "bool b_down_requires_grad, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _gated_ffn_backward,
    _fake_gated_ffn_backward,
    _fold_backward("gated_ffn_backward", weights=3, saved=2, flags=7),
)


def _hide(ctx: Any, *saved: Tensor) -> None:
    """Marks the results that serve the backward alone. In eager mode they keep their place in the graph: through them a
    second derivative reaches x and the first weights."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(t for t in saved if torch.compiler.is_compiling() or t.shape == (0,)))


def _wanted(gradients: Sequence[Tensor], flags: Sequence[bool]) -> list[Tensor | None]:
    return [g if wanted else None for g, wanted in zip(gradients, flags, strict=True)]


def _add_linear(
    ctx: Any, gradients: list[Tensor | None], places: Sequence[int], grad: Tensor | None, x: Tensor, weight: Tensor
) -> None:
    """Adds the gradients of x, weight and bias, which are those inputs of ctx, of the hidden features x W^T + b where
    a second derivative reached these by `grad`."""
    if grad is None or torch.compiler.is_compiling():
        return
    flags = [ctx.needs_input_grad[i] for i in places]
    found = differentiable(linear_act_backward, grad, x, weight, x.new_empty(0), "none", *flags, ctx.backend)
    for i, gradient in zip(places, _wanted(found, flags), strict=True):
        before = gradients[i]
        gradients[i] = gradient if before is None or gradient is None else before + gradient


class LinearAct(torch.autograd.Function):
    """linear_act_forward with gradients; the arguments are the operator's, in its order."""

    generate_vmap_rule = True  # the operators have vmap rules of their own

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        y, pre = invoke(linear_act_forward, *args)
        return y, pre

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, ctx.activation, _, ctx.backend = inputs
        _hide(ctx, output[1])
        needs_x, needs_weight, _ = ctx.needs_input_grad[:3]
        ctx.save_for_backward(saved_input(x, needs_weight), saved_weight(weight, needs_x), output[1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_pre: Tensor | None) -> tuple[Any, ...]:
        x, weight, pre = ctx.saved_tensors
        flags = ctx.needs_input_grad[:3]
        gradients: list[Tensor | None] = [None] * 3
        if grad_y is not None:
            found = differentiable(linear_act_backward, grad_y, x, weight, pre, ctx.activation, *flags, ctx.backend)
            gradients = _wanted(found, flags)
        _add_linear(ctx, gradients, (0, 1, 2), grad_pre, x, weight)
        return (*gradients, None, None, None)


class Ffn(torch.autograd.Function):
    """ffn_forward with gradients; the arguments are the operator's, in its order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        y, pre = invoke(ffn_forward, *args)
        return y, pre

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, w1, _, w2, _, seed, *ctx.options, _, ctx.backend = inputs
        _hide(ctx, output[1])
        needs_x, needs_w1, needs_b1 = ctx.needs_input_grad[:3]
        weights = saved_weight(w1, needs_x), saved_weight(w2, needs_x or needs_w1 or needs_b1)
        ctx.save_for_backward(saved_input(x, needs_w1), *weights, output[1], seed)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_pre: Tensor | None) -> tuple[Any, ...]:
        x, w1, *_ = saved = ctx.saved_tensors
        flags = ctx.needs_input_grad[:5]
        gradients: list[Tensor | None] = [None] * 5
        if grad_y is not None:
            gradients = _wanted(differentiable(ffn_backward, grad_y, *saved, *ctx.options, *flags, ctx.backend), flags)
        _add_linear(ctx, gradients, (0, 1, 2), grad_pre, x, w1)
        return (*gradients, *(None,) * 5)


class GatedFfn(torch.autograd.Function):
    """gated_ffn_forward with gradients; the arguments are the operator's, in its order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, gate, up = invoke(gated_ffn_forward, *args)
        return y, gate, up

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, w_gate, _, w_up, _, w_down, _, seed, *ctx.options, _, ctx.backend = inputs
        _hide(ctx, *output[1:])
        needs_x, needs_gate, _, needs_up, _ = needs = ctx.needs_input_grad[:5]
        weights = (saved_weight(w_gate, needs_x), saved_weight(w_up, needs_x), saved_weight(w_down, any(needs)))
        ctx.save_for_backward(saved_input(x, needs_gate or needs_up), *weights, *output[1:], seed)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_gate: Tensor | None, grad_up: Tensor | None) -> tuple[Any, ...]:
        x, w_gate, w_up, *_ = saved = ctx.saved_tensors
        flags = ctx.needs_input_grad[:7]
        gradients: list[Tensor | None] = [None] * 7
        if grad_y is not None:
            found = differentiable(gated_ffn_backward, grad_y, *saved, *ctx.options, *flags, ctx.backend)
            gradients = _wanted(found, flags)
        _add_linear(ctx, gradients, (0, 1, 2), grad_gate, x, w_gate)
        _add_linear(ctx, gradients, (0, 3, 4), grad_up, x, w_up)
        return (*gradients, *(None,) * 5)


register_exported(LinearAct, linear_act_forward, visible=1)
register_exported(Ffn, ffn_forward, visible=1)
register_exported(GatedFfn, gated_ffn_forward, visible=1)

register_formulas(
    LinearAct,
    forward=(linear_act_forward, of_reference(reference.linear_act_forward)),
    backward=(linear_act_backward, of_reference(reference.linear_act_backward)),
)
register_formulas(
    Ffn,
    forward=(ffn_forward, of_reference(reference.ffn_forward)),
    backward=(ffn_backward, of_reference(reference.ffn_backward)),
)
register_formulas(
    GatedFfn,
    forward=(gated_ffn_forward, of_reference(reference.gated_ffn_forward)),
    backward=(gated_ffn_backward, of_reference(reference.gated_ffn_backward)),
)
