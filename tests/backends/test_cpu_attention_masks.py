"""The CPU attention kernels over every lowered form, against the formula in float64 and a dense mask.

The lowered masks are made by hand here: `fastattn.masks` is not involved.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastattn.backends import cpu, reference
from fastattn.backends.cpu.attention import attention_backward, attention_forward
from fastattn.biases.lowered import LoweredBias
from fastattn.masks.lowered import Blocks, LoweredMask
from fastattn.masks.lowered import visible as lowered_visible
from fastattn.parity.guards import poisoned_outputs, torch_threads

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason="the CPU library is not built")

ISAS = cpu.available_isas() if cpu.unavailable_reason() is None else []
WIDTH = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
BLOCK = 64
GRADS = ("dq", "dk", "dv", "dbias", "dtable", "dslopes", "dsinks")


@dataclass(frozen=True)
class Shape:
    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    len_k: int

    def full(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads_q, self.len_q, self.len_k


SHAPES = [
    Shape(1, 1, 1, 1, 1),
    Shape(2, 2, 1, 47, 63),
    Shape(1, 2, 2, 48, 64),
    Shape(2, 4, 2, 65, 129),
    Shape(1, 3, 3, 130, 97),
    Shape(2, 1, 1, 193, 200),
    Shape(1, 2, 2, 33, 321),
]


# --- Lowered masks by hand, and what they mean ------------------------------------------------------------------


def words_of(seen: Tensor) -> Tensor:
    """Bools (..., 64) as int64 words, bit c for element c."""
    weights = torch.tensor([1 << c for c in range(63)] + [-(1 << 63)])
    return (seen.long() * weights).sum(dim=-1)


def padded(seen: Tensor, rows: int, columns: int, fill: bool) -> Tensor:
    full = torch.full((*seen.shape[:-2], rows, columns), fill)
    full[..., : seen.shape[-2], : seen.shape[-1]] = seen
    return full


def key_bits_of(seen: Tensor, beyond: bool) -> Tensor:
    """(B, Skv) bools as words; `beyond`: what the bits past the last key are."""
    words = -(-seen.shape[1] // BLOCK)
    return words_of(padded(seen, seen.shape[0], words * BLOCK, beyond).view(-1, words, BLOCK))


def blocks_of(seen: Tensor, beyond: bool) -> Blocks:
    """(b, h, Sq, Skv) bools in form D; `beyond`: what bitmaps say past the last query and key."""
    rows, columns = -(-seen.shape[2] // BLOCK), -(-seen.shape[3] // BLOCK)
    clean = padded(seen, rows * BLOCK, columns * BLOCK, False)
    wide = padded(seen, rows * BLOCK, columns * BLOCK, beyond)
    inside = padded(torch.ones_like(seen), rows * BLOCK, columns * BLOCK, False)
    row_ptr, col, ids, bitmaps = [], [], [], [torch.full((BLOCK,), -1)]
    known: dict[tuple[int, ...], int] = {}
    for b in range(seen.shape[0]):
        for h in range(seen.shape[1]):
            for r in range(rows):
                row_ptr.append(len(col))
                for c in range(columns):
                    at = (b, h, slice(r * BLOCK, (r + 1) * BLOCK), slice(c * BLOCK, (c + 1) * BLOCK))
                    if not clean[at].any():
                        continue
                    col.append(c)
                    if torch.equal(clean[at], inside[at]):
                        ids.append(0)
                        continue
                    bitmap = words_of(wide[at])
                    key = tuple(bitmap.tolist())
                    if key not in known:
                        known[key] = len(bitmaps)
                        bitmaps.append(bitmap)
                    ids.append(known[key])
            row_ptr.append(len(col))
    nothing = torch.empty(0, dtype=torch.int32)  # the transpose is for backends that walk along queries
    pointers = torch.tensor(row_ptr, dtype=torch.int32).view(seen.shape[0], seen.shape[1], rows + 1)
    listed = (torch.tensor(x, dtype=torch.int32) for x in (col, ids))
    return Blocks(pointers, *listed, torch.stack(bitmaps), nothing, nothing, nothing)


Form = Callable[[torch.Generator, random.Random, Shape], tuple[LoweredMask, Tensor]]


def band(generator: torch.Generator, rng: random.Random, shape: Shape) -> tuple[LoweredMask, Tensor]:
    left, right = rng.choice([(None, 0), (40, 0), (7, 9), (100, -20), (-3, 30), (5, None), (3, -10)])
    mask = LoweredMask(band_offset=rng.choice([0, shape.len_k - shape.len_q, -5]), band_left=left, band_right=right)
    return mask, mask_truth(mask, shape)


def key_range(generator: torch.Generator, rng: random.Random, shape: Shape) -> tuple[LoweredMask, Tensor]:
    start = torch.randint(-3, shape.len_k // 2 + 1, (shape.batch,), generator=generator, dtype=torch.int32)
    end = torch.randint(shape.len_k // 2, shape.len_k + 4, (shape.batch,), generator=generator, dtype=torch.int32)
    mask = LoweredMask(key_start=rng.choice([None, start]), key_end=end)
    return mask, mask_truth(mask, shape)


def key_bits(generator: torch.Generator, rng: random.Random, shape: Shape) -> tuple[LoweredMask, Tensor]:
    seen = torch.rand(shape.batch, shape.len_k, generator=generator) < rng.choice([0.05, 0.5, 0.95])
    seen[:, : shape.len_k // 3] |= rng.random() < 0.3
    return LoweredMask(key_bits=key_bits_of(seen, rng.random() < 0.5)), seen[:, None, None].expand(shape.full())


def intervals(generator: torch.Generator, rng: random.Random, shape: Shape) -> tuple[LoweredMask, Tensor]:
    count, batch, heads = rng.randint(1, 4), rng.choice([1, shape.batch]), rng.choice([1, shape.heads_q])
    size = (count, batch, heads, shape.len_q, 1)
    if rng.random() < 0.5:  # a window that moves with the query beside a few fixed ranges
        start = (
            torch.arange(shape.len_q).view(-1, 1)
            + torch.randint(-20, shape.len_k, size[:3], generator=generator)[..., None, None]
        )
    else:
        start = torch.randint(-5, shape.len_k, size, generator=generator)
    length = torch.randint(-2, max(shape.len_k // count, 4), size, generator=generator)
    mask = LoweredMask(intervals=torch.cat((start, start + length), dim=-1).int())
    return mask, mask_truth(mask, shape)


def blocks(generator: torch.Generator, rng: random.Random, shape: Shape) -> tuple[LoweredMask, Tensor]:
    seen = _patches(generator, rng, shape)
    return LoweredMask(blocks=blocks_of(seen, rng.random() < 0.5)), seen.expand(shape.full())


def dense(generator: torch.Generator, rng: random.Random, shape: Shape) -> tuple[LoweredMask, Tensor]:
    seen = _patches(generator, rng, shape)
    cut = rng.choice([(), (2,), (3,), (2, 3)])
    for dim in cut:
        seen = seen.narrow(dim, 0, min(1, seen.shape[dim]))
    if rng.random() < 0.3:
        seen = seen.transpose(2, 3).contiguous().transpose(2, 3)
    seen = seen.expand(shape.full())
    return LoweredMask(dense=seen), seen


def _patches(generator: torch.Generator, rng: random.Random, shape: Shape) -> Tensor:
    """Random bools of which whole squares are hidden or seen, so that every kind of tile occurs."""
    full = (rng.choice([1, shape.batch]), rng.choice([1, shape.heads_q]), shape.len_q, shape.len_k)
    seen = torch.rand(full, generator=generator) < 0.6
    side = rng.choice([16, 64])
    coarse = torch.randint(0, 3, (*full[:2], *(-(-n // side) for n in full[2:])), generator=generator)
    kind = coarse.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, : shape.len_q, : shape.len_k]
    return torch.where(kind == 0, False, torch.where(kind == 1, True, seen))


def mask_truth(mask: LoweredMask, shape: Shape) -> Tensor:
    found = lowered_visible(mask, shape.len_q, shape.len_k, torch.device("cpu"))
    assert found is not None
    return found.expand(shape.full())


FORMS: dict[str, Form] = {
    "band": band,
    "key range": key_range,
    "key bits": key_bits,
    "intervals": intervals,
    "blocks": blocks,
    "dense": dense,
}


def combined(names: tuple[str, ...], seed: int, shape: Shape) -> tuple[LoweredMask, Tensor]:
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    mask, seen = LoweredMask(), torch.ones(shape.full(), dtype=torch.bool)
    for name in names:
        more, also = FORMS[name](generator, rng, shape)
        given = {field: value for field, value in more._asdict().items() if value is not None}
        if name != "band":
            given.pop("band_offset")
        mask, seen = mask._replace(**given), seen & also
    return mask, seen


# --- One call, held to float64 -----------------------------------------------------------------------------------


@dataclass
class Call:
    """Inputs of one call of the kernels, forward and backward."""

    shape: Shape
    mask: LoweredMask
    seen: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    grad_lse: Tensor
    bias: Tensor | None = None
    sinks: Tensor | None = None
    seed: Tensor | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0

    def run(self, threads: int = 2, bias_grad: bool = True) -> dict[str, Tensor]:
        numbers = (self.q.shape[3] ** -0.5, self.softcap, self.dropout_p)
        extras = (self.mask, LoweredBias(self.bias), None, self.sinks, self.seed)
        with poisoned_outputs(), torch_threads(threads):
            out, lse = attention_forward(self.q, self.k, self.v, *extras, *numbers)
            wanted = (self.bias is not None and bias_grad, False, False, self.sinks is not None, True)
            inputs = (self.grad_out, self.grad_lse, self.q, self.k, self.v, out, lse)
            grads = attention_backward(*inputs, *extras, *numbers, *wanted)
        return {"out": out, "lse": lse, **dict(zip(GRADS, grads, strict=True))}

    def truth(self) -> dict[str, Tensor]:
        numbers = (self.q.shape[3] ** -0.5, self.softcap, self.dropout_p)
        hidden = ~self.seen.any(dim=2).any(dim=1)[:, None, :, None]
        q, k, v = self.q.double(), self.k.double().masked_fill(hidden, 0), self.v.double().masked_fill(hidden, 0)
        bias = None if self.bias is None else self.bias.double()
        sinks = None if self.sinks is None else self.sinks.double()
        extras = (LoweredMask(dense=self.seen), LoweredBias(bias), None, sinks, self.seed)
        out, lse = reference.attention_forward(q, k, v, *extras, *numbers)
        wanted = (self.bias is not None, False, False, self.sinks is not None, True)
        inputs = (self.grad_out.double(), self.grad_lse.double(), q, k, v, out, lse)
        grads = reference.attention_backward(*inputs, *extras, *numbers, *wanted)
        return {"out": out, "lse": lse, **dict(zip(GRADS, grads, strict=True))}


def make_call(
    names: tuple[str, ...], seed: int, shape: Shape, dtype: torch.dtype = torch.float32, dim: int = 24, dim_v: int = 40
) -> Call:
    mask, seen = combined(names, seed, shape)
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    hidden = ~seen.any(dim=2).any(dim=1)[:, None, :, None]
    return Call(
        shape=shape,
        mask=mask,
        seen=seen,
        q=draw(shape.batch, shape.heads_q, shape.len_q, dim),
        k=draw(shape.batch, shape.heads_kv, shape.len_k, dim).masked_fill(hidden, math.nan),
        v=draw(shape.batch, shape.heads_kv, shape.len_k, dim_v).masked_fill(hidden, math.inf),
        grad_out=draw(shape.batch, shape.heads_q, shape.len_q, dim_v),
        grad_lse=torch.randn(shape.batch, shape.heads_q, shape.len_q, generator=generator),
    )


def check(call: Call, found: dict[str, Tensor], label: str) -> None:
    """Within a few roundings of the dtype, relative to the largest value of a head; what is hidden is exactly 0."""
    roundoff = WIDTH[call.q.dtype]
    for name, want in call.truth().items():
        got = found[name].double()
        if want.numel() == 0:
            continue
        if name == "lse":
            assert torch.equal(got.isneginf(), want.isneginf()), f"{label}: lse is -inf elsewhere"
            got, want = got.nan_to_num(neginf=0.0), want.nan_to_num(neginf=0.0)
        scale = want.abs().max().clamp(min=1.0)
        worst = float((got - want).abs().max() / scale)
        assert worst <= (8 if name != "lse" else 2) * max(roundoff, 2.0**-22), f"{label}: {name} off by {worst:.2g}"
    dead = ~call.seen.any(dim=-1)
    assert not found["out"][dead].any() and not found["dq"][dead].any(), f"{label}: queries that see nothing"


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cpu.use_isa(request.param):
        yield request.param


COMBINATIONS = [
    *((name,) for name in FORMS),
    ("band", "key range", "key bits"),
    ("band", "intervals"),
    ("key bits", "intervals", "dense"),
    ("blocks", "band", "key range"),
    ("blocks", "intervals", "key bits"),
    ("blocks", "dense"),
    tuple(FORMS),
]


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_forms(isa: str, names: tuple[str, ...]) -> None:
    for index, shape in enumerate(SHAPES):
        seed = 1000 * index + len(names)
        call = make_call(names, seed, shape)
        check(call, call.run(), f"{isa}, {shape}, seed {seed}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(isa: str, dtype: torch.dtype) -> None:
    for seed, names in enumerate(COMBINATIONS):
        call = make_call(names, seed, SHAPES[3 + seed % 4], dtype)
        check(call, call.run(), f"{isa}, {names}, seed {seed}")


BIAS_SIZES = [(b, h, q, k) for b in (0, 1) for h in (0, 1) for q in (0, 1) for k in (0, 1)]


def with_bias(call: Call, broadcast: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Call:
    """The call with a bias, dropout, softcap and sinks; `broadcast`: 1 where the bias has one element."""
    size = [1 if one else full for one, full in zip(broadcast, call.shape.full(), strict=True)]
    generator = torch.Generator().manual_seed(seed)
    call.bias = torch.randn(size, generator=generator).to(dtype)
    call.sinks = torch.randn(call.shape.heads_q, generator=generator)
    call.seed = torch.tensor([seed])
    call.softcap, call.dropout_p = 15.0, 0.2
    return call


@pytest.mark.parametrize("broadcast", BIAS_SIZES, ids=str)
def test_bias_gradient(isa: str, broadcast: tuple[int, ...]) -> None:
    """Every way a bias can be broadcast, beside everything else that takes part in ds."""
    for seed, shape in enumerate((Shape(2, 4, 2, 65, 129), Shape(3, 2, 1, 50, 40))):
        call = with_bias(make_call(("band", "key bits")[seed:], seed, shape), broadcast, seed)
        found = call.run()
        assert found["dbias"].shape == call.bias.shape and found["dbias"].dtype == torch.float32
        check(call, found, f"{isa}, {shape}, seed {seed}")


def test_no_bias_gradient_unless_asked() -> None:
    call = with_bias(make_call(("band",), 3, SHAPES[3]), (0, 0, 0, 0), 3)
    assert call.run(bias_grad=False)["dbias"].numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_masks_hide_by_minus_infinity(isa: str, dtype: torch.dtype) -> None:
    """Whole tiles of -inf, parts of tiles, and a key mask without a query dimension, over NaN in the hidden keys."""
    for seed, shape in enumerate(SHAPES):
        for name in ("dense", "key bits"):
            call = make_call((name,), seed, shape)
            hidden = ~(call.seen if name == "dense" else call.seen[:, :, :1])
            call.bias = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
            call.bias = call.bias.masked_fill(hidden, -math.inf)
            call.mask = LoweredMask()
            if name == "dense":  # which keys nobody sees is found per tile from bools only
                call.k, call.v = call.k.nan_to_num(0.0), call.v.nan_to_num(0.0, 0.0, 0.0)
            truth = Call(**{**vars(call), "bias": call.bias.masked_fill(hidden, 0.0)}).truth()
            check(call, {**call.run(), "dbias": truth["dbias"]}, f"{isa}, {name}, {shape}, seed {seed}")


def test_a_bias_of_the_lowest_float_hides_nothing(isa: str) -> None:
    call = make_call(("key range",), 5, SHAPES[4])
    call.bias = torch.full((1, 1, 1, SHAPES[4].len_k), torch.finfo(torch.float32).min)
    call.q, call.k = call.q * 0, call.k.nan_to_num(0.0) * 0
    seen = call.seen.double()
    want = (seen @ call.v.nan_to_num(0.0, 0.0, 0.0).double()) / seen.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(call.run()["out"].double(), want.nan_to_num(0.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 3], ids=lambda n: f"{n} KV heads")
def test_bitwise_equal_for_any_number_of_threads(isa: str, heads: int) -> None:
    """One KV head is shared by all threads, two are taken whole, of three the last is shared: the same bits."""
    for names in (("band",), ("blocks",), ()):
        call = make_call(names, heads, Shape(1, 2 * heads, heads, 300, 270), dim=32, dim_v=16)
        with_bias(call, (1, 1, 1, 0), heads)
        first = call.run(threads=1)
        for threads in (2, 2, 3, 5):
            again = call.run(threads=threads)
            for name, tensor in first.items():
                assert torch.equal(tensor, again[name]), f"{isa}, {names}: {name} differs with {threads} threads"


def test_long_rows_are_worked_on_in_rounds() -> None:
    """More keys than one round's pool holds: several rounds, each over a part of the query tiles."""
    shape = Shape(1, 1, 1, 700, 3000)
    for names in (("intervals",), ("key range",)):
        call = make_call(names, 11, shape, dim=16, dim_v=16)
        check(call, call.run(threads=2), f"{names}")


@pytest.mark.parametrize("which", ["row_ptr per batch and head", "nothing visible"])
def test_blocks_at_their_edges(isa: str, which: str) -> None:
    shape = Shape(2, 3, 3, 129, 191)
    if which == "nothing visible":
        seen = torch.zeros(1, 1, shape.len_q, shape.len_k, dtype=torch.bool)
    else:
        seen = torch.rand(shape.full(), generator=torch.Generator().manual_seed(2)) < 0.02
    call = make_call((), 2, shape)
    call.mask, call.seen = LoweredMask(blocks=blocks_of(seen, True)), seen.expand(shape.full())
    check(call, call.run(), f"{isa}, {which}")


def test_intervals_far_apart_cost_what_they_show() -> None:
    """Bounds near the ends of int32, and a union whose runs touch, overlap and nest."""
    shape = Shape(1, 1, 1, 70, 500)
    low, high = -(2**31), 2**31 - 1
    for given in (
        [(low, high)],
        [(high, low), (low, 10)],
        [(490, high), (low, 5), (5, 9), (200, 260)],
        [(100, 400), (150, 160), (400, 410), (90, 101)],
        [(-5, 0), (500, 600)],
    ):
        bounds = torch.tensor(given, dtype=torch.int32).view(-1, 1, 1, 1, 2).expand(-1, 1, 1, shape.len_q, 2)
        call = make_call((), 4, shape)
        call.mask = LoweredMask(intervals=bounds.contiguous())
        call.seen = mask_truth(call.mask, shape)
        check(call, call.run(), str(given))
