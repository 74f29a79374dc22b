"""Which cases a run has: per suite, device and choice of model shapes.

Sizes differ by device so that a CPU finishes in minutes and a GPU is filled. On a CPU the long sweeps have few heads,
so that implementations that write their scores down take part, and a direction or an activation that would only repeat
another's picture is left out. A quick run has the same cases, tiny.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastattn.bench.cases.attention import AttentionCase, DecodeCase
from fastattn.bench.cases.base import DIRECTIONS, Case, generator
from fastattn.bench.cases.ffn import FfnCase
from fastattn.bench.cases.model import ModelCase
from fastattn.bench.cases.norm import NormCase
from fastattn.bench.cases.packed import PackedCase
from fastattn.bench.cases.visible import Visible

SUITES = ("attention", "packed", "decode", "norm", "ffn", "model")
SHARES = {"attention": 0.5, "packed": 0.04, "decode": 0.04, "norm": 0.1, "ffn": 0.12, "model": 0.2}
"""How a time budget is divided among suites; what one does not need is the next one's."""

_QUICK_LENGTH, _QUICK_ROWS, _QUICK_WIDTH = 64, 16, 64
_SQUARE = 4096


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one layer of a well-known model, and what its attention sees."""

    heads_q: int
    heads_kv: int
    dim: int
    width: int
    hidden: int
    activation: str
    norm: Literal["layer", "rms"]
    gated: bool = False
    bias: bool = True
    causal: bool = False
    window: int | None = None
    padded: bool = False
    t5_bias: bool = False
    cpu: tuple[int, int] = (8, 512)
    gpu: tuple[int, int] = (32, 512)


SHAPES: dict[str, ModelShape] = {
    "bert-base": ModelShape(12, 12, 64, 768, 3072, "gelu", "layer", padded=True, cpu=(2, 512), gpu=(32, 512)),
    "gpt2": ModelShape(12, 12, 64, 768, 3072, "gelu_tanh", "layer", causal=True, cpu=(1, 1024), gpu=(16, 1024)),
    "t5-base": ModelShape(12, 12, 64, 768, 3072, "relu", "rms", bias=False, t5_bias=True, cpu=(2, 512), gpu=(32, 512)),
    "llama-8b": ModelShape(
        32, 8, 128, 4096, 14336, "silu", "rms", gated=True, bias=False, causal=True, cpu=(1, 512), gpu=(2, 4096)
    ),
    "longformer": ModelShape(12, 12, 64, 768, 3072, "gelu", "layer", window=256, cpu=(1, 2048), gpu=(4, 4096)),
}
"""Of the models' papers and configurations; batch and length are ours. longformer: its window without global tokens."""


@dataclass(frozen=True)
class Choice:
    """shapes: keys of SHAPES; None takes all of them and the sweeps. quick: tiny sizes."""

    device: str
    dtype: torch.dtype
    shapes: tuple[str, ...] | None = None
    quick: bool = False

    @property
    def gpu(self) -> bool:
        return self.device == "cuda" and not self.quick

    @property
    def all_directions(self) -> bool:
        """Whether every case is taken forward and backward, not only those that show something new."""
        return self.gpu or self.quick or self.shapes is not None

    @property
    def compiled(self) -> tuple[str, ...]:
        """The directions in which compilers join a case that resembles one that they join in all."""
        return DIRECTIONS if self.all_directions else ("forward",)

    @property
    def common(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": self.dtype}

    def of_shapes(self) -> Iterable[tuple[str, ModelShape, int, int]]:
        """Name, shape, batch and length of each model."""
        for name in SHAPES if self.shapes is None else self.shapes:
            shape = SHAPES[name]
            batch, length = shape.gpu if self.gpu else shape.cpu
            yield name, shape, *((min(batch, 2), _QUICK_LENGTH) if self.quick else (batch, length))


def cases(suites: Iterable[str], choice: Choice) -> list[Case]:
    """The cases of those suites in order. ValueError for an unknown suite or shape."""
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"suite {suite!r} is unknown: pass one of {', '.join(SUITES)}")
    for name in choice.shapes or ():
        if name not in SHAPES:
            raise ValueError(f"shapes {name!r} is unknown: pass one of {', '.join(SHAPES)}")
    return [case for suite in suites for case in _SUITE_CASES[suite](choice)]


def _lengths(batch: int, length: int) -> tuple[int, ...]:
    """Sequences of half to full length; the first is full."""
    drawn = torch.randint(length // 2, length + 1, (batch,), generator=generator()).tolist()
    return (length, *drawn[1:])


# --- Attention ------------------------------------------------------------------------------------------------


def _attention(choice: Choice) -> list[Case]:
    found: list[Case] = []
    for name, shape, batch, length in choice.of_shapes():
        window = None if shape.window is None else 8 if choice.quick else shape.window
        right = 0 if shape.causal else window
        seen = Visible(window, right, _lengths(batch, length) if shape.padded else None)
        found.append(
            AttentionCase(
                name=f"{name}, {batch} x {length}",
                group="Attention by model",
                batch=batch,
                heads_q=shape.heads_q,
                heads_kv=shape.heads_kv,
                len_q=length,
                len_k=length,
                dim=16 if choice.quick else shape.dim,
                visible=seen,
                t5_bias=shape.t5_bias,
                compiled=DIRECTIONS if name == "bert-base" else choice.compiled,
                **choice.common,
            )
        )
    return found if choice.shapes is not None else found + _attention_sweeps(choice)


def _attention_sweeps(choice: Choice) -> list[Case]:
    """The long one last: a time budget cuts there."""
    return [*_window_sweep(choice), *_density_sweep(choice), *_dim_sweep(choice), *_length_sweep(choice)]


def _square(choice: Choice, name: str, group: str, length: int, heads: int, dim: int, **options: Any) -> AttentionCase:
    batch = options.pop("batch", 1)
    sizes = {"batch": batch, "heads_q": heads, "heads_kv": heads, "len_q": length, "len_k": length, "dim": dim}
    return AttentionCase(name=name, group=group, **sizes, **options, **choice.common)


def _length_sweep(choice: Choice) -> list[Case]:
    """Constant tokens: the batch shrinks as the length grows."""
    found: list[Case] = []
    lengths = (32, 64) if choice.quick else (512, 1024, 2048, 4096, 8192, 16384) if choice.gpu else (256, 1024, 4096)
    tokens = 16384 if choice.gpu else lengths[-1]
    dims = (64, 128, 256) if choice.gpu else (16,) if choice.quick else (64,)
    for dim in dims:
        heads = 2048 // dim if choice.gpu else 2 if choice.quick else 4
        for causal in (False, True) if choice.gpu else (True,):
            kind = "causal" if causal else "full"
            group = f"Attention against length, {kind}, head dim {dim}, {tokens} tokens"
            for length in lengths:
                seen = Visible(right=0) if causal else Visible()
                name = f"{kind}, head dim {dim}, {tokens // length} x {length}"
                place = {"axis": "length", "x": length, "visible": seen, "batch": tokens // length}
                place["compiled"] = _compiled(choice, length, dim)
                found.append(_square(choice, name, group, length, heads, dim, **place))
    return found


def _compiled(choice: Choice, length: int, dim: int) -> tuple[str, ...]:
    """Compilers join at one length of the common head dims."""
    return choice.compiled if length == (4096 if choice.gpu else 1024) and dim <= 128 else ()


def _dim_sweep(choice: Choice) -> list[Case]:
    if choice.gpu:  # the sweep over lengths has them
        return []
    length, heads = (32, 2) if choice.quick else (1024, 8)
    group = f"Attention against head dim, full, length {length}"
    place = {"axis": "head dim", "compiled": (), "directions": ("forward",)}
    return [
        _square(choice, f"full, head dim {dim}, 1 x {length}", group, length, heads, dim, x=dim, **place)
        for dim in ((16, 24) if choice.quick else (32, 64, 128, 256))
    ]


def _window_sweep(choice: Choice) -> list[Case]:
    length, heads, dim = (64, 2, 16) if choice.quick else (16384, 16, 128) if choice.gpu else (4096, 2, 64)
    group = f"Attention against a causal window, length {length}"
    widths = (8, 16) if choice.quick else (256, 1024, 4096) if choice.gpu else (64, 256, 1024)
    found: list[Case] = [
        _square(
            choice,
            f"causal window {width}, 1 x {length}",
            group,
            length,
            heads,
            dim,
            axis="window",
            x=width,
            visible=Visible(left=width, right=0),
            compiled=choice.compiled if width == 256 else (),
            directions=("forward", "both") if width == 256 or choice.gpu else ("forward",),
        )
        for width in widths
    ]
    if not choice.quick and not choice.gpu:
        seen = Visible(left=256, right=0)
        name = "causal window 256, 1 x 8192"
        found.append(_square(choice, name, "Long documents", 8192, 4, 64, visible=seen, compiled=()))
    return found


def _density_sweep(choice: Choice) -> list[Case]:
    length, heads, dim = (128, 2, 16) if choice.quick else (8192, 16, 128) if choice.gpu else (4096, 2, 64)
    group = f"Attention against density, 64 x 64 blocks, length {length}"
    densities = (0.5, 1.0) if choice.quick else (0.05, 0.1, 0.25, 0.5, 1.0) if choice.gpu else (0.05, 0.25, 0.5, 1.0)
    return [
        _square(
            choice,
            f"{density:.0%} of blocks, 1 x {length}",
            group,
            length,
            heads,
            dim,
            axis="density",
            x=density,
            visible=Visible(density=density),
            compiled=("forward", "both") if choice.gpu and density == 0.25 else (),
            directions=("forward", "both") if choice.gpu else ("forward",),
        )
        for density in densities
    ]


# --- The other suites -------------------------------------------------------------------------------------------


def _packed(choice: Choice) -> list[Case]:
    """Of models that see padding, and of those that decode, which are trained on packed documents."""
    found: list[Case] = []
    for name, shape, batch, length in choice.of_shapes():
        if not (shape.padded or (shape.causal and choice.all_directions)):
            continue
        lengths = _uneven(max(batch, 4), length)
        group = f"Packed batches, {sum(lengths)} tokens in sequences of up to {length}"
        sizes = {"heads_q": shape.heads_q, "heads_kv": shape.heads_kv, "dim": 16 if choice.quick else shape.dim}
        title = f"{name}, {len(lengths)} x up to {length}"
        options = {**sizes, "lengths": lengths, "causal": shape.causal, "compiled": choice.compiled, **choice.common}
        found.append(PackedCase(name=title, group=group, **options))
    return found


def _uneven(batch: int, length: int) -> tuple[int, ...]:
    """Sequences of an eighth of full length to all of it; the first is full."""
    drawn = torch.randint(length // 8, length + 1, (batch - 1,), generator=generator()).tolist()
    return (length, *drawn)


def _decode(choice: Choice) -> list[Case]:
    """Cached lengths from half to all of the capacity and, on CPUs, a larger batch of full ones; heads as in the models
    that decode."""
    capacities = (64,) if choice.quick else (2048, 8192, 32768) if choice.gpu else (1024, 4096)
    batch = 2 if choice.quick else 16 if choice.gpu else 4
    found: list[Case] = []
    for name, shape, _, _ in choice.of_shapes():
        if not shape.causal:
            continue
        options: dict[str, Any] = {"heads_q": shape.heads_q, "heads_kv": shape.heads_kv, "len_q": 1, **choice.common}
        options["dim"] = 16 if choice.quick else shape.dim
        for capacity in capacities:
            title, group = f"{name}, {batch} x {capacity} cached", f"Decode, {name}, batch {batch}"
            axis: dict[str, Any] = {"axis": "cached tokens", "x": capacity, "group": group}
            seen = Visible(lengths=_lengths(batch, capacity))
            found.append(DecodeCase(name=title, batch=batch, len_k=capacity, visible=seen, **axis, **options))
        if not choice.gpu and not choice.quick:
            title, group = f"{name}, 8 x {capacities[-1]} cached, full", "Decode, every cache full"
            found.append(DecodeCase(name=title, group=group, batch=8, len_k=capacities[-1], **options))
    return found


def _rows(choice: Choice, batch: int, length: int) -> int:
    return _QUICK_ROWS if choice.quick else min(batch * length, 16384 if choice.gpu else 2048)


def _square_norms(choice: Choice) -> list[Case]:
    """What a GPU's norms are held to: large square rows, no residual, both directions by themselves."""
    return [
        NormCase(
            name=f"{kind} norm, {_SQUARE} x {_SQUARE}",
            group="Square norms",
            kind=kind,
            rows=_SQUARE,
            width=_SQUARE,
            residual=False,
            directions=("forward", "backward"),
            **choice.common,
        )
        for kind in ("layer", "rms")
    ]


def _norm(choice: Choice) -> list[Case]:
    found = _square_norms(choice) if choice.gpu and choice.shapes is None else []
    sizes: dict[tuple[Any, ...], list[str]] = {}
    for name, shape, batch, length in choice.of_shapes():
        width = _QUICK_WIDTH if choice.quick else shape.width
        sizes.setdefault((shape.norm, _rows(choice, batch, length), width), []).append(name)
    for (kind, rows, width), names in sizes.items():
        found += [
            NormCase(
                name=f"{kind} norm{' + residual' if residual else ''}, {rows} x {width} ({', '.join(names)})",
                group="Norms by model",
                kind=kind,
                rows=rows,
                width=width,
                residual=residual,
                compiled=DIRECTIONS if choice.all_directions or residual else (),
                directions=("forward", "both") if choice.all_directions or residual else ("forward",),
                **choice.common,
            )
            for residual in (False, True)
        ]
    return found


def _ffn(choice: Choice) -> list[Case]:
    found: list[Case] = []
    seen = set()
    for name, shape, batch, length in choice.of_shapes():
        width, hidden = (_QUICK_WIDTH, 2 * _QUICK_WIDTH) if choice.quick else (shape.width, shape.hidden)
        rows = _rows(choice, batch, length)
        if not choice.gpu:  # the 176 million weights of a llama-8b block are work enough
            rows = min(rows, 128 if shape.gated else 1024)
        key = (rows, width, hidden, shape.activation, shape.gated, shape.bias)
        if key in seen:
            continue
        seen.add(key)
        # On a CPU training a llama-8b block takes seconds a call, and gpt2's is bert-base's but for its activation.
        trains = (choice.all_directions or name in ("bert-base", "t5-base")) and (
            choice.gpu or choice.quick or not shape.gated
        )
        found.append(
            FfnCase(
                name=f"{name}: {'gated ' if shape.gated else ''}{shape.activation}, {rows} x {width} x {hidden}",
                group="Feed-forward blocks by model",
                rows=rows,
                width=width,
                hidden=hidden,
                activation=shape.activation,
                gated=shape.gated,
                bias=shape.bias,
                compiled=DIRECTIONS if name == "bert-base" else choice.compiled,
                directions=("forward", "both") if trains else ("forward",),
                **choice.common,
            )
        )
    return found


def _model(choice: Choice) -> list[Case]:
    """float32 whatever the dtype: these are the models as they are loaded."""
    if choice.shapes is not None and "bert-base" not in choice.shapes:
        return []
    common: dict[str, Any] = {"device": choice.device, "dtype": torch.float32}
    bert = ((2, 24),) if choice.quick else ((8, 360), (32, 128)) if choice.gpu else ((4, 360), (16, 128))
    found: list[Case] = [
        ModelCase(
            name=f"MiniLM BERT, inference, {batch} x {length}{', padded' if padded else ''}",
            group="BERT of MiniLM's size (6 layers x 384)",
            model="bert",
            batch=batch,
            length=length,
            padded=padded,
            directions=("forward",),
            **common,
        )
        for (batch, length), padded in zip(bert, (False, True), strict=False)
    ]
    batch, length = (2, 16) if choice.quick else (8, 256) if choice.gpu else (4, 256)
    for direction, what in (("forward", "inference"), ("both", "training step")):
        found.append(
            ModelCase(
                name=f"nn.TransformerEncoder, {what}, {batch} x {length}, padded",
                group="torch.nn.TransformerEncoder (6 layers x 512)",
                model="encoder",
                batch=batch,
                length=length,
                padded=True,
                directions=(direction,),
                **common,
            )
        )
    return found


_SUITE_CASES: dict[str, Callable[[Choice], list[Case]]] = {
    "attention": _attention,
    "packed": _packed,
    "decode": _decode,
    "norm": _norm,
    "ffn": _ffn,
    "model": _model,
}
