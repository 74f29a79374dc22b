"""The parity rule: how far a backend's numbers may lie from the truth.

For every output and gradient x, with the maxima taken per batch entry and head (attention) or over the whole tensor,

    max|x - ref64| <= 2 max|eager - ref64| + 2 u(dtype) max|ref64| + 2^-20 max T

where ref64 is `fastattn.reference` in float64, eager is plain torch in the tested dtype (`fastattn.parity.eager`), u is
the unit roundoff and T is the same quantity with every factor replaced by its absolute value
(`fastattn.parity.magnitude`). NaN never passes, and an infinity passes only where ref64 holds the same infinity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TRUTHS_AGREE = 1e-10  # of T: what two float64 evaluations of one formula may differ by


@dataclass(frozen=True)
class ParityRow:
    """The verdict on one quantity. `worst_ratio` is error / bound where that is largest; up to 1 passes. `refused`: the
    backend's reasons not to run the check, where the row stands for no verdict."""

    name: str
    worst_ratio: float
    passed: bool
    where: str
    error: float = 0.0
    bound: float = 0.0
    refused: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.refused:
            return f"{self.name}: refused, {'; '.join(self.refused)}"
        return f"{self.name}: {'ok' if self.passed else 'FAILED'}, error / bound = {self.worst_ratio:.3g} {self.where}"


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: half the distance from 1 to the next larger number of the dtype."""
    return torch.finfo(dtype).eps / 2


def parity(
    name: str,
    result: Tensor,
    ref64: Tensor,
    eager: Tensor,
    magnitude: Tensor,
    *,
    group_dims: int = 0,
    dtype: torch.dtype | None = None,
) -> ParityRow:
    """Applies the rule of this module to one tensor.

    result: from the backend under test, any floating dtype. ref64, eager, magnitude (T): tensors of the same shape.
    group_dims: how many leading dimensions are judged entry by entry (2 for attention: batch and head). dtype: gives u
    where that is not the result's own dtype, as for the gradient of a float32 weight beside half inputs.
    """
    if result.shape != ref64.shape:
        return verdict(name, f"shape {tuple(result.shape)} instead of {tuple(ref64.shape)}")
    if result.numel() == 0:
        return ParityRow(name, 0.0, True, "(empty)")
    x, ref, base = (t.detach().to(torch.float64) for t in (result, ref64, eager))
    infinite = ref.isinf()
    error = torch.where(infinite, torch.where(x == ref, 0.0, math.inf), (x - ref).abs()).nan_to_num(
        nan=math.inf, posinf=math.inf
    )
    # Where eager itself overflowed it is no yardstick; it must not make the bound infinite.
    eager_error = (base - ref).abs().masked_fill(infinite | ~base.isfinite(), 0.0)

    def largest(t: Tensor) -> Tensor:
        return t.reshape(math.prod(t.shape[:group_dims]), -1).amax(dim=1)

    bound = (
        2 * largest(eager_error)
        + 2 * unit_roundoff(dtype or result.dtype) * largest(ref.abs().masked_fill(infinite, 0.0))
        + 2.0**-20 * largest(magnitude.detach().masked_fill(infinite, 0.0))
    )
    group_error = largest(error)
    ratio = torch.where(group_error == 0, 0.0, group_error / bound).nan_to_num(nan=math.inf, posinf=math.inf)
    group = int(ratio.argmax())
    worst, limit = float(ratio[group]), float(bound[group])
    flat = group * (x.numel() // ratio.numel()) + int(error.reshape(ratio.numel(), -1)[group].argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), x.shape)]
    got, want = float(x.flatten()[flat]), float(ref.flatten()[flat])
    where = f"at {index}: {got:.9g}, truth {want:.9g}, bound {limit:.3g}"
    return ParityRow(name, worst, worst <= 1.0, where, float(group_error[group]), limit)


def verdict(name: str, trouble: str | None) -> ParityRow:
    """A yes-or-no row: `trouble` is the sentence that makes it fail."""
    return ParityRow(name, math.inf if trouble else 0.0, trouble is None, trouble or "")


def refusal(name: str, reasons: Sequence[str]) -> ParityRow:
    """A row without a verdict: the backend refuses this check, but not the case that it belongs to."""
    return ParityRow(name, 0.0, True, "", refused=tuple(reasons))


def agreement(rows: Sequence[tuple[str, Tensor, Tensor, Tensor]]) -> ParityRow:
    """One row for float64 reference against float64 eager: (name, reference, eager, T) each."""
    worst, where = 0.0, ""
    for name, ref, eager, magnitude in rows:
        if ref.numel() == 0:
            continue
        gap = torch.where(ref == eager, 0.0, (ref - eager).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
        scale = torch.where(ref.isinf(), 0.0, ref.abs()).amax() + magnitude.amax()
        ratio = 0.0 if float(gap.amax()) == 0 else float(gap.amax() / (_TRUTHS_AGREE * scale))
        if not ratio <= worst:
            worst, where = ratio, f"{name}: differs by {float(gap.amax()):.3g}"
    return ParityRow("float64 truths agree", worst, worst <= 1.0, where)
