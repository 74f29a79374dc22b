"""Linears that a class spells out, as a product, or with its tensors cast to the input's dtype, as whisper's of OpenAI:

    x @ self.weight.T, x @ self.weight.T + self.bias
    F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

Where the dtypes agree, the casts do nothing, and the module is a linear like torch's own: alone or in a block.

Whisper of the smallest size, 15 s of sound and 20 tokens, float32, one thread: 208 ms, with these linears left 184,
swapped 107 (one core of an AMD EPYC of Zen 5, AVX-512, torch 2.13.0, 2026-11-27).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fastattn.graphs import constant
from fastattn.swap.expression import Expression, Input, Op, Own, spellings_of
from fastattn.swap.reading import calls_forward_as_it_is

_read: dict[type[nn.Module], tuple[object, bool]] = {}


@constant
def is_spelled_linear(kind: type) -> bool:
    """Whether a class of modules is such a linear; read again where its forward was replaced since."""
    if not issubclass(kind, nn.Module) or kind.__module__.startswith("torch."):
        return False
    forward, found = _read.get(kind, (None, False))
    if forward is not kind.forward:
        found = calls_forward_as_it_is(kind) and _is_spelled(kind)
        _read[kind] = kind.forward, found
    return found


def _is_spelled(kind: type[nn.Module]) -> bool:
    spellings = spellings_of(kind)
    return bool(spellings) and all(
        set(dict(each.nones)) <= {"bias"}
        and not each.flags
        and len(each.methods) == 1
        and _is_linear(each.expression, dict(each.nones).get("bias", False))
        for each in spellings
    )


def _is_linear(expression: Expression, without_bias: bool) -> bool:
    if without_bias and _is_product(expression):
        return True
    match expression:
        case Op("add", (one, other), ()) if not without_bias:
            biases = _forms("bias")
            return (_is_product(one) and other in biases) or (_is_product(other) and one in biases)
        case Op("linear", (Input(0), weight, *rest), options) if not (rest and options):
            given = [*rest, *(value for name, value in options if name == "bias")]
            bias = given[0] if len(given) == 1 else None
            is_bias = bias is None if without_bias else bias in _forms("bias")
            return weight in _forms("weight") and is_bias and len(given) + 2 == len((*expression.operands, *options))
    return False


def _is_product(expression: Any) -> bool:
    """x W^T."""
    match expression:
        case Op("matmul", (Input(0), Op(_, (weight, *_), _) as turned), ()) if weight in _forms("weight"):
            return turned in _turned(weight)
        case Op("linear", (Input(0), weight), ()):
            return weight in _forms("weight")
    return False


def _turned(weight: Any) -> tuple[Op, ...]:
    """The transpose of a matrix."""
    by_name = (Op("getattr", (weight, "T")), Op("getattr", (weight, "mT")), Op("t", (weight,)))
    return *by_name, *(Op("transpose", (weight, *dims)) for dims in ((0, 1), (1, 0), (-1, -2), (-2, -1)))


def _forms(name: str) -> tuple[Any, ...]:
    """A parameter as it is, or cast to the input's dtype."""
    own, dtype = Own(name), Op("getattr", (Input(0), "dtype"))
    return own, Op("to", (own, dtype)), Op("to", (own,), (("dtype", dtype),)), Op("type_as", (own, Input(0)))
