"""Biases that are functions of the distance from query to key: ALiBi, relative tables, T5's buckets.

The distance is the key's position minus the query's: j - (i + Skv - Sq) where align is "bottom-right", the default, and
j - i where it is "top-left". No Sq x Skv tensor is made of them, and their gradients are summed up inside the kernels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.biases.base import Bias
from fastattn.biases.lowered import LoweredBias, of_slopes, of_table
from fastattn.masks.arguments import Align, as_whole, check_align, describe
from fastattn.masks.lowered import Size
from fastattn.masks.positional import aligned


class _OfDistance(Bias):
    def __init__(self, name: str, tensor: Tensor, align: Align) -> None:
        super().__init__(name, tensor)
        check_align(align)
        self.align: Align = align

    def _distance(self, len_q: int, len_k: int) -> Tensor:
        """int64 (1, 1, len_q, len_k)."""
        offset = len_k - len_q if self.align == "bottom-right" else 0
        position = torch.arange(len_q, device=self.tensor.device) + offset
        return (torch.arange(len_k, device=self.tensor.device) - position.view(-1, 1))[None, None]

    def _check_heads(self, name: str, heads: int, size: Size, several: bool) -> None:
        if heads != size.heads and not (several and heads == 1):
            remedy = f"pass 1 or {size.heads}" if several else f"pass {size.heads}"
            raise ValueError(f"{type(self).__name__}: {name} is for {heads} heads, but q has {size.heads}: {remedy}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe(self.tensor)}{aligned(self.align)})"


class ALiBi(_OfDistance):
    """Attention with linear biases (Press et al., 2022): adds -slope * |distance|.

    slopes: float (Hq,), or (B, Hq), of any float dtype; used in float32. `ALiBi.standard(heads)` has the published
    ones. It receives a gradient. align: where queries sit. Raises ValueError or TypeError for other values.
    """

    def __init__(self, slopes: Tensor, align: Align = "bottom-right") -> None:
        super().__init__("slopes", slopes, align)
        if slopes.dim() not in (1, 2):
            raise ValueError(f"ALiBi: slopes has shape {tuple(slopes.shape)}: pass (Hq,) or (B, Hq)")

    @classmethod
    def standard(cls, heads: int, device: torch.device | str | None = None, align: Align = "bottom-right") -> ALiBi:
        """The published slopes: 2^(-8 i / n) for i = 1 to n, with n the largest power of two up to `heads`; further
        heads get every other one of those for 2 n."""
        heads = as_whole("ALiBi", "heads", heads, 1, "heads")
        n = 2 ** int(math.log2(heads))
        slopes = [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]
        slopes += [2.0 ** (-4.0 * i / n) for i in range(1, 2 * (heads - n), 2)]
        return cls(torch.tensor(slopes, device=device), align)

    def with_tensor(self, tensor: Tensor) -> ALiBi:
        return ALiBi(tensor, self.align)

    def to_dense(self, batch: int, heads: int, len_q: int, len_k: int) -> Tensor:
        rows = self.tensor if self.tensor.dim() == 2 else self.tensor[None]
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return of_slopes(rows, self._distance(len_q, len_k)).expand(batch, heads, len_q, len_k)

    def lower(self, size: Size, dtype: torch.dtype) -> LoweredBias:
        rows = self.tensor if self.tensor.dim() == 2 else self.tensor[None]
        self._check_heads("slopes", rows.shape[1], size, several=False)
        if rows.shape[0] not in (1, size.batch):
            raise ValueError(
                f"ALiBi: slopes has {rows.shape[0]} rows, but q a batch of {size.batch}: pass (Hq,) or (B, Hq)"
            )
        return LoweredBias(slopes=rows.to(dtype), top_left=self.align == "top-left")


class RelativeBias(_OfDistance):
    """A learned bias per distance and head, clipped at both ends: adds table[head, reach + clamp(distance, -reach,
    reach)].

    table: float (Hq, 2 * reach + 1), or (1, 2 * reach + 1) for all heads alike, of finite numbers in any float dtype;
    used in float32. It receives a gradient. align: where queries sit. Raises ValueError or TypeError for other values.
    """

    def __init__(self, table: Tensor, align: Align = "bottom-right") -> None:
        super().__init__("table", table, align)
        if table.dim() != 2 or table.shape[1] % 2 == 0:
            raise ValueError(
                f"RelativeBias: table has shape {tuple(table.shape)}: pass (Hq, 2 * reach + 1), an odd number of "
                "columns with distance 0 in the middle"
            )

    def with_tensor(self, tensor: Tensor) -> RelativeBias:
        return RelativeBias(tensor, self.align)

    def to_dense(self, batch: int, heads: int, len_q: int, len_k: int) -> Tensor:
        found = of_table(self.tensor, self._distance(len_q, len_k), -(self.tensor.shape[1] // 2))
        return found.expand(batch, heads, len_q, len_k)

    def lower(self, size: Size, dtype: torch.dtype) -> LoweredBias:
        rows, columns = self.tensor.shape
        self._check_heads("table", rows, size, several=True)
        return LoweredBias(table=self.tensor.to(dtype), first=-(columns // 2), top_left=self.align == "top-left")


class T5Bias(_OfDistance):
    """T5's relative position bias (Raffel et al., 2020): adds weight[bucket(distance), head]. T5 has scale=1.

    Near distances have a bucket each, farther ones share buckets that grow as the logarithm, up to max_distance; one
    more beyond. bidirectional: half of the buckets for keys after the query, else all of those count as distance 0.

    weight: float (buckets, Hq), as the model's embedding holds it, of any float dtype; used in float32. It receives a
    gradient. align: where queries sit. Raises ValueError or TypeError for other values.
    """

    def __init__(
        self, weight: Tensor, bidirectional: bool = True, max_distance: int = 128, align: Align = "bottom-right"
    ) -> None:
        super().__init__("weight", weight, align)
        max_distance = as_whole("T5Bias", "max_distance", max_distance, 1, "positions")
        if not isinstance(bidirectional, bool):
            raise TypeError(f"T5Bias: bidirectional={bidirectional!r} is a {type(bidirectional).__name__}: pass a bool")
        if weight.dim() != 2:
            raise ValueError(f"T5Bias: weight has shape {tuple(weight.shape)}: pass (buckets, Hq)")
        buckets = weight.shape[0]
        exact = buckets // 4 if bidirectional else buckets // 2
        if buckets < (4 if bidirectional else 2) or (bidirectional and buckets % 2) or max_distance <= exact:
            raise ValueError(
                f"T5Bias: weight has {buckets} buckets for max_distance={max_distance}: pass at least "
                f"{'4, an even number' if bidirectional else '2'}, and a max_distance beyond the {exact} that have a "
                "bucket each"
            )
        self.bidirectional = bidirectional
        self.max_distance = max_distance

    def with_tensor(self, tensor: Tensor) -> T5Bias:
        return T5Bias(tensor, self.bidirectional, self.max_distance, self.align)

    def bucket(self, distance: Tensor) -> Tensor:
        """The bucket of each distance, int64 like `distance`; in float32 as T5's own code has it."""
        buckets = self.tensor.shape[0]
        found = torch.zeros_like(distance)
        if self.bidirectional:
            buckets //= 2
            found = torch.where(distance > 0, buckets, 0)
            away = distance.abs()
        else:
            away = (-distance).clamp(min=0)
        exact = buckets // 2
        far = torch.log(away.clamp(min=1).float() / exact) / math.log(self.max_distance / exact) * (buckets - exact)
        far = (exact + far.to(torch.int64)).clamp(max=buckets - 1)
        return found + torch.where(away < exact, away, far)

    def to_dense(self, batch: int, heads: int, len_q: int, len_k: int) -> Tensor:
        found = self.tensor[self.bucket(self._distance(len_q, len_k)[0, 0])]
        return found.permute(2, 0, 1).expand(batch, heads, len_q, len_k)

    def lower(self, size: Size, dtype: torch.dtype) -> LoweredBias:
        self._check_heads("weight", self.tensor.shape[1], size, several=False)
        reach = self.max_distance
        distance = torch.arange(-reach, reach + 1, device=self.tensor.device)
        table = self.tensor.to(dtype)[self.bucket(distance)].t().contiguous()
        return LoweredBias(table=table, first=-reach, top_left=self.align == "top-left")

    def __repr__(self) -> str:
        more = "" if self.bidirectional else ", bidirectional=False"
        return f"T5Bias({describe(self.tensor)}{more}, max_distance={self.max_distance}{aligned(self.align)})"
