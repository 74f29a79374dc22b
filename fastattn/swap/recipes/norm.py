"""Norms that a class spells out in torch operations, and the residual block dropout-add-LayerNorm.

SpelledNorm     weight * x / sqrt(mean(x^2) + eps), as Llama, Gemma and most decoders have it, or LayerNorm without bias
ResidualNorm    norm(dropout(linear(x)) + residual), as BERT has it

What a class's forward computes is read by `fastattn.swap.expression`; the functions below say which expressions these
kernels stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.functional import layer_norm, rms_norm
from fastattn.nn.checks import FLOATS, why_not_dropout, why_not_input, why_not_linear, why_not_tensor
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.norm import why_not_layer_norm
from fastattn.nn.sublayers import add_and_normalise
from fastattn.swap.expression import Call, Expression, Input, Op, Own, Spelling, parts, spelling_of
from fastattn.swap.reading import ReadForward, Reading, attribute, spelled_as, why_not_as_read
from fastattn.swap.recipe import Recipe, always
from fastattn.swap.recipes.linear import linear
from fastattn.swap.swapped import Swapped


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


class SpelledNorm(ReadForward):
    """(weight + offset) * x / sqrt(mean(x^2) + eps), x (..., N). Halves are rounded once, at the end."""

    fastattn_norm: ClassVar[NormNames]

    def fastattn_forward(self, *inputs: Any) -> Tensor:
        note_call(self)
        (x,) = inputs
        names = self.fastattn_norm
        weight, eps = (None if names.weight is None else getattr(self, names.weight)), attribute(self, names.eps)
        reason = why_not_as_read(self) or _why_not(x, weight, eps, names)
        if reason is None and x.is_contiguous():
            return self.fastattn_normalise(x, weight, eps)
        order = None if reason is not None else _order_in_memory(x)
        if order is None:
            note_fallback(self, reason or "its input does not lie in rows, its last dimension innermost")
            return super().forward(x)  # type: ignore[misc, no-any-return]
        # The original's result lies in memory as its input does.
        y = self.fastattn_normalise(x.permute(order).contiguous(), weight, eps)
        return y.permute(sorted(range(y.dim()), key=order.__getitem__))

    def fastattn_normalise(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """The norm of a contiguous tensor."""
        names = self.fastattn_norm
        result_dtype = dtype = x.dtype
        if weight is not None and weight.dtype is not dtype:
            wide = torch.promote_types(x.dtype, weight.dtype)
            result_dtype = {"input": x.dtype, "weight": weight.dtype, "wide": wide}[names.dtype]
            weight = weight.to(torch.float32)
            x = x.to(torch.promote_types(x.dtype, result_dtype))
        if names.centred:
            if weight is not None and names.offset:
                weight = weight.to(torch.float32) + names.offset  # which this kernel does not add
            y = layer_norm(x, weight, None, eps, backend=self.fastattn_backend)
        else:
            y = rms_norm(x, weight, eps, offset=names.offset, backend=self.fastattn_backend)
        return y if result_dtype is dtype else y.to(result_dtype)


def _order_in_memory(x: Tensor) -> tuple[int, ...] | None:
    """The dimensions before the last, from the outermost in memory to the innermost, and the last; None where in this
    order x is not rows that follow one another, with gaps or without."""
    last = x.dim() - 1
    order = (*sorted(range(last), key=lambda dim: -x.stride(dim)), last)
    if x.shape[last] > 1 and x.stride(last) != 1:
        return None
    reach = x.shape[last]  # of the dimensions further in
    for dim in reversed(order[:-1]):
        if x.shape[dim] > 1:
            if x.stride(dim) < reach:
                return None  # rows that overlap, as those of an expanded tensor do
            reach += x.stride(dim) * (x.shape[dim] - 1)
    return order


def _why_not(x: Any, weight: Any, eps: object, names: NormNames) -> str | None:
    reason = why_not_input(x) or why_not_tensor("weight", weight) or _why_not_eps(eps)
    if reason is not None:
        return reason
    if x.dim() == 0:
        return "the input has no dimension"
    if not names.widened and x.is_cuda and torch.is_autocast_enabled("cuda"):
        return "autocast widens its statistics, and with them the result"
    if weight is None:
        return None if names.weight is None else "its weight is None"
    if weight.dtype not in FLOATS:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    return None if weight.shape == x.shape[-1:] else "its weight does not lie along the last dimension"


def _why_not_eps(eps: object) -> str | None:
    if type(eps) not in (int, float):
        return f"its eps is a {type(eps).__name__}"
    return None if eps >= 0 else f"its eps is {eps!r}"  # type: ignore[operator]


class ResidualNorm(ReadForward):
    """norm(dropout(dense(x)) + residual), both (..., N): one linear, then one fused dropout-add-LayerNorm."""

    fastattn_children: ClassVar[tuple[str, str, str]]
    """The names of dense, dropout and norm."""
    fastattn_linear_part: ClassVar[str]
    """The part of a swap that dense belongs to."""

    def fastattn_forward(self, *inputs: Any) -> Tensor:
        note_call(self)
        x, residual = inputs
        reason = why_not_as_read(self)
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(x, residual)  # type: ignore[misc, no-any-return]
        dense, dropout, norm = self.fastattn_children
        return add_and_normalise(self, linear(self, dense, x, self.fastattn_linear_part), residual, dropout, norm)[0]


# ---- which classes ---------------------------------------------------------------------------------------------------


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward is one of these."""
    spelling = spelling_of(module_class)
    if spelling is None:
        return None
    if len(spelling.inputs) == 1:
        names = _spelled_norm(spelling.expression)
        return None if names is None else spelled_norm(spelling, names)
    children = _residual_norm(spelling.expression)
    return None if children is None else _residual(module_class, spelling, children)


def spelled_norm(spelling: Spelling, names: NormNames) -> Reading:
    """The reading of a class whose forward is known to be this norm."""
    kernel = "layer_norm" if names.centred else "rms_norm"

    def refuse(module: nn.Module) -> list[str]:
        weight = None if names.weight is None else getattr(module, names.weight, None)
        if isinstance(weight, Tensor) and weight.dim() != 1:
            return [f"its weight has {weight.dim()} dimensions"]
        reason = _why_not_eps(attribute(module, names.eps))
        return [] if reason is None else [reason]

    return Reading(
        SpelledNorm,
        lambda swapped: Recipe(swapped, kernels={"norms": kernel}, refuse=refuse),
        {"fastattn_norm": names, **spelled_as(spelling)},
    )


def _residual(module_class: type[nn.Module], spelling: Spelling, children: tuple[str, str, str]) -> Reading:
    # The block that ends the feed-forward one is told by its name alone: BertOutput, not BertSelfOutput.
    part = "linears" if "Self" in module_class.__name__ or "Attention" in module_class.__name__ else "ffns"
    dense, dropout, norm = children

    def recipe(swapped: type[Swapped]) -> Recipe:
        return Recipe(
            swapped,
            kernels={part: "linear", "norms": "dropout_add_layer_norm"},
            children=always(
                (dense, part, why_not_linear), (norm, "norms", why_not_layer_norm), (dropout, "norms", why_not_dropout)
            ),
            applies=lambda module: (
                hasattr(getattr(module, dense), "in_features") and isinstance(getattr(module, norm), nn.LayerNorm)
            ),
        )

    attributes = {"fastattn_children": children, "fastattn_linear_part": part, **spelled_as(spelling)}
    return Reading(ResidualNorm, recipe, attributes)


# ---- which expressions -----------------------------------------------------------------------------------------------


def _residual_norm(expression: Expression) -> tuple[str, str, str] | None:
    """Call(norm, Call(dropout, Call(dense, x)) + residual)."""
    match expression:
        case Call(Own(norm), (Op("add", operands, ()),)):
            for first, second in _orders(operands):
                match first:
                    case Call(Own(dropout), (Call(Own(dense), (Input(0),)),)) if second == Input(1):
                        return dense, dropout, norm
    return None


def _spelled_norm(expression: Expression) -> NormNames | None:
    inner, narrowed = _narrowed(expression)
    match inner:
        case Op("mul", operands, ()):
            for factor, rest in _orders(operands):
                scale = _scale(factor)
                if scale is None:
                    continue
                weight, offset, widened = scale
                rest, narrowed_before = _narrowed(rest)
                found = _normalised(rest)
                # Not narrowed at the end, the result has the dtype that holds both: if no factor is widened.
                same = not widened and (narrowed_before or not _is_widened(rest))
                if found is not None and (narrowed or same):
                    eps, centred = found
                    dtype = "input" if narrowed else "wide"
                    return NormNames(eps, weight, offset, dtype, centred, _is_widened(expression))
    found = _normalised(inner) if narrowed or not _is_widened(inner) else None
    return None if found is None else NormNames(found[0], None, 0.0, "input", found[1], _is_widened(expression))


def _normalised(expression: Any) -> tuple[str | float, bool] | None:
    """(eps, centred) where the expression is z / sqrt(mean(z^2) + eps), z the input, or the input less its mean."""
    match expression:
        case Op("mul" | "div" as name, operands, ()):
            for z, divisor in _orders(operands) if name == "mul" else ((operands[0], operands[1]),):
                variance = _under_the_root(divisor, inverse=name == "mul")
                match variance:
                    case Op("add", terms, ()):
                        for mean, eps in _orders(terms):
                            constant = eps.name if isinstance(eps, Own) else eps
                            if isinstance(eps, (Own, float)) and _mean(mean) in _squares(z):
                                centred = _centred(z)
                                return None if centred is None else (constant, centred)
    return None


def _under_the_root(expression: Any, inverse: bool) -> Any:
    """v of sqrt(v), or, `inverse`, of 1 / sqrt(v) in any form."""
    match expression:
        case Op("sqrt", (v,), ()) if not inverse:
            return v
        case Op("rsqrt", (v,), ()) | Op("div", (1 | 1.0, Op("sqrt", (v,), ())), ()) | Op("pow", (v, -0.5), ()) if (
            inverse
        ):
            return v
    return None


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


def _squares(z: Any) -> tuple[Any, ...]:
    """The spellings of z^2. The square may be of the widened input where z is the input as it came."""
    forms: list[Any] = []
    for base in (z, *_widenings(z)):
        forms += [Op("pow", (base, 2)), Op("pow", (base, 2.0)), Op("square", (base,)), Op("mul", (base, base))]
    return tuple(forms)


def _centred(z: Any) -> bool | None:
    """False where z is the input, widened or not; True where it is that less its mean; None for anything else."""
    if _is_input(z):
        return False
    match z:
        case Op("sub", (base, mean), ()) if _is_input(base) and _mean(mean) == base:
            return True
    return None


def _is_widened(expression: Any) -> bool:
    """Whether the input is widened anywhere in the expression."""
    return any(part in _widenings(Input(0)) for part in parts(expression))


def _is_input(z: Any) -> bool:
    return z == Input(0) or z in _widenings(Input(0))


def _widenings(base: Any) -> tuple[Any, ...]:
    wide = torch.float32
    return Op("float", (base,)), Op("to", (base, wide)), Op("to", (base,), (("dtype", wide),)), Op("type", (base, wide))


def _narrowed(expression: Any) -> tuple[Any, bool]:
    """The expression without a cast to the input's dtype, and whether there was one."""
    dtype = Op("getattr", (Input(0), "dtype"))
    match expression:
        case Op("to" | "type", (inner, target), ()) if target in (dtype, Input(0)):
            return inner, True
        case Op("to", (inner,), (("dtype", target),)) if target == dtype:
            return inner, True
        case Op("type_as", (inner, Input(0)), ()):
            return inner, True
    return expression, False


def _scale(factor: Any) -> tuple[str, float, bool] | None:
    """(weight, offset, widened) where a factor is the weight, or 1 + the weight."""
    match factor:
        case Own(name):
            return name, 0.0, False
        case Op("add", operands, ()):
            for one, weight in _orders(operands):
                found = _scale(weight) if one == 1 and not isinstance(one, bool) else None
                if found is not None:
                    return found[0], 1.0, found[2]
        case Op(_, (Own(name), *_)) if factor in _widenings(Own(name)):
            return name, 0.0, True
    return None


def _orders(operands: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    """Both orders of the operands of a sum or a product; of anything else none."""
    if len(operands) == 2:
        yield operands[0], operands[1]
        yield operands[1], operands[0]
