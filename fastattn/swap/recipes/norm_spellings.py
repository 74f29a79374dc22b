"""Which expressions are norms: LayerNorm and RMSNorm in torch operations, or as a call of torch's functions for them.

A match says in a `NormNames` all that the kernel needs to know. What does not match exactly is no norm: another axis,
another power, an eps elsewhere, one factor or one cast more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.swap.expression import Expression, Input, Op, Own, Value, parts


class NormNames(NamedTuple):
    """How a class spells its norm."""

    eps: str | float
    weight: str | None
    offset: float
    """What is added to the weight."""
    dtype: str
    """Of the result: the "input"'s, the "weight"'s, or the one that holds both ("wide")."""
    centred: bool = False
    """The mean is subtracted first: LayerNorm."""
    widened: bool = True
    """The statistics are of the input in float32."""
    bias: str | None = None
    function: str | None = None
    """The function of torch that does it, "layer_norm" or "rms_norm": weight and bias may be None, and torch is
    particular about dtypes."""
    shape: Any = None
    """The expression of that function's normalized_shape."""
    of_float32: bool = False
    """That function is given the input in float32,"""
    widened_weight: bool = False
    """and so are weight and bias."""


def norm_names(expression: Expression, flags: tuple[tuple[str, Value], ...] = ()) -> NormNames | None:
    """The norm of Input(0) that an expression spells where the module's flags have these values, or None."""
    float32 = frozenset(path.removesuffix(".dtype") for path, value in flags if value is torch.float32)
    return _function_of_torch(expression) or _spelled_out(expression, float32)


class GatedNames(NamedTuple):
    """How a class spells norm(x) * silu(gate)."""

    norm: NormNames
    activation: str | None
    """The attribute that names the activation in transformers' table; None where it is silu."""
    widened: bool
    """The gate is made float32 first."""
    narrowed: bool
    """The product is cast to the input's dtype."""


def gated_names(expression: Expression) -> GatedNames | None:
    """The product of a norm of Input(0) and silu of Input(1) that an expression spells, or None."""
    inner, narrowed = uncast(expression)
    match inner:
        case Op("mul", operands, ()):
            for factor, rest in orders(operands):
                norm = norm_names(rest)
                if norm is None or norm.function is not None:
                    continue
                match factor:
                    case Op("silu", (gate,), ()):
                        activation = None
                    case Op("ACT2FN", (Own(activation), gate), ()):
                        pass
                    case _:
                        continue
                if gate == Input(1) or gate in widenings(Input(1)):
                    return GatedNames(norm, activation, gate != Input(1), narrowed)
    return None


def orders(operands: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    """Both orders of the operands of a sum or a product; of anything else none."""
    if len(operands) == 2:
        yield operands[0], operands[1]
        yield operands[1], operands[0]


# ---- torch's functions -----------------------------------------------------------------------------------------------


_PARAMETERS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
}


def _function_of_torch(expression: Any) -> NormNames | None:
    """F.layer_norm or F.rms_norm of the input, or of the input in float32 and narrowed again."""
    inner, narrowed = uncast(expression)
    arguments = _arguments(inner)
    if arguments is None:
        return None
    function, x, shape, eps = inner.name, arguments["input"], arguments["normalized_shape"], arguments["eps"]
    widened = x in widenings(Input(0))
    if not (narrowed if widened else x == Input(0)) or not isinstance(eps, (Own, float)) or not _is_shape(shape):
        return None
    weight, bias = _scale(arguments["weight"]), _scale(arguments.get("bias"))
    if weight is None or bias is None or bias.offset or (weight.name and bias.name and weight.widened != bias.widened):
        return None
    widened_weight = weight.widened or bias.widened
    if widened_weight and not widened:
        return None  # torch takes no such pair on every device
    return NormNames(
        _constant(eps),
        weight.name,
        weight.offset,
        "input",
        function == "layer_norm",
        False,
        bias.name,
        function,
        shape,
        widened,
        widened_weight,
    )


def _arguments(call: Any) -> dict[str, Any] | None:
    """The arguments of a call of one of the functions by name, with torch's defaults."""
    if not isinstance(call, Op) or call.name not in _PARAMETERS:
        return None
    names = _PARAMETERS[call.name]
    given = dict(zip(names, call.operands, strict=False)) | dict(call.options)
    if len(call.operands) > len(names) or not set(given) <= set(names):
        return None
    defaults = {"weight": None, "bias": None, "eps": 1e-5 if call.name == "layer_norm" else None}
    found = defaults | given
    return found if {"input", "normalized_shape"} <= set(found) else None


def _is_shape(shape: Any) -> bool:
    match shape:
        case Own() | (Own() | int(),) | Op("getattr", (Own(), "shape")):
            return True
        case Op("getitem", (Op("getattr", (x, "shape")), Op("slice", (-1, None, None)))):
            return _is_input(x)
        case (size,):
            return _is_last_size(size)
    return False


def _is_last_size(size: Any) -> bool:
    return size in (Op("size", (Input(0), -1)), Op("getitem", (Op("getattr", (Input(0), "shape")), -1)))


def shape_of(shape: Any, module: nn.Module, x: Tensor | None) -> tuple[Any, ...] | None:
    """The value of a normalized_shape. None where torch would not take it, and where it asks for an x that is not
    given."""
    # Without match, which Dynamo of torch 2.7 does not trace.
    if isinstance(shape, Own):
        value = getattr(module, shape.name)
        return tuple(value) if isinstance(value, (tuple, list)) else None
    if isinstance(shape, Op) and shape.name == "getattr" and isinstance(shape.operands[0], Own):
        value = getattr(module, shape.operands[0].name)
        return tuple(value.shape) if isinstance(value, Tensor) else None
    if isinstance(shape, tuple) and isinstance(shape[0], (Own, int)):
        return (getattr(module, shape[0].name) if isinstance(shape[0], Own) else shape[0],)
    return None if x is None else tuple(x.shape[-1:])


# ---- spelled out -----------------------------------------------------------------------------------------------------


def _spelled_out(expression: Any, float32: frozenset[str]) -> NormNames | None:
    """`float32` names the weights that are known to be."""
    inner, narrowed = uncast(expression)
    match inner:
        case Op("add", operands, ()):
            for bias, rest in orders(operands):
                shift = _scale(bias)
                if shift is None or shift.name is None or shift.offset or (shift.widened and not narrowed):
                    continue
                found = _scaled(rest, narrowed, float32)
                if found is not None and found.centred and found.weight is not None:
                    return found._replace(bias=shift.name, widened=_is_widened(expression))
            return None
    found = _scaled(inner, narrowed, float32)
    return None if found is None else found._replace(widened=_is_widened(expression))


def _scaled(expression: Any, narrowed: bool, float32: frozenset[str]) -> NormNames | None:
    """The norm with its weight, or without; `narrowed` says that the result is."""
    found, as_weight = _normalised(expression), False
    if found is None:
        match expression:
            case Op("mul", operands, ()):
                for factor, rest in orders(operands):
                    scale = _scale(factor)
                    if scale is None or scale.name is None:
                        continue
                    cast, is_cast = uncast(rest, Own(scale.name))
                    inner = _normalised(cast if is_cast else uncast(rest)[0])
                    if inner is not None and inner.scale is None:
                        found, as_weight = inner._replace(scale=scale), is_cast
    if found is None:
        return None
    scale, widens = found.scale, _is_wide(expression) or (found.scale is not None and found.scale.widened)
    if narrowed:
        dtype = "input"
    elif scale is not None and ((as_weight and not scale.widened) or (widens and scale.name in float32)):
        dtype = "weight"  # of two that are float32 there is no other
    elif not as_weight and not widens:
        dtype = "input" if scale is None else "wide"
    else:
        return None
    if scale is None:
        return NormNames(found.eps, None, 0.0, dtype, found.centred)
    return NormNames(found.eps, scale.name, scale.offset, dtype, found.centred)


class _Found(NamedTuple):
    eps: str | float
    centred: bool
    scale: _Scale | None


def _normalised(expression: Any) -> _Found | None:
    """A product of z, 1 / sqrt(mean(z^2) + eps) and perhaps a weight, z the input, or the input less its mean."""
    scale: _Scale | None = None
    z: Any = None
    root: Any = None
    for factor, inverse in _factors(expression):
        own = _scale(factor)
        if root is None and _under_the_root(factor, inverse) is not None:
            root = factor
            variance = _under_the_root(factor, inverse)
        elif scale is None and own is not None and own.name is not None and not inverse:
            scale = own
        elif z is None and not inverse and _is_centred(factor) is not None:
            z = factor
        else:
            return None
    # An inverse root that is narrowed makes a product of halves with the input as it came alone.
    if z is None or root is None or (uncast(root)[1] and z != Input(0)):
        return None
    match variance:
        case Op("add", terms, ()):
            for mean, eps in orders(terms):
                if isinstance(eps, (Own, float)) and _is_variance_of(z, mean):
                    return _Found(_constant(eps), bool(_is_centred(z)), scale)
    return None


def _factors(expression: Any) -> list[tuple[Any, bool]]:
    """What is multiplied in a product, and whether it is divided by. A square is one factor, and no 1 is any."""
    match expression:
        case Op("mul" | "div" as name, (first, second), ()):
            others = [(factor, inverse != (name == "div")) for factor, inverse in _factors(second)]
            return [each for each in (*_factors(first), *others) if not _is_one(each[0])]
    return [(expression, False)]


def _is_one(factor: Any) -> bool:
    return type(factor) in (int, float) and factor == 1


def _under_the_root(expression: Any, inverse: bool) -> Any:
    """v of sqrt(v), divided by, or of a factor 1 / sqrt(v) in any form; the inverse may be narrowed."""
    if inverse:
        match expression:
            case Op("sqrt", (v,), ()):
                return v
        return None
    match uncast(expression)[0]:
        case Op("rsqrt", (v,), ()) | Op("pow", (v, -0.5), ()):
            return v
    return None


def _is_variance_of(z: Any, expression: Any) -> bool:
    """Whether the expression is mean(z^2), or, of a z that is centred, the variance in one word."""
    if _mean(expression) in _squares(z):
        return True
    match z:
        case Op("sub", (base, _), ()):
            return _variance(expression) == base
    return False


def _mean(expression: Any) -> Any:
    """What the expression is the mean of, over the last dimension, which is kept."""
    match expression:
        case (
            Op("mean", (z, -1), (("keepdim", True),))
            | Op("mean", (z, -1, True), ())
            | Op("mean", (z,), (("dim", -1), ("keepdim", True)))
        ):
            return z
    return None


def _variance(expression: Any) -> Any:
    """As `_mean`, of the variance that divides by the number of elements, not by one less."""
    biased = ({"dim": -1, "keepdim": True, "unbiased": False}, {"dim": -1, "keepdim": True, "correction": 0})
    match expression:
        case Op("var", (z, -1), options) if "dim" not in dict(options):
            return z if {"dim": -1, **dict(options)} in biased else None
        case Op("var", (z,), options):
            return z if dict(options) in biased else None
    return None


def _squares(z: Any) -> tuple[Any, ...]:
    """The spellings of z^2, of what is narrow widened or not."""
    forms: list[Any] = []
    for base in (z, *widenings(z)):
        forms += [Op("pow", (base, 2)), Op("pow", (base, 2.0)), Op("square", (base,)), Op("mul", (base, base))]
    return tuple(forms)


def _is_centred(z: Any) -> bool | None:
    """False where z is the input, widened or not; True where it is that less its mean; None for anything else."""
    if _is_input(z):
        return False
    match z:
        case Op("sub", (base, mean), ()) if _is_input(base) and _mean(mean) == base:
            return True
    return None


# ---- dtypes ----------------------------------------------------------------------------------------------------------


def _is_widened(expression: Any) -> bool:
    """Whether the input is widened anywhere in the expression."""
    return any(part in widenings(Input(0)) for part in parts(expression))


def _is_wide(expression: Any) -> bool:
    """Whether the result is float32 because something in it was widened."""
    if uncast(expression)[1] or not isinstance(expression, Op):
        return False
    return expression in widenings(expression.operands[0]) or any(map(_is_wide, expression.operands))


def _is_input(z: Any) -> bool:
    return z == Input(0) or z in widenings(Input(0))


def widenings(base: Any) -> tuple[Any, ...]:
    wide = torch.float32
    return Op("float", (base,)), Op("to", (base, wide)), Op("to", (base,), (("dtype", wide),)), Op("type", (base, wide))


def uncast(expression: Any, weight: Own | None = None) -> tuple[Any, bool]:
    """The expression without a cast to the dtype of the input, or of a weight, and whether there was one."""
    like = weight or Input(0)
    dtype = Op("getattr", (like, "dtype"))
    match expression:
        case Op("to" | "type", (inner, target), ()) if target in (dtype, like):
            return inner, True
        case Op("to", (inner,), (("dtype", target),)) if target == dtype:
            return inner, True
        case Op("type_as", (inner, other), ()) if other == like:
            return inner, True
    return expression, False


# ---- weights ---------------------------------------------------------------------------------------------------------


class _Scale(NamedTuple):
    """A weight, or 1 + a weight, as it is or in float32; no name where there is none."""

    name: str | None
    offset: float = 0.0
    widened: bool = False


def _scale(factor: Any) -> _Scale | None:
    match factor:
        case None:
            return _Scale(None)
        case Own(name):
            return _Scale(name)
        case Op("add", operands, ()):
            for one, weight in orders(operands):
                found = _scale(weight) if _is_one(one) else None
                if found is not None and found.name is not None and not found.offset:
                    return found._replace(offset=1.0)
        case Op(_, (inner, *_)) if factor in widenings(inner):
            found = _scale(inner)
            return None if found is None or found.name is None else found._replace(widened=True)
    return None


def _constant(eps: Own | float) -> str | float:
    return eps.name if isinstance(eps, Own) else eps
