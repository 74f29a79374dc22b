"""Random attention_decode calls: contiguous and paged caches, lengths, windows, biases, sinks and softcap."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn import functional, reference
from fastattn.biases import Dense
from fastattn.masks import Causal, Mask, SlidingWindow
from fastattn.parity.attention_cases import draw_distance_bias
from fastattn.parity.bound import ParityRow
from fastattn.parity.draw import DTYPES, THREAD_WEIGHTS, THREADS, Draw
from fastattn.parity.eager import eager_attention
from fastattn.parity.magnitude import attention_magnitudes
from fastattn.parity.packing import Packing
from fastattn.parity.probe import Conditions, Probe, Tensors, run_probe
from fastattn.reference.decode import gather_pages

_DIMS = (1, 8, 16, 24, 32, 40, 64, 80, 96, 128, 256, 5, 17, 136, 192, 200)
_DIM_WEIGHTS = (1, 2, 3, 3, 4, 2, 5, 2, 2, 3, 0.4, 0.5, 0.5, 0.2, 0.3, 0.2)


def check_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    backend: str | None,
    block_table: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    conditions: Conditions,
    **options: Any,
) -> list[ParityRow]:
    """`fastattn.attention_decode`: out and lse. Arguments as there; options: bias, sinks, scale, softcap."""
    bias = options.get("bias")
    if isinstance(bias, Tensor):
        bias = Dense(bias)
    given = {"k": k_cache, "v": v_cache, "lengths": cache_lengths, "table": block_table}
    tensors = {"q": q, **given, "bias": None if bias is None else bias.tensor, "sinks": options.get("sinks")}
    inputs = {name: t for name, t in tensors.items() if t is not None}
    numbers = {name: options.get(name) for name in ("scale", "softcap")}
    room = gather_pages(k_cache, block_table).shape[2]
    visible = torch.zeros(*q.shape[:3], room, dtype=torch.bool, device=q.device)
    for b, length in enumerate(cache_lengths.tolist()):
        shape = (1, q.shape[1], q.shape[2], length)
        if isinstance(mask, Tensor):
            visible[b, ..., :length] = mask.expand(*q.shape[:3], room)[b, ..., :length]
        else:
            visible[b, ..., :length] = True if mask is None else mask.to_dense(*shape, q.device)[0]
    packing = Packing([q.shape[2]] * q.shape[0], cache_lengths.tolist())  # each length has its own distances

    def biases(t: Tensors) -> dict[str, Tensor]:
        if bias is None:
            return {}
        return {"bias": packing.dense_bias(bias.with_tensor(t["bias"]), (*q.shape[:3], room))}

    for added in biases(inputs).values():
        visible = visible & ~torch.isneginf(added)

    def outputs(found: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return dict(zip(("out", "lse"), found, strict=True))

    def call(function: Any, t: Tensors, **extra: Any) -> dict[str, Tensor]:
        own: Any = None if bias is None else bias.with_tensor(t["bias"])
        own = own.tensor if isinstance(own, Dense) else own
        tensors = {"block_table": t.get("table"), "bias": own, "sinks": t.get("sinks")}
        return outputs(
            function(t["q"], t["k"], t["v"], t["lengths"], mask=mask, return_lse=True, **tensors, **numbers, **extra)
        )

    def dense(t: Tensors) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        unused = torch.arange(room, device=q.device) >= t["lengths"].view(-1, 1, 1)
        keys, values = (gather_pages(t[n], t.get("table")).masked_fill(unused.unsqueeze(-1), 0) for n in "kv")
        return (t["q"], keys, values), {"visible": visible, "sinks": t.get("sinks"), **numbers}

    def eager(t: Tensors) -> dict[str, Tensor]:
        tensors, extras = dense(t)
        return outputs(eager_attention(*tensors, biases=tuple(biases(t).values()), **extras))

    def magnitudes(t: Tensors, _: Tensors) -> dict[str, Tensor]:
        tensors, extras = dense(t)
        return attention_magnitudes(*tensors, None, None, biases=biases(t), **extras)

    probe = Probe(
        dtype=q.dtype,
        fused=lambda t: call(functional.attention_decode, t, backend=backend),
        truth=lambda t: call(reference.attention_decode, t),
        eager=eager,
        magnitudes=magnitudes,
        group_dims=lambda _name, _tensor: 2,
        float32_outputs=frozenset({"lse"}),
    )
    return run_probe(probe, inputs, backend, conditions)


class DecodeCase:
    """One drawn call. `describe()` says what it is, `run(backend)` checks it."""

    def __init__(self, draw: Draw) -> None:
        self.dtype = draw.one_of(DTYPES, (2, 1, 1))
        batch, heads_kv = draw.integer(1, 4), draw.integer(1, 3)
        heads_q = heads_kv * draw.one_of((1, 2, 3, 4, 8, 16), (5, 3, 1, 3, 2, 0.5))
        len_q, room = draw.one_of((1, draw.size(2, 20)), (3, 2)), draw.size(1, 900)
        dim = draw.one_of(_DIMS, _DIM_WEIGHTS)
        dim_v = draw.one_of(_DIMS, _DIM_WEIGHTS) if draw.chance(0.2) else dim
        self.options: dict[str, Any] = {}
        if draw.chance(0.5):
            page = draw.one_of((1, 7, 16, 64, 128), (0.3, 1, 3, 2, 1))
            pages_each = -(-room // page)
            room, pages = pages_each * page, batch * pages_each + 2
            shape: tuple[int, ...] = (pages, page, heads_kv)
            table = torch.randperm(pages, generator=draw.generator)[: batch * pages_each].view(batch, pages_each)
            self.options["block_table"] = table.to(draw.device, torch.int32)
        else:
            shape = (batch, heads_kv, room)
        drawn = [draw.one_of((draw.integer(0, room), room, 0), (8, 2, 0.3)) for _ in range(batch)]
        lengths = torch.tensor(drawn, dtype=torch.int32, device=draw.device)
        k, v = draw.normal((*shape, dim), self.dtype), draw.normal((*shape, dim_v), self.dtype)
        if "block_table" not in self.options and draw.chance(0.5):
            unused = torch.arange(room, device=draw.device) >= lengths.view(-1, 1, 1)
            k, v = (t.masked_fill(unused.unsqueeze(-1), draw.one_of((math.nan, math.inf))) for t in (k, v))
        orders = ((0, 2, 1, 3), (1, 0, 2, 3))
        q = draw.laid_out(draw.normal((batch, heads_q, len_q, dim), self.dtype), orders)
        self.tensors = {
            "q": q,
            "k_cache": draw.laid_out(k, orders),
            "v_cache": draw.laid_out(v, orders),
            "cache_lengths": lengths,
        }
        self.options |= self._options(draw, (batch, heads_q, len_q, room))
        self.conditions = Conditions(
            grad=False,
            poison=draw.chance(0.5),
            shift=draw.one_of((0, 1, 3), (3, 1, 1)),
            threads=draw.one_of(THREADS, THREAD_WEIGHTS),
        )

    def _options(self, draw: Draw, full: tuple[int, int, int, int]) -> dict[str, Any]:
        def broadcast() -> tuple[int, ...]:
            return (*(n if draw.chance(0.5) else 1 for n in full[:3]), full[3])

        options: dict[str, Any] = {}
        kind = draw.one_of(("none", "causal", "window", "both", "bool"), (2, 3, 3, 1, 1))
        window = SlidingWindow(draw.integer(0, full[3]), draw.one_of((None, 0, 2)))
        if kind == "bool":
            options["mask"] = draw.bits(broadcast(), 0.6)
        elif kind != "none":
            options["mask"] = {"causal": Causal(), "window": window, "both": Causal() & window}[kind]
        if draw.chance(0.25):
            options["bias"] = draw.normal(broadcast(), draw.one_of((torch.float32, self.dtype)))
        elif draw.chance(0.3):
            bias = draw_distance_bias(draw, self.dtype, full[0], full[1], ("bottom-right",))
            options["bias"] = bias.with_tensor(bias.tensor.detach())
        if draw.chance(0.25):
            options["softcap"] = draw.one_of((2.0, 15.0, 50.0))
        if draw.chance(0.25):
            options["sinks"] = draw.normal((full[1],), torch.float32, 2.0)
        if draw.chance(0.2):
            options["scale"] = draw.one_of((0.3, 1.5, -0.5)) / math.sqrt(self.tensors["q"].shape[3])
        return options

    def describe(self) -> str:
        """Shapes, strides and options in one line."""
        shown = [f"{n}{tuple(t.shape)} strides {tuple(t.stride())}" for n, t in self.tensors.items()]
        shown += [f"{n}={tuple(v.shape) if isinstance(v, Tensor) else v!r}" for n, v in self.options.items()]
        return f"{str(self.dtype).removeprefix('torch.')} {', '.join(shown)}"

    def run(self, backend: str | None) -> list[ParityRow]:
        """Rows of the parity rule."""
        return check_attention_decode(**self.tensors, **self.options, backend=backend, conditions=self.conditions)
