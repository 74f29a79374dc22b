"""Which products are those of queries and keys, and which those of weights and values."""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.swap.deferred.scores import CannotAttend, Part, Scores, attend, may_be_attended
from fastattn.swap.deferred.tensor import PLAIN, Deferred, Function, Step, deferred, made, running

_FIRST_SCORES, _FIRST_KEYS = 1_000_000, 350
"""The least scores, and keys, with which attention pays where channels come before positions, so that queries, keys,
values and the output are turned over. Time of the original over that of the swapped module, two runs, one thread of an
Intel Xeon with AMX shared with others, float32, head dims 32 and 64, 2026-11-29:
                             inference       training step
    1 x 8 heads x 360        1.81, 1.03      1.64, 1.11
    1 x 4 x 500              1.63, 1.03      1.45, 1.18
    1 x 2 x 720              1.11, 1.08      1.06, 1.13
    4 x 3 x 320              0.92, 0.93      1.38, 0.91
    16 x 4 x 128             0.83, 0.89      1.06, 0.85
Fewer scores: 1 x 4 x 400 took 0.89 and 0.97 (one run), 1 x 2 x 400 0.78 and 0.84; more: 1 x 4 x 1,600 3.69 and 2.84."""

_BMMS = (torch.bmm, Tensor.bmm)
MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, *_BMMS)


# ---- queries and keys ------------------------------------------------------------------------------------------------


def _matmul(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 2 or kwargs:
        return NotImplemented
    q, transposed = args
    if not _are_plain(q, transposed) or q.dim() != transposed.dim() or not 3 <= q.dim() <= 6:
        return NotImplemented
    if function in _BMMS and (q.dim() != 3 or q.shape[0] != transposed.shape[0]):
        return NotImplemented
    # Keys turned over as they are wherever they come from heads, or queries where channels come first; values are not.
    k = transposed.transpose(-2, -1)
    if running.deferral is not None and k.shape in running.deferral.left_first:
        return NotImplemented
    if _is_turned(transposed) or 1 in transposed.shape[-2:] or _was_turned(transposed):
        return _defer(q, k, function, args)
    return _defer(q, k, function, args, channels_first=True) if _is_turned(q) else NotImplemented


def _is_turned(t: Tensor) -> bool:
    return t.stride(-2) == 1 and t.stride(-1) != 1


def _was_turned(t: Tensor) -> bool:
    return running.deferral is not None and any(each() is t for each in running.deferral.turned)


def _contiguous(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Notes a copy of what may be keys: their product with queries is one with keys that lie as they did."""
    if len(args) != 1 or kwargs or not _are_plain(*args) or args[0].dim() < 3 or not _is_turned(args[0]):
        return NotImplemented
    copy = args[0].contiguous()
    if running.deferral is not None:
        running.deferral.turned.append(weakref.ref(copy))
    return copy


def _baddbmm(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """beta * added + alpha * q k^T."""
    if len(args) != 3 or not set(kwargs) <= {"beta", "alpha"} or not all(map(is_number, kwargs.values())):
        return NotImplemented
    added, q, transposed = args
    if not _are_plain(q, transposed) or q.dim() != 3 or transposed.dim() != 3 or type(added) not in PLAIN:
        return NotImplemented
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    k = transposed.transpose(-2, -1)
    if not can_be_added(added, (*q.shape[:-1], k.shape[-2]), q.dtype) or added.dtype != q.dtype:
        return NotImplemented
    return _defer(q, k, function, args, kwargs, (added, float(beta)) if beta else None, float(alpha))


def _einsum(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    operands = args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if len(operands) != 2 or kwargs or not isinstance(args[0], str) or not _are_plain(*operands):
        return NotImplemented
    first, second = operands
    plan = _scores_plan(args[0], first.dim(), second.dim())
    if plan is None:
        return NotImplemented
    return _defer(plan.first(first), plan.second(second), function, (args[0], first, second))


def _defer(
    q: Tensor,
    k: Tensor,
    function: Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    added: tuple[Tensor, float] | None = None,
    scale: float = 1.0,
    *,
    channels_first: bool = False,
) -> Any:
    deferral = running.deferral
    if deferral is None or not may_be_attended(q, k) or not deferral.defers_here():
        return NotImplemented
    if q.shape[:-2] == k.shape[:-2]:
        lead = tuple(q.shape[:-2])
    else:
        try:
            lead = tuple(torch.broadcast_shapes(q.shape[:-2], k.shape[:-2]))
        except RuntimeError:  # which the product raises, too
            return NotImplemented
    entries = q.shape[-2] * k.shape[-2]
    for size in lead:
        entries *= size
    is_small = entries < deferral.smallest
    if channels_first and deferral.smallest:
        is_small = is_small or entries < _FIRST_SCORES or k.shape[-2] < _FIRST_KEYS
        if is_small:
            deferral.left_first.add((*lead, q.shape[-2], k.shape[-2]))
    if is_small:
        deferral.is_small = True
        return NotImplemented
    scores = Scores(q, k, (lead,), scale)
    if added is not None:
        scores = scores._replace(terms=(Part(added[0], lead, added[1]),))
    return deferred(scores, function, args, kwargs or {}, q.dtype)


def _are_plain(*tensors: object) -> bool:
    return all(type(t) in PLAIN and t.is_cpu and t.layout is torch.strided and not t.is_nested for t in tensors)  # type: ignore[attr-defined]


def is_number(value: object) -> bool:
    """NumPy's float64, as of np.sqrt, is a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def can_be_added(added: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a tensor broadcasts to scores of this shape, is of their dtype or float32, and plain."""
    return (
        _are_plain(added)
        and (added.dtype is dtype or added.dtype is torch.float32)
        and added.dim() <= len(shape)
        and all(n in (1, m) for n, m in zip(reversed(added.shape), reversed(shape), strict=False))
    )


PRODUCTS: dict[Any, Step] = {
    **dict.fromkeys(MATMULS, _matmul),
    torch.einsum: _einsum,
    torch.baddbmm: _baddbmm,
    Tensor.baddbmm: _baddbmm,
    Tensor.contiguous: _contiguous,
}
"""What a Deferral looks at."""


# ---- weights and values ----------------------------------------------------------------------------------------------


def weighted(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A step: the product of deferred weights and values, or of values and weights, both turned over."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    are_turned = not isinstance(args[0], Deferred)
    values, weights = args if are_turned else args[::-1]
    if not _are_plain(values) or values.dim() < 2:
        return NotImplemented
    if function in _BMMS and (values.dim() != 3 or values.shape[0] != weights.size(0)):
        return NotImplemented
    out = _attend(weights, values, are_turned)
    return function(*map(made, args)) if out is None else out


def weighted_einsum(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A step: that, spelled as an einsum."""
    operands = args[1:]
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if len(operands) != 2 or kwargs or not isinstance(args[0], str):
        return NotImplemented
    weights, values = operands
    if not isinstance(weights, Deferred) or not _are_plain(values):
        return NotImplemented
    plan = _values_plan(args[0], weights.dim(), values.dim())
    if plan is None:
        return NotImplemented
    out = _attend(weights, plan.second(values))
    if out is None:
        return function(args[0], weights.node.make(), values)
    return out if out is NotImplemented else plan.result(out)  # einsum's results may lie in any way


def _attend(weights: Deferred, values: Tensor, are_turned: bool = False) -> Any:
    """The product by attention; None where torch's own is as fast. are_turned: values and weights, and the product."""
    node, deferral = weights.node, running.deferral
    if node.is_made or not node.scores.is_softmaxed or node.tracks != torch.is_grad_enabled():
        return NotImplemented
    if node.scores.is_turned != are_turned:
        return NotImplemented
    values = values.transpose(-2, -1) if are_turned else values
    if deferral is None or node.dtype != node.scores.q.dtype or not deferral.defers_here():
        return NotImplemented
    if values.shape[-2] != node.scores.k.shape[-2]:
        return NotImplemented  # and an error
    if deferral.smallest and _has_small_learned_bias(node.scores, node.tracks):
        deferral.is_small = True
        return None
    node.check()
    try:
        out = attend(node.scores, values, deferral.backend)
    except CannotAttend as why:
        deferral.reason = deferral.reason or str(why)
        return NotImplemented
    deferral.attended += 1
    # Its backward reads the output, which a product's does not: the forward may write to what it gets.
    if are_turned:
        return out.transpose(-2, -1).clone(memory_format=torch.contiguous_format)
    return deferral.keep(out.clone() if out.requires_grad else out)


_FEW_KEYS = 64


def _has_small_learned_bias(scores: Scores, tracks: bool) -> bool:
    """Gradients of a bias, summed over the batch, take with so few keys what is gained else: windows of Swin. With
    dropout such a call is torch's without gradients too: they may be those of a checkpoint, which is run again."""
    if scores.k.shape[-2] >= _FEW_KEYS or not scores.terms:
        return False
    return scores.dropout_p > 0.0 or (tracks and any(part.tensor.requires_grad for part in scores.terms))


# ---- einsum ----------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How the operands of an einsum lie as (..., rows, columns) that broadcast, and its result does.

    Of each: the order of its dimensions, and where dimensions of size 1 are put.
    """

    of_first: tuple[int, ...]
    new_in_first: tuple[int, ...]
    of_second: tuple[int, ...]
    new_in_second: tuple[int, ...]
    of_result: tuple[int, ...]

    def first(self, t: Tensor) -> Tensor:
        return _arranged(t, self.of_first, self.new_in_first)

    def second(self, t: Tensor) -> Tensor:
        return _arranged(t, self.of_second, self.new_in_second)

    def result(self, t: Tensor) -> Tensor:
        return t if self.of_result == tuple(range(t.dim())) else t.permute(self.of_result)


def _arranged(t: Tensor, order: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    t = t if order == tuple(range(t.dim())) else t.permute(order)
    for position in new:
        t = t.unsqueeze(position)
    return t


@functools.lru_cache(maxsize=256)
def _scores_plan(equation: str, first: int, second: int) -> Plan | None:
    """q (batch..., i, c) and k (batch..., j, c), for scores that come out as (batch..., i, j)."""
    found = _letters(equation, first, second)
    if found is None:
        return None
    q, k, out = found
    summed = [c for c in q if c in k and c not in out]
    if len(summed) != 1 or len(out) < 3:
        return None
    lead, i, j = out[:-2], out[-2], out[-1]
    if i not in q or i in k or j not in k or j in q or set(q + k) != {*out, *summed}:
        return None
    of_q, new_q = _order(q, lead, i + summed[0])
    of_k, new_k = _order(k, lead, j + summed[0])
    return Plan(of_q, new_q, of_k, new_k, ())


@functools.lru_cache(maxsize=256)
def _values_plan(equation: str, first: int, second: int) -> Plan | None:
    """Weights (batch..., i, j), as they are, and values (batch..., j, c)."""
    found = _letters(equation, first, second)
    if found is None:
        return None
    weights, values, out = found
    lead, i, j = weights[:-2], weights[-2], weights[-1]
    own = [c for c in values if c not in weights]
    if len(own) != 1 or j not in values or i in values or set(out) != {*lead, i, own[0]}:
        return None
    of_values, new_values = _order(values, lead, j + own[0])
    result = lead + i + own[0]
    return Plan((), (), of_values, new_values, tuple(result.index(c) for c in out))


def _letters(equation: str, first: int, second: int) -> tuple[str, str, str] | None:
    """The three subscripts, where each is of distinct letters and has one for each dimension."""
    equation = equation.replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    one, comma, other = inputs.partition(",")
    if not arrow or not comma or "," in other:
        return None
    if "..." in equation:
        if not all(part.startswith("...") for part in (one, other, out)):
            return None
        one, other, out = one[3:], other[3:], out[3:]
        if first - len(one) != second - len(other):
            return None
        dots = "".join(c for c in "ABCDEFGH" if c not in equation)[: first - len(one)]
        one, other, out = dots + one, dots + other, dots + out
    known = all(part.isalpha() and len(set(part)) == len(part) for part in (one, other, out))
    return (one, other, out) if known and len(one) == first and len(other) == second else None


def _order(letters: str, lead: str, last: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The dimensions of `letters` as those of `lead` and `last` in turn, and which of these are missing."""
    wanted = lead + last
    return (
        tuple(letters.index(c) for c in wanted if c in letters),
        tuple(i for i, c in enumerate(wanted) if c not in letters),
    )
