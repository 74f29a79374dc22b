"""Norms that a class spells out in torch operations, and the residual block dropout-add-LayerNorm.

SpelledNorm     weight * x / sqrt(mean(x^2) + eps), as Llama, Gemma and most decoders have it, or LayerNorm; in torch's
                functions layer_norm and rms_norm, too
GatedNorm       norm(x) * silu(gate), as Qwen3-Next has it
ResidualNorm    norm(dropout(linear(x)) + residual), as BERT has it

What a class's forward computes is read by `fastattn.swap.expression`; which expressions are norms is said in
`norm_spellings`.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.functional import layer_norm, rms_norm
from fastattn.graphs import constant
from fastattn.nn.checks import (
    FLOATS,
    full_name,
    why_not_dropout,
    why_not_eps,
    why_not_input,
    why_not_linear,
    why_not_tensor,
)
from fastattn.nn.counting import note_call, note_choice, note_fallback
from fastattn.nn.norm import AS_FAST, torch_is_as_fast, why_not_layer_norm
from fastattn.nn.sublayers import add_and_normalise
from fastattn.swap.expression import Call, Expression, Input, Op, Own, Spelling, spelling_of, spellings_of
from fastattn.swap.reading import FLAGGED, ReadForward, Reading, attribute, spelled_as, why_not_as_read
from fastattn.swap.recipe import Recipe, always
from fastattn.swap.recipes.linear import linear
from fastattn.swap.recipes.norm_spellings import GatedNames, NormNames, gated_names, norm_names, orders, shape_of
from fastattn.swap.swapped import Swapped


class _Norm(ReadForward):
    """(x - mean or x) / sqrt(variance + eps) * (weight + offset) + bias, x (..., N). Halves are rounded once, at the
    end."""

    def fastattn_norm_of(self, x: Tensor, names: NormNames) -> Tensor | str:
        """The norm, or why the original is to run."""
        weight = None if names.weight is None else getattr(self, names.weight)
        bias = None if names.bias is None else getattr(self, names.bias)
        eps = attribute(self, names.eps)
        reason = why_not_as_read(self) or why_not_input(x, self.fastattn_backend)
        reason = reason or _why_not(x, weight, bias, eps, names)
        if reason is None and names.function is not None:
            if names.centred and torch_is_as_fast(x, weight, bias, self.fastattn_backend):
                return AS_FAST  # what the function takes and refuses is its to say
            reason = _why_not_for_torch(self, x, bias if weight is None else weight, names)
        if reason is not None:
            return reason
        if x.is_contiguous():
            return self.fastattn_normalise(x, weight, bias, eps, names)
        order = _order_in_memory(x)
        if order is None:
            return "its input does not lie in rows, its last dimension innermost"
        # The original's result lies in memory as its input does.
        y = self.fastattn_normalise(x.permute(order).contiguous(), weight, bias, eps, names)
        return y.permute(sorted(range(y.dim()), key=order.__getitem__))

    def fastattn_normalise(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, names: NormNames
    ) -> Tensor:
        """The norm of a contiguous tensor."""
        result_dtype = x.dtype
        if weight is not None and weight.dtype is not x.dtype:
            wide = torch.promote_types(x.dtype, weight.dtype)
            result_dtype = {"input": x.dtype, "weight": weight.dtype, "wide": wide}[names.dtype]
            weight = weight.to(torch.float32)
            bias = None if bias is None else bias.to(torch.float32)
            x = x.to(torch.promote_types(x.dtype, result_dtype))
        if names.centred:
            if weight is not None and names.offset:
                weight = weight.to(torch.float32) + names.offset  # which this kernel does not add
            y = layer_norm(x, weight, bias, eps, backend=self.fastattn_backend)
        else:
            y = rms_norm(x, weight, eps, offset=names.offset, backend=self.fastattn_backend)
        return y if y.dtype is result_dtype else y.to(result_dtype)


class SpelledNorm(_Norm):
    """A norm."""

    fastattn_norms: ClassVar[tuple[tuple[Spelling, NormNames], ...]]
    """One for each value of the flags that the original branches on."""

    def fastattn_forward(self, *inputs: Any) -> Tensor:
        note_call(self)
        (x,) = inputs
        names = _names(self, self.fastattn_norms)
        y = FLAGGED if names is None else self.fastattn_norm_of(x, names)
        if isinstance(y, Tensor):
            return y
        if y == AS_FAST:
            note_choice(self, y)
        else:
            note_fallback(self, y)
        return super().forward(x)  # type: ignore[misc, no-any-return]


class GatedNorm(_Norm):
    """norm(x) * silu(gate), x (..., N): the product is torch's, in the dtypes of the original."""

    fastattn_gated: ClassVar[GatedNames]

    def fastattn_forward(self, *inputs: Any) -> Tensor:
        note_call(self)
        x, gate = inputs
        names = self.fastattn_gated
        reason = why_not_input(gate, self.fastattn_backend) or _why_not_silu(self, names.activation)
        y = reason or self.fastattn_norm_of(x, names.norm)
        if isinstance(y, str):
            note_fallback(self, y)
            return super().forward(x, gate)  # type: ignore[misc, no-any-return]
        y = y * F.silu(gate.to(torch.float32) if names.widened else gate)
        return y.to(x.dtype) if names.narrowed else y


def _why_not_silu(module: nn.Module, name: str | None) -> str | None:
    chosen = None if name is None else getattr(module, name)
    return None if name is None or _is_silu(chosen) else f"its {name} is {chosen!r}"


@constant
def _is_silu(name: object) -> bool:
    """Whether this is silu's name in the table of transformers, which others may write to."""
    activations = sys.modules["transformers.activations"]
    return name in ("silu", "swish") and dict.get(activations.ACT2FN, name) in (nn.SiLU, activations.SiLUActivation)


def _names(module: nn.Module, norms: tuple[tuple[Spelling, NormNames], ...]) -> NormNames | None:
    """How the module spells its norm with the flags that it has now."""
    seen: dict[str, Any] = {}
    for spelling, names in norms:
        if spelling.holds_for(module, seen):
            return names
    return None


def _order_in_memory(x: Tensor) -> tuple[int, ...] | None:
    """The dimensions before the last, from the outermost in memory to the innermost, and the last; None where in this
    order x is not rows that follow one another, with gaps or without."""
    last = x.dim() - 1
    outer: list[int] = []
    for dim in range(last):  # sorted by comparisons alone: Dynamo sorts by no stride that it leaves open
        place = len(outer)
        while place and x.stride(outer[place - 1]) < x.stride(dim):
            place -= 1
        outer.insert(place, dim)
    order = (*outer, last)
    if x.shape[last] > 1 and x.stride(last) != 1:
        return None
    reach = x.shape[last]  # of the dimensions further in
    for dim in reversed(order[:-1]):
        if x.shape[dim] > 1:
            if x.stride(dim) < reach:
                return None  # rows that overlap, as those of an expanded tensor do
            reach += x.stride(dim) * (x.shape[dim] - 1)
    return order


def _why_not(x: Any, weight: Any, bias: Any, eps: object, names: NormNames) -> str | None:
    reason = why_not_tensor("weight", weight) or why_not_tensor("bias", bias)
    reason = reason or _why_not_eps(eps, names)
    if reason is not None:
        return reason
    if x.dim() == 0:
        return "the input has no dimension"
    if not names.widened and x.is_cuda and torch.is_autocast_enabled("cuda"):
        return "autocast widens its statistics, and with them the result"
    for name, own, tensor in (("weight", names.weight, weight), ("bias", names.bias, bias)):
        if tensor is None:
            if own is not None and (names.function is None or names.offset or names.widened_weight):
                return f"its {name} is None"
        elif tensor.dtype not in FLOATS:
            return f"its {name} is {str(tensor.dtype).removeprefix('torch.')}"
        elif tensor.shape != x.shape[-1:]:
            return f"its {name} does not lie along the last dimension"
    if weight is not None and bias is not None and weight.dtype is not bias.dtype:
        return "its bias is of another dtype than its weight"
    return None


def _why_not_for_torch(module: nn.Module, x: Tensor, given: Tensor | None, names: NormNames) -> str | None:
    """The function of torch normalises over more, or refuses the dtype that weight and bias have, or promotes it."""
    if shape_of(names.shape, module, x) != tuple(x.shape[-1:]):
        return "it does not normalise over the last dimension alone"
    if given is None or names.widened_weight:
        return None
    mixes = names.of_float32 or names.function == "layer_norm"
    if (given.dtype is x.dtype and not names.of_float32) or (given.dtype is torch.float32 and mixes):
        return None
    return f"its weight is {str(given.dtype).removeprefix('torch.')}, which torch does not take here"


def _why_not_eps(eps: object, names: NormNames) -> str | None:
    if eps is None and names.function == "rms_norm":
        return None  # the machine epsilon
    return why_not_eps(eps)


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
    spellings = spellings_of(module_class)
    norms = tuple(
        (spelling, names)
        for spelling in spellings
        if len(spelling.inputs) == 1 and (names := norm_names(spelling.expression, spelling.flags)) is not None
    )
    if norms:
        return _spelled_norms(spellings, norms)
    spelling = spelling_of(module_class)
    if spelling is None or len(spelling.inputs) != 2:
        return None
    gated = gated_names(spelling.expression)
    if gated is not None:
        return _gated_norm(spelling, gated)
    children = _residual_norm(spelling.expression)
    return None if children is None else _residual(module_class, spelling, children)


def spelled_norm(spelling: Spelling, names: NormNames) -> Reading:
    """The reading of a class whose forward is known to be this norm."""
    return _spelled_norms((spelling,), ((spelling, names),))


def _spelled_norms(spellings: tuple[Spelling, ...], norms: tuple[tuple[Spelling, NormNames], ...]) -> Reading:
    kernels = {_kernel(names) for _, names in norms}

    def refuse(module: nn.Module) -> list[str]:
        names = _names(module, norms)
        assert names is not None
        return _refuse(module, names)

    attributes = spelled_as(norms[0][0])
    bases = tuple(dict.fromkeys(base for one in spellings for base in one.bases))
    attributes["fastattn_methods"] = {name: each for one in spellings for name, each in one.methods.items()}
    attributes["fastattn_bases"] = tuple((base, base.forward) for base in bases)
    return Reading(
        SpelledNorm,
        lambda swapped: Recipe(
            swapped,
            kernels={"norms": " or ".join(sorted(kernels))},
            misfit=lambda module: FLAGGED if _names(module, norms) is None else None,
            refuse=refuse,
        ),
        {"fastattn_norms": norms, **attributes},
    )


def _gated_norm(spelling: Spelling, gated: GatedNames) -> Reading:
    def refuse(module: nn.Module) -> list[str]:
        reason = _why_not_silu(module, gated.activation)
        return _refuse(module, gated.norm) if reason is None else [reason]

    return Reading(
        GatedNorm,
        lambda swapped: Recipe(swapped, kernels={"norms": _kernel(gated.norm)}, refuse=refuse),
        {"fastattn_gated": gated, **spelled_as(spelling)},
    )


def _kernel(names: NormNames) -> str:
    return "layer_norm" if names.centred else "rms_norm"


def _refuse(module: nn.Module, names: NormNames) -> list[str]:
    weight = None if names.weight is None else getattr(module, names.weight)
    if isinstance(weight, Tensor) and weight.dim() != 1:
        return [f"its weight has {weight.dim()} dimensions"]
    shape = None if names.function is None else shape_of(names.shape, module, None)
    if shape is not None and len(shape) != 1:
        return [f"it normalises over {len(shape)} dimensions"]
    bias = None if names.bias is None else getattr(module, names.bias)
    reason = why_not_tensor("weight", weight) or why_not_tensor("bias", bias)
    reason = reason or _why_not_eps(attribute(module, names.eps), names)
    return [] if reason is None else [reason]


def _residual(module_class: type[nn.Module], spelling: Spelling, children: tuple[str, str, str]) -> Reading:
    # The block that ends the feed-forward one is told by its name alone: BertOutput, not BertSelfOutput.
    part = "linears" if "Self" in module_class.__name__ or "Attention" in module_class.__name__ else "ffns"
    dense, dropout, norm = children

    def misfit(module: nn.Module) -> str | None:
        linear, layer_norm = getattr(module, dense), getattr(module, norm)
        if not hasattr(linear, "in_features"):
            return f"{dense} is a {full_name(linear)}, not a linear"
        return None if isinstance(layer_norm, nn.LayerNorm) else f"{norm} is a {full_name(layer_norm)}, not a LayerNorm"

    def recipe(swapped: type[Swapped]) -> Recipe:
        return Recipe(
            swapped,
            kernels={part: "linear", "norms": "dropout_add_layer_norm"},
            children=always(
                (dense, part, why_not_linear), (norm, "norms", why_not_layer_norm), (dropout, "norms", why_not_dropout)
            ),
            misfit=misfit,
        )

    attributes = {"fastattn_children": children, "fastattn_linear_part": part, **spelled_as(spelling)}
    return Reading(ResidualNorm, recipe, attributes)


def _residual_norm(expression: Expression) -> tuple[str, str, str] | None:
    """Call(norm, Call(dropout, Call(dense, x)) + residual)."""
    match expression:
        case Call(Own(norm), (Op("add", operands, ()),)):
            for first, second in orders(operands):
                match first:
                    case Call(Own(dropout), (Call(Own(dense), (Input(0),)),)) if second == Input(1):
                        return dense, dropout, norm
    return None
