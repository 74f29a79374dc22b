"""What is known of attention scores that nobody has computed, and their product with values."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.functional import attention
from fastattn.functional.attention import MAX_HEAD_DIM
from fastattn.functional.checks import FLOATS
from fastattn.masks import Causal

Lead = tuple[int, ...]
"""The dimensions of scores before the last two."""

HUGE = -1e8
"""Scores that are replaced by a number below this get no weight beside any other: float32 has steps of 8 there. Above
it that is made sure of by a bound of the other scores."""

_UNDERFLOW = 200.0
"""exp(-200) is 0 in float32."""

_ENTRIES_OF_CAUSAL = 1 << 24


class Part(NamedTuple):
    """A tensor that broadcasts to the scores as they were shaped when it was added, or hid keys."""

    tensor: Tensor
    lead: Lead
    factor: float = 1.0


class Scores(NamedTuple):
    """scale * q k^T + the terms, `fill` where a key is hidden; or, softmaxed, the weights that these give.

    q (..., Sq, D), k (..., Skv, D); leads: all the shapes that the leading dimensions have had, the present one last.
    seeds: that of the dropout, once it was drawn; all copies share the list. is_turned: the last two dimensions have
    changed places; nothing but a product with values takes such weights.
    """

    q: Tensor
    k: Tensor
    leads: tuple[Lead, ...]
    scale: float = 1.0
    terms: tuple[Part, ...] = ()
    hidden: tuple[Part, ...] = ()
    fill: float | None = None
    is_softmaxed: bool = False
    dropout_p: float = 0.0
    seeds: tuple[list[Tensor], ...] = ()
    is_turned: bool = False

    @property
    def shape(self) -> Lead:
        rows, columns = self.q.shape[-2], self.k.shape[-2]
        return (*self.leads[-1], columns, rows) if self.is_turned else (*self.leads[-1], rows, columns)


class CannotAttend(Exception):
    """The reason why attention would not give what the scores and the values do."""


def attend(scores: Scores, values: Tensor, backend: str | None) -> Tensor:
    """The product of weights and values, which may not be contiguous. Raises CannotAttend."""
    q, k, lead = scores.q, scores.k, scores.leads[-1]
    _check(scores, values)
    wide = max(scores.leads, key=len)
    q, k, v = (_beside(t, at, wide) for t, at in ((q, scores.leads[0]), (k, scores.leads[0]), (values, lead)))
    terms = [(_beside(part.tensor, part.lead, wide), part.factor) for part in scores.terms]
    hidden = None
    for part in scores.hidden:
        tensor = _beside(part.tensor, part.lead, wide)
        hidden = tensor if hidden is None else hidden | tensor
    if hidden is not None and scores.fill != -math.inf:
        q, hidden = _replaced(scores, q, hidden)
    if len(wide) == 1:
        wide, q, k, v = (1, *wide), q[None], k[None], v[None]
        terms = [(term[None], factor) for term, factor in terms]
        hidden = None if hidden is None else hidden[None]
    shared = 1 if k.shape[-3] == v.shape[-3] == 1 else wide[-1]  # heads of keys and values
    q, k, v = _flat(q, wide, wide[-1]), _flat(k, wide, shared), _flat(v, wide, shared)
    bias = _sum([(_flat(term, wide), factor) for term, factor in terms], q.dtype)
    mask: Tensor | Causal | None = None
    if hidden is not None:
        hidden = _flat(hidden, wide)
        mask = Causal() if _is_causal(hidden, q, k, True) else ~hidden
    elif bias is not None and not bias.requires_grad and _is_causal(bias, q, k, float(bias[0, 0, 0, -1])):
        mask, bias = Causal(), None
    seed = None
    if scores.dropout_p:
        (seeds,) = scores.seeds
        seed = seeds[0] if seeds else torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
        seeds[:] = [seed]
    # Outputs lie as (B, Sq, H, Dv) in memory: with one of B and H of one entry that is contiguous either way.
    turn = q.shape[0] == 1 and q.shape[1] == k.shape[1] and q.shape[1] > 1 and len(lead) != 2
    if turn:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        bias = None if bias is None else bias.transpose(0, 1)
        mask = mask.transpose(0, 1) if isinstance(mask, Tensor) else mask
    out = attention(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        scale=scores.scale,
        dropout_p=scores.dropout_p,
        dropout_seed=seed,
        backend=backend,
    )
    out = out.transpose(0, 1) if turn else out
    return out if out.shape[:-2] == lead else out.reshape(*lead, *out.shape[-2:])


def drawn_weights(scores: Scores, backend: str | None) -> Tensor:
    """Weights after the dropout that their product with values had: that with columns of the identity."""
    size = scores.k.shape[-2]
    identity = torch.eye(size, dtype=scores.q.dtype, device=scores.q.device)
    weights = torch.cat([attend(scores, part, backend) for part in identity.split(MAX_HEAD_DIM, dim=-1)], dim=-1)
    return weights.transpose(-2, -1) if scores.is_turned else weights


def _check(scores: Scores, v: Tensor) -> None:
    q, lead = scores.q, scores.leads[-1]
    if v.dtype != q.dtype:
        raise CannotAttend(f"values are {v.dtype} beside queries of {q.dtype}")
    if v.dim() < 2 or v.shape[-2] != scores.k.shape[-2] or not 1 <= v.shape[-1] <= MAX_HEAD_DIM:
        raise CannotAttend(f"values have shape {tuple(v.shape)}")
    if v.dim() - 2 > len(lead) or any(n not in (1, m) for n, m in zip(v.shape[-3::-1], lead[::-1], strict=False)):
        raise CannotAttend("values have more heads than the weights")
    if scores.fill is not None and (scores.scale <= 0 or math.isnan(scores.fill)):
        raise CannotAttend("scores are scaled by a number that is not positive")


def _beside(t: Tensor, lead: Lead, wide: Lead) -> Tensor:
    """t, which broadcasts beside `lead`, as it does beside `wide`: the same dimensions, some of them split."""
    sizes = (1,) * (len(lead) + 2 - t.dim()) + tuple(t.shape)
    if lead == wide:
        return t if len(sizes) == t.dim() else t.reshape(sizes)
    result: list[int] = []
    position = 0
    for size, full in zip(sizes[:-2], lead, strict=True):
        start, product = position, 1
        while product < full and position < len(wide):
            product *= wide[position]
            position += 1
        if product != full:
            raise CannotAttend("scores are viewed in two shapes of which neither splits the other")
        result += wide[start:position] if size == full else (1,) * (position - start)
    if any(size != 1 for size in wide[position:]):
        raise CannotAttend("scores are viewed in two shapes of which neither splits the other")
    return t.reshape(*result, *wide[position:], *sizes[-2:])


def _flat(t: Tensor, wide: Lead, heads: int | None = None) -> Tensor:
    """t, beside the leading dimensions `wide`, with four dimensions: expanded to these with so many heads, or as few
    entries as may be."""
    front = wide[:-1]
    if heads is not None:
        t = t if t.shape[:-2] == (*front, heads) else t.expand(*front, heads, *t.shape[-2:])
    elif len(front) > 1 and any(size != 1 for size in t.shape[: len(front)]):
        t = t.expand(*front, *t.shape[-3:])
    return t if len(front) == 1 else t.flatten(0, len(front) - 1)


def _sum(terms: list[tuple[Tensor, float]], dtype: torch.dtype) -> Tensor | None:
    """All that is added to the scores. Several halves are added in float32."""
    total = None
    for term, factor in terms:
        part = (
            term if len(terms) == 1 and factor == 1.0 else term.to(torch.promote_types(dtype, torch.float32)) * factor
        )
        total = part if total is None else total + part
    return total if total is None or total.dtype in (dtype, torch.float32) else total.to(dtype)


def _replaced(scores: Scores, q: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and hidden keys by which scores that a finite number has replaced get the weights that they had.

    Beside another key they have none. Of a query that sees no other key all are alike: its scores become 0.
    """
    fill = scores.fill
    assert fill is not None
    if (scores.terms or fill > HUGE) and not _bound(scores) + _UNDERFLOW < -fill:
        raise CannotAttend(f"scores are replaced by {fill}, which others may be as low as")
    lonely = hidden.all(-1, keepdim=True)
    if not lonely.any():
        return q, hidden
    if scores.terms:
        raise CannotAttend("a query sees no key, and a bias is added")
    return q.masked_fill(lonely, 0.0), hidden & ~lonely


def _bound(scores: Scores) -> float:
    """No score is larger. inf or NaN where none can be said."""
    largest = scores.q.shape[-1] * _largest(scores.q) * _largest(scores.k) * abs(scores.scale)
    return largest + sum(abs(part.factor) * _largest(part.tensor) for part in scores.terms)


def _largest(t: Tensor) -> float:
    return float(t.detach().abs().amax())


def _is_causal(t: Tensor, q: Tensor, k: Tensor, outside: bool | float) -> bool:
    """Whether t is `outside`, which hides a key, above the diagonal that ends in the last corner, and 0 elsewhere."""
    rows, columns = q.shape[2], k.shape[2]
    if t.shape != (1, 1, rows, columns) or not 1 < rows <= columns or rows * columns > _ENTRIES_OF_CAUSAL:
        return False
    if outside is not True and not outside <= HUGE:
        return False
    return torch.equal(t[0, 0], _causal(rows, columns, t.dtype, outside, t.device))


@functools.lru_cache(maxsize=4)
def _causal(rows: int, columns: int, dtype: torch.dtype, outside: bool | float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        above = torch.ones(rows, columns, dtype=torch.bool, device=device).triu(1 + columns - rows)
        if outside is True:
            return above
        return torch.zeros(rows, columns, dtype=dtype, device=device).masked_fill(above, outside)


def may_be_attended(q: Tensor, k: Tensor) -> bool:
    """Whether there are kernels for queries and keys such as these."""
    return (
        q.dtype in FLOATS
        and k.dtype == q.dtype
        and 1 <= q.shape[-1] <= MAX_HEAD_DIM
        and q.numel() > 0
        and k.numel() > 0
        and k.shape[-1] == q.shape[-1]
    )
