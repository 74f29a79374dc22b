"""Random attention calls: shapes, layouts, masks, biases, sinks, softcap and dropout, in all their combinations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.biases import ALiBi, Bias, RelativeBias, T5Bias
from fastattn.errors import NotSupported
from fastattn.masks import Mask
from fastattn.masks.arguments import Align
from fastattn.parity.bound import refusal
from fastattn.parity.draw import DTYPES, THREAD_WEIGHTS, THREADS, Draw
from fastattn.parity.histogram import check_mask_histogram
from fastattn.parity.mask_cases import MaskDraw
from fastattn.parity.packing import Packing
from fastattn.parity.rule import Conditions, ParityRow, check_attention

_DIMS = (1, 8, 16, 24, 32, 40, 64, 80, 96, 128, 256, 5, 17, 136, 192, 200)
_DIM_WEIGHTS = (1, 2, 3, 3, 4, 2, 5, 2, 2, 2, 0.4, 0.5, 0.5, 0.2, 0.3, 0.2)
_MAX_SCORES = 160_000  # elements of all score matrices of a case: keeps the float64 truth at a few milliseconds
_ORDERS = ((0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3))  # of (B, H, S, D), outermost first; the first is (B, S, H, D)


class AttentionCase:
    """One drawn call. `describe()` says what it is, `run(backend)` checks it."""

    def __init__(self, draw: Draw) -> None:
        self.dtype = draw.one_of(DTYPES, (2, 1, 1))
        heads_kv, group = draw.integer(1, 3), draw.one_of((1, 2, 3, 4, 8), (5, 3, 1, 2, 0.5))
        self.batch, self.heads_kv, self.heads_q = draw.integer(1, 4), heads_kv, heads_kv * group
        self.len_q, self.len_k = self._lengths(draw)
        self.packing = self._packing(draw) if draw.chance(0.15) and self.len_q * self.len_k else None
        self.dim = draw.one_of(_DIMS, _DIM_WEIGHTS)
        self.dim_v = draw.one_of(_DIMS, _DIM_WEIGHTS) if draw.chance(0.25) else self.dim
        if draw.chance(0.01) and self.packing is None:
            self.batch = 0
        self.loudness = loudness = draw.one_of((1.0, 0.1, 2.0), (8, 1, 1))  # 2: peaked softmax rows
        q = draw.normal((self.batch, self.heads_q, self.len_q, self.dim), self.dtype, loudness)
        k = draw.normal((self.batch, heads_kv, self.len_k, self.dim), self.dtype)
        v = draw.normal((self.batch, heads_kv, self.len_k, self.dim_v), self.dtype)
        self.mask, hidden = self._mask(draw)
        if hidden is not None and draw.chance(0.5):  # what nobody may see must not matter, whatever it holds
            k, v = k.masked_fill(hidden, float("nan")), v.masked_fill(hidden, draw.one_of((float("nan"), math.inf)))
        self.tensors = {n: draw.laid_out(t, _ORDERS) for n, t in (("q", q), ("k", k), ("v", v))}
        self.options = self._options(draw)
        self.conditions = Conditions(
            grad=draw.chance(0.85),
            seed=draw.integer(0, 2**31),
            poison=draw.chance(0.5),
            shift=draw.one_of((0, 1, 3), (3, 1, 1)),
            without_gradient=frozenset({draw.one_of(("out", "lse"))}) if draw.chance(0.1) else frozenset(),
            strided_gradients=draw.chance(0.3),
            threads=draw.one_of(THREADS, THREAD_WEIGHTS),
        )
        if self.conditions.without_gradient and not self.options["return_lse"]:
            self.conditions = replace(self.conditions, without_gradient=frozenset())

    def _lengths(self, draw: Draw) -> tuple[int, int]:
        most = max(4, min(400, int(math.sqrt(_MAX_SCORES / (self.batch * self.heads_q)))))
        len_q = draw.one_of((draw.size(2, most), 1, 0), (8, 1, 0.05))
        kind = draw.one_of(("same", "other", "one", "none", "long"), (4, 5, 0.4, 0.05, 0.25))
        if kind == "long":  # few queries of many keys, or the other way round: many tiles, split between threads
            each = _MAX_SCORES // (self.batch * self.heads_q)
            few = draw.size(1, max(1, min(24, each // 600)))
            long = draw.size(600, max(600, min(4000, each // few)))
            return (few, long) if draw.chance(0.7) else (long, few)
        return len_q, {"same": len_q, "other": draw.size(2, 2 * most), "one": 1, "none": 0}[kind]

    def _packing(self, draw: Draw) -> Packing:
        """Lengths up to those of the padded batch, which some sequence has; some may be 0."""
        lengths = []
        for longest in (self.len_q, self.len_k):
            own = [0 if draw.chance(0.1) else draw.integer(0, longest) for _ in range(self.batch)]
            own[draw.integer(0, self.batch - 1)] = longest
            lengths.append(own)
        outside, gap = draw.one_of((0, 3), (2, 1)), draw.one_of((0, 5), (2, 1))
        return Packing(*lengths, outside=outside, gap=gap, longest_given=draw.chance(0.7))

    def _options(self, draw: Draw) -> dict[str, Any]:
        options: dict[str, Any] = {"return_lse": draw.chance(0.6), "deterministic": draw.chance(0.2)}
        # Scores far beyond 10 would leave the rule to chance: the rounding of the score itself, which plain torch has
        # too, then outweighs all else, and the larger of two such errors over a few rows is a matter of luck.
        if self.loudness <= 1 and draw.chance(0.25):
            options["scale"] = draw.one_of((0.3, 1.5, 2.5, -0.5, 0.0), (3, 3, 3, 1, 0.3)) / math.sqrt(self.dim)
        if draw.chance(0.2):
            options["softcap"] = draw.one_of((2.0, 15.0, 50.0))
        if draw.chance(0.2):
            options["sinks"] = draw.normal((self.heads_q,), draw.one_of((torch.float32, self.dtype)), 2.0)
        if draw.chance(0.3):
            options["bias"] = (
                self._bias(draw) if draw.chance(0.5) else draw_distance_bias(draw, self.dtype, self.batch, self.heads_q)
            )
        if draw.chance(0.2):
            options["dropout_p"] = draw.one_of((0.1, 0.5, 0.9), (5, 3, 1))
            options["dropout_seed"] = torch.tensor([draw.integer(-(2**62), 2**62)], device=draw.device)
        return options

    def _broadcast_shape(self, draw: Draw) -> tuple[int, ...]:
        """A shape that broadcasts to (B, Hq, Sq, Skv), with ones or missing leading dimensions."""
        full = (self.batch, self.heads_q, self.len_q, self.len_k)
        shape = [n if draw.chance(0.6) else 1 for n in full[:3]] + [self.len_k if draw.chance(0.9) else 1]
        return tuple(shape[draw.one_of((0, 1, 2), (6, 1, 1)) :])

    def _bias(self, draw: Draw) -> Tensor:
        bias = draw.normal(self._broadcast_shape(draw), draw.one_of((torch.float32, self.dtype)))
        if draw.chance(0.3):
            hole = draw.one_of((-math.inf, torch.finfo(bias.dtype).min))
            bias = bias.masked_fill(draw.bits(bias.shape, 0.3), hole)
        if bias.dim() == 4:
            bias = draw.laid_out(bias, ((0, 1, 2, 3), (1, 0, 2, 3), (0, 2, 1, 3)))
        return bias.requires_grad_(draw.chance(0.6))

    def _mask(self, draw: Draw) -> tuple[Mask | Tensor | None, Tensor | None]:
        """The mask, and bool (B,1,Skv,1) of the keys that it promises to zero-fill on load (None: no such promise)."""
        kind = draw.one_of(
            ("none", "band", "keys", "band & keys", "named", "combination", "bool", "float", "ranges"),
            (4, 2, 3, 2, 5, 5, 2, 2, 1),
        )
        if kind == "none":
            return None, None
        if kind in ("bool", "float", "ranges"):
            return getattr(self, f"_{kind}_tensor")(draw), None
        masks = MaskDraw(draw, self.batch, self.heads_q, self.len_q, self.len_k)
        if kind in ("band", "named", "combination"):
            return getattr(masks, kind)(), None
        keys = masks.keys()
        hidden = ~keys.to_dense(self.batch, 1, 1, self.len_k, draw.device).view(self.batch, 1, self.len_k, 1)
        if kind == "keys":
            return keys, hidden
        return (masks.band() & keys if draw.chance(0.5) else keys & masks.band()), hidden

    def _bool_tensor(self, draw: Draw) -> Tensor:
        """The SDPA form: True is visible; a key-padding mask (B,1,1,Skv) or any shape that broadcasts."""
        if draw.chance(0.4):
            return draw.bits((self.batch, 1, 1, self.len_k), 0.7)
        bits = draw.bits(self._broadcast_shape(draw), draw.one_of((0.6, 0.05)))
        return draw.laid_out(bits, ((0, 1, 2, 3), (1, 0, 2, 3))) if bits.dim() == 4 else bits

    def _float_tensor(self, draw: Draw) -> Tensor:
        """The additive form: 0 where visible, -inf or the lowest finite number elsewhere, or any numbers at all."""
        bits = self._bool_tensor(draw)
        dtype = draw.one_of((self.dtype, torch.float32))
        if draw.chance(0.3):
            return draw.normal(bits.shape, dtype).requires_grad_(draw.chance(0.5))
        hole = draw.one_of((-math.inf, torch.finfo(dtype).min))
        return torch.zeros(bits.shape, dtype=dtype, device=bits.device).masked_fill(~bits, hole)

    def _ranges_tensor(self, draw: Draw) -> Tensor:
        """int32 (1|B, 1|Hq, Sq, 2): the keys start <= j < end of each query; some empty, some past the end."""
        shape = (draw.one_of((1, self.batch)), draw.one_of((1, self.heads_q)), self.len_q)
        start = torch.randint(0, self.len_k // 2 + 1, shape, generator=draw.generator)
        end = start + torch.randint(0, self.len_k + 1, shape, generator=draw.generator)
        return torch.stack([start, end], dim=-1).to(torch.int32).to(draw.device)

    def describe(self) -> str:
        """Shapes, strides, mask and options in one line."""
        q, k, v = (self.tensors[n] for n in "qkv")
        shape = f"B={self.batch} Hq={self.heads_q} Hkv={self.heads_kv} Sq={self.len_q} Skv={self.len_k}"
        strides = " ".join(f"{n}{tuple(t.stride())}" for n, t in zip("qkv", (q, k, v), strict=True))
        mask = _short(self.mask)
        options = " ".join(f"{name}={_short(value)}" for name, value in self.options.items())
        dims = f"D={self.dim} Dv={self.dim_v}"
        packed = "" if self.packing is None else f" packed {self.packing.lengths_q} x {self.packing.lengths_k}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{shape} {dims} {dtype}{packed} mask={mask} {options} strides {strides}"

    def run(self, backend: str | None) -> list[ParityRow]:
        """Rows of the parity rule and, where the mask is not a float tensor, of the exact mask check.

        Raises NotSupported where the backend refuses the call; where it refuses the mask's check alone, a row says so.
        """
        tensors = self.tensors
        rows = check_attention(
            tensors["q"],
            tensors["k"],
            tensors["v"],
            backend=backend,
            mask=self.mask,
            packing=self.packing,
            conditions=self.conditions,
            **self.options,
        )
        additive = isinstance(self.mask, Tensor) and self.mask.is_floating_point()
        if self.mask is None or additive or not self.batch * self.len_q * self.len_k:
            return rows
        return rows + self._check_mask(backend)

    def _check_mask(self, backend: str | None) -> list[ParityRow]:
        """Rows of the exact mask check: the forward's alone, beside the reasons, where its gradients are refused."""
        shape = (self.batch, self.heads_q, self.heads_kv, self.len_q, self.len_k)
        conditions = {"device": self.tensors["q"].device, "threads": self.conditions.threads, "packing": self.packing}
        refused = []
        for grad in (True, False) if self.conditions.grad else (False,):
            try:
                rows = check_mask_histogram(self.mask, *shape, self.dtype, backend, grad=grad, **conditions)
            except NotSupported as error:
                refused.append(refusal("seeing queries" if grad else "visible keys", error.why(backend)))
            else:
                return refused + rows
        return refused


def draw_distance_bias(
    draw: Draw, dtype: torch.dtype, batch: int, heads: int, alignments: tuple[Align, ...] = ("bottom-right", "top-left")
) -> Bias:
    """ALiBi, a relative table or T5's buckets, of float32 or `dtype`."""
    align = draw.one_of(alignments)
    of = draw.one_of((torch.float32, dtype))
    kind = draw.one_of(("alibi", "relative", "t5"))
    make: Callable[..., Bias]
    if kind == "alibi":
        shape = (batch, heads) if draw.chance(0.2) else (heads,)
        tensor, make = draw.normal(shape, of, draw.one_of((0.02, 0.5))), ALiBi
    elif kind == "relative":
        reach = draw.one_of((0, 1, 7, draw.size(1, 600)))
        tensor, make = draw.normal((draw.one_of((1, heads), (1, 3)), 2 * reach + 1), of), RelativeBias
    else:
        buckets, farthest = draw.one_of(((32, 128), (32, 20), (8, 9), (6, 40)), (3, 1, 1, 1))
        both, tensor = draw.chance(0.6), draw.normal((buckets, heads), of)
        make = partial(T5Bias, bidirectional=both, max_distance=farthest)
    return make(tensor.requires_grad_(draw.chance(0.6)), align=align)


def _short(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.numel() == 1:
        return str(value.item())
    grad = ", requires grad" if value.requires_grad else ""
    return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)} strides {tuple(value.stride())}{grad}"
