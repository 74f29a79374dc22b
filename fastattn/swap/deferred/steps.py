"""What may be done to deferred scores and weights without their values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattn.nn.checks import FLOATS, MAX_DROPOUT
from fastattn.swap.deferred.products import MATMULS, PRODUCTS, can_be_added, is_number, weighted, weighted_einsum
from fastattn.swap.deferred.scores import Part, Scores
from fastattn.swap.deferred.tensor import PLAIN, STEPS, Deferral, Deferred, Function, deferred, made, running, write

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def _open(value: object) -> Scores | None:
    """The scores that a tensor stands for, where it is deferred still and everything is as it was when it became so."""
    if not isinstance(value, Deferred) or value.node.is_made or value.node.tracks != torch.is_grad_enabled():
        return None
    if value.node.scores.is_turned:
        return None
    return value.node.scores if running.deferral is None or running.deferral.defers_here() else None


def _known_as(*functions: Any) -> Callable[[Any], Any]:
    def enter(step: Any) -> Any:
        STEPS.update(dict.fromkeys(functions, step))
        return step

    return enter


def _gives(scores: Scores, target: Deferred, function: Function, args: Args, kwargs: Kwargs, dtype: Any = None) -> Any:
    """The result of a step; of one in place the target."""
    dtype = dtype or target.node.dtype
    apart = _IN_PLACE.get(function)
    if apart is None:
        return deferred(scores, function, args, kwargs, dtype)
    if target is not args[0] or target.node.is_view or target.node.is_used or dtype != target.node.dtype:
        return NotImplemented
    write(target, deferred(scores, apart, args, kwargs, dtype))
    return target


_IN_PLACE: dict[Any, Any] = {
    Tensor.mul_: Tensor.mul,
    Tensor.div_: Tensor.div,
    Tensor.add_: Tensor.add,
    Tensor.sub_: Tensor.sub,
    Tensor.masked_fill_: Tensor.masked_fill,
}
"""Operations in place, and what gives the same: nobody else holds what they would write to."""


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _number(value: object) -> float | None:
    if is_number(value):
        return float(value)  # type: ignore[arg-type]
    if type(value) in PLAIN and not value.dim() and not value.requires_grad and value.is_cpu:  # type: ignore[attr-defined]
        return float(value) if value.dtype != torch.bool and not value.is_complex() else None  # type: ignore[attr-defined, arg-type]
    return None


@_known_as(torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, torch.multiply)
def _multiply(function: Function, args: Args, kwargs: Kwargs) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    target, factor = args if isinstance(args[0], Deferred) else (args[1], args[0])
    return _scaled(function, target, factor, args, divides=False)


@_known_as(torch.div, Tensor.div, Tensor.div_, Tensor.__truediv__, torch.true_divide, torch.divide)
def _divide(function: Function, args: Args, kwargs: Kwargs) -> Any:
    if len(args) != 2 or kwargs or not isinstance(args[0], Deferred):
        return NotImplemented
    return _scaled(function, args[0], args[1], args, divides=True)


def _scaled(function: Function, target: Any, factor: Any, args: Args, *, divides: bool) -> Any:
    scores = _open(target)
    if scores is None or scores.is_softmaxed:
        return NotImplemented
    number = _number(factor)
    if number is None:
        return _scaled_by_tensor(function, target, scores, factor, args, divides=divides)
    if divides and number == 0.0:
        return NotImplemented
    number = 1.0 / number if divides else number
    if not math.isfinite(number) or not math.isfinite(number * scores.scale):
        return NotImplemented
    if scores.fill is not None and number <= 0.0:
        return NotImplemented
    scaled = scores._replace(
        scale=scores.scale * number,
        terms=tuple(part._replace(factor=part.factor * number) for part in scores.terms),
        fill=None if scores.fill is None else scores.fill * number,
    )
    return _gives(scaled, target, function, args, {})


def _scaled_by_tensor(
    function: Function, target: Deferred, scores: Scores, factor: Any, args: Args, *, divides: bool
) -> Any:
    """By a number for each head or query, which the queries take over: a learned temperature."""
    if scores.terms or scores.hidden or not can_be_added(factor, scores.q.shape, target.node.dtype):
        return NotImplemented
    if factor.dtype != scores.q.dtype and factor.dim():
        return NotImplemented
    if factor.dim() and factor.shape[-1] != 1:
        return NotImplemented
    if len(scores.leads) > 1 or scores.q.shape[:-2] != scores.leads[-1]:
        return NotImplemented
    q = scores.q / factor if divides else scores.q * factor
    return _gives(scores._replace(q=q), target, function, args, {})


# ---- biases ----------------------------------------------------------------------------------------------------------


@_known_as(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__)
def _add(function: Function, args: Args, kwargs: Kwargs) -> Any:
    return _added(function, args, kwargs, 1.0)


@_known_as(torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, torch.subtract)
def _subtract(function: Function, args: Args, kwargs: Kwargs) -> Any:
    return _added(function, args, kwargs, -1.0) if isinstance(args[0], Deferred) else NotImplemented


def _added(function: Function, args: Args, kwargs: Kwargs, sign: float) -> Any:
    if len(args) != 2 or not set(kwargs) <= {"alpha"}:
        return NotImplemented
    alpha = kwargs.get("alpha", 1)
    target, added = args if isinstance(args[0], Deferred) else (args[1], args[0])
    if target is not args[0] and alpha != 1:
        return NotImplemented
    scores = _open(target)
    if scores is None or scores.is_softmaxed or not is_number(alpha) or not math.isfinite(alpha):
        return NotImplemented
    if scores.fill is not None and scores.fill != -math.inf:
        return NotImplemented
    if is_number(added) and added == 0:  # of a sum that starts so
        return _gives(scores, target, function, args, kwargs)
    if isinstance(added, Deferred):
        # Content and position, say: the second product becomes a bias.
        if added is target or added.node.tracks != torch.is_grad_enabled():
            return NotImplemented
        added = made(added)
        args = (target, added) if target is args[0] else (added, target)
    if type(added) not in PLAIN or not can_be_added(added, scores.shape, target.node.dtype):
        return NotImplemented
    dtype = target.node.dtype
    if added.dim() and added.dtype != dtype:
        dtype = torch.promote_types(dtype, added.dtype)
    part = Part(added, scores.leads[-1], sign * float(alpha))
    return _gives(scores._replace(terms=(*scores.terms, part)), target, function, args, kwargs, dtype)


# ---- masks -----------------------------------------------------------------------------------------------------------


@_known_as(torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_)
def _masked_fill(function: Function, args: Args, kwargs: Kwargs) -> Any:
    named = dict(zip(("input", "mask", "value"), args, strict=False)) | kwargs
    if set(named) != {"input", "mask", "value"} or len(args) > 3:
        return NotImplemented
    target, mask, value = named["input"], named["mask"], named["value"]
    return _hidden(function, (target, mask, value), target, mask, value)


@_known_as(torch.where, Tensor.where)
def _where(function: Function, args: Args, kwargs: Kwargs) -> Any:
    if len(args) != 3 or kwargs:
        return NotImplemented
    if function is Tensor.where:  # scores.where(seen, value)
        target, seen, value = args
    else:
        seen, target, value = args
    if isinstance(target, Deferred):
        return _hidden(function, args, target, seen, value, flip=True)
    return _hidden(function, args, value, seen, target) if isinstance(value, Deferred) else NotImplemented


def _hidden(function: Function, args: Args, target: Any, mask: Any, value: Any, *, flip: bool = False) -> Any:
    scores, number = _open(target), _number(value)
    if scores is None or number is None or type(mask) not in PLAIN or mask.dtype != torch.bool or not mask.is_cpu:
        return NotImplemented
    shape = scores.shape
    if mask.dim() > len(shape) or any(n not in (1, m) for n, m in zip(mask.shape[::-1], shape[::-1], strict=False)):
        return NotImplemented
    if not torch.finfo(target.node.dtype).min <= number and number != -math.inf:
        return NotImplemented  # and an error
    if scores.is_softmaxed:
        return _without_lonely(function, args, target, scores, mask, number, flip)
    if number >= -1.0 or scores.fill not in (None, number):
        return NotImplemented
    part = Part(mask.logical_not() if flip else mask, scores.leads[-1])
    return _gives(scores._replace(hidden=(*scores.hidden, part), fill=number), target, function, args, {})


def _without_lonely(
    function: Function, args: Args, target: Deferred, scores: Scores, mask: Tensor, number: float, flip: bool
) -> Any:
    """Weights of hidden keys set to 0: that leaves a query which sees no key with none."""
    if number != 0.0 or flip or scores.dropout_p or scores.terms or len(scores.hidden) != 1:
        return NotImplemented
    if scores.hidden[0].tensor is not mask or scores.leads[-1] != scores.hidden[0].lead:
        return NotImplemented
    if scores.fill != -math.inf and not scores.fill <= -1e8:  # type: ignore[operator]
        return NotImplemented
    return _gives(scores._replace(fill=-math.inf), target, function, args, {})


# ---- softmax, dropout, dtypes ----------------------------------------------------------------------------------------


@_known_as(F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
def _softmax(function: Function, args: Args, kwargs: Kwargs) -> Any:
    names = ("input", "dim", "_stacklevel", "dtype") if function is F.softmax else ("input", "dim", "dtype")
    named = dict(zip(names, args, strict=False)) | kwargs
    target, dim, dtype = named.get("input"), named.get("dim"), named.get("dtype")
    scores = _open(target)
    if scores is None or scores.is_softmaxed or not set(named) <= set(names) or len(args) > len(names):
        return NotImplemented
    if dim not in (-1, len(scores.leads[-1]) + 1) or dtype not in (None, *FLOATS):
        return NotImplemented
    assert isinstance(target, Deferred)
    keywords = {name: value for name, value in named.items() if name in ("dim", "dtype")}
    return deferred(scores._replace(is_softmaxed=True), function, (target,), keywords, dtype or target.node.dtype)


@_known_as(F.dropout, torch.dropout)
def _dropout(function: Function, args: Args, kwargs: Kwargs) -> Any:
    names = ("input", "p", "training", "inplace") if function is F.dropout else ("input", "p", "train")
    named = (
        {"p": 0.5, "training": True, "train": True, "inplace": False} | dict(zip(names, args, strict=False)) | kwargs
    )
    target, rate, training = named.get("input"), named["p"], named["training" if function is F.dropout else "train"]
    scores = _open(target)
    if scores is None or not is_number(rate) or not 0.0 <= rate <= 1.0:
        return NotImplemented
    if not training or rate == 0.0:
        return target
    if not scores.is_softmaxed or scores.dropout_p or rate > MAX_DROPOUT or named["inplace"]:
        return NotImplemented
    dropped = scores._replace(dropout_p=float(rate), seeds=([],))
    return deferred(dropped, function, args, kwargs, target.node.dtype)  # type: ignore[union-attr]


@_known_as(Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16)
def _cast(function: Function, args: Args, kwargs: Kwargs) -> Any:
    target = args[0]
    scores = _open(target)
    if scores is None or kwargs or len(args) > 2:
        return NotImplemented
    dtype = _CASTS.get(function)
    if dtype is None and len(args) == 2:
        wanted = args[1]
        if isinstance(wanted, Tensor) and function is not Tensor.type and wanted.is_cpu:
            dtype = wanted.dtype
        elif isinstance(wanted, torch.dtype):
            dtype = wanted
    if dtype not in FLOATS:
        return NotImplemented
    if dtype == target.node.dtype:
        return target
    if scores.fill is not None and scores.fill != -math.inf and not scores.is_softmaxed:
        return NotImplemented  # the fill may become -inf
    return deferred(scores, Tensor.to, (target, dtype), {}, dtype)


_CASTS = {Tensor.float: torch.float32, Tensor.half: torch.float16, Tensor.bfloat16: torch.bfloat16}


@_known_as(Tensor.contiguous)
def _contiguous(function: Function, args: Args, kwargs: Kwargs) -> Any:
    """As products are."""
    return NotImplemented if _open(args[0]) is None or kwargs or len(args) > 1 else args[0]


# ---- views -----------------------------------------------------------------------------------------------------------


@_known_as(
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
    Tensor.unflatten,
    torch.unflatten,
    Tensor.flatten,
    torch.flatten,
    Tensor.unsqueeze,
    torch.unsqueeze,
    Tensor.squeeze,
    torch.squeeze,
)
def _view(function: Function, args: Args, kwargs: Kwargs) -> Any:
    """The leading dimensions in another shape, the last two as they are."""
    target = args[0]
    scores = _open(target)
    if scores is None:
        return NotImplemented
    if any(isinstance(value, (Tensor, torch.dtype)) for value in (*args[1:], *kwargs.values())):
        return NotImplemented
    try:
        shape = tuple(function(torch.empty(scores.shape, device="meta"), *args[1:], **kwargs).shape)
    except RuntimeError:
        return NotImplemented
    if len(shape) < 3 or shape[-2:] != scores.shape[-2:]:
        return NotImplemented
    viewed = scores._replace(leads=(*scores.leads, shape[:-2]))
    result = deferred(viewed, function, args, kwargs, target.node.dtype)
    result.node.is_view = True
    return result


_MT = Tensor.mT.__get__  # type: ignore[attr-defined]


@_known_as(
    Tensor.transpose,
    torch.transpose,
    Tensor.swapaxes,
    torch.swapaxes,
    Tensor.swapdims,
    torch.swapdims,
    _MT,
)
def _turn(function: Function, args: Args, kwargs: Kwargs) -> Any:
    """Weights turned over, as where channels come before positions: values @ weights.transpose(-2, -1)."""
    target = args[0]
    scores = _open(target)
    if scores is None or not scores.is_softmaxed or kwargs:
        return NotImplemented
    last = len(scores.shape) - 1
    if function != _MT and {dim % (last + 1) for dim in args[1:]} != {last - 1, last}:
        return NotImplemented
    result = deferred(scores._replace(is_turned=True), function, args, kwargs, target.node.dtype)
    result.node.is_view = True
    return result


# ---- questions -------------------------------------------------------------------------------------------------------


_ATTRIBUTES = (
    *("shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_leaf"),
    *("is_cpu", "is_cuda", "is_xpu", "is_mps", "is_meta", "is_sparse", "is_nested", "is_quantized"),
)


@_known_as(
    Tensor.size,
    Tensor.dim,
    Tensor.ndimension,
    Tensor.numel,
    Tensor.nelement,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.get_device,
    torch.numel,
    torch.is_floating_point,
    torch.is_tensor,
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
)
def _asked(function: Function, args: Args, kwargs: Kwargs) -> Any:
    if not isinstance(args[0], Deferred) or args[0].node.is_made:
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


@_known_as(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor)
def _new(function: Function, args: Args, kwargs: Kwargs) -> Any:
    if not isinstance(args[0], Deferred) or any(isinstance(value, Deferred) for value in args[1:]):
        return NotImplemented
    like = torch.empty(0, dtype=args[0].node.dtype, device="cpu")
    return function(like, *args[1:], **kwargs)


# ---- products with values --------------------------------------------------------------------------------------------

STEPS.update(dict.fromkeys(MATMULS, weighted))
STEPS[torch.einsum] = weighted_einsum


def deferral(backend: str | None, smallest: int) -> Deferral:
    """The mode for one forward."""
    return Deferral(PRODUCTS, backend, smallest)
