"""Decoding of the CUDA backend on CPU tensors through the emulation, against the reference backend in float64.

test_cuda_emulated.py runs this file in a process of its own, with FASTATTN_CUDA_EMULATION set. The backend function is
called directly: what the operator would refuse, such as a page that is not there, must not reach past the tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import masks
from fastattn.backends import cuda, reference
from fastattn.backends.cuda import attention, decode, library
from fastattn.biases.lowered import NO_BIAS, LoweredBias
from fastattn.masks.lowered import LoweredMask
from fastattn.parity.bound import unit_roundoff

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NO_MASK = LoweredMask()


class Shape(NamedTuple):
    dim: int = 64
    dim_v: int = 64
    group: int = 2
    len_q: int = 1
    room: int = 300
    lengths: tuple[int, ...] = (300, 130)
    heads_kv: int = 2
    dtype: torch.dtype = BF16


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor


def draw(shape: Shape) -> Inputs:
    batch, heads = len(shape.lengths), shape.heads_kv
    q = torch.randn(batch, heads * shape.group, shape.len_q, shape.dim)
    k, v = (torch.randn(batch, heads, shape.room, dim) for dim in (shape.dim, shape.dim_v))
    return Inputs(*(t.to(shape.dtype) for t in (q, k, v)), torch.tensor(shape.lengths, dtype=torch.int32))


def in_pages(cache: Tensor, page_size: int, table: Tensor, pages: int) -> Tensor:
    """A cache (B, Hkv, S, D) as pages (pages, page size, Hkv, D) that a table (B, n) names; the others hold NaN."""
    spread = torch.full((pages, page_size, cache.shape[1], cache.shape[3]), torch.nan, dtype=cache.dtype)
    for b, names in enumerate(table.tolist()):
        for n, page in enumerate(names):
            rows = cache[b, :, n * page_size : (n + 1) * page_size].transpose(0, 1)
            spread[page, : rows.shape[0]] = rows
    return spread


def in_double(bias: LoweredBias) -> LoweredBias:
    return LoweredBias(*(part.double() if isinstance(part, Tensor) else part for part in bias))


def run(
    given: Inputs, mask: LoweredMask = NO_MASK, bias: LoweredBias = NO_BIAS, table: Tensor | None = None, **rest: Any
) -> tuple[Tensor, Tensor]:
    scale = rest.pop("scale", given.q.shape[3] ** -0.5)
    return cuda.attention_decode(*given, table, mask, bias, rest.pop("sinks", None), scale, rest.pop("softcap", 0.0))


def check(given: Inputs, mask: LoweredMask = NO_MASK, bias: LoweredBias = NO_BIAS, **rest: Any) -> None:
    """The kernel against float64."""
    found = run(given, mask, bias, **rest)
    exact = (given.q.double(), given.k.double(), given.v.double(), given.lengths)
    sinks = rest.get("sinks")
    truth = reference.attention_decode(
        *exact, None, mask, in_double(bias), None if sinks is None else sinks.double(),
        rest.get("scale", given.q.shape[3] ** -0.5), rest.get("softcap", 0.0),
    )  # fmt: skip
    agree(found, truth, given.v)


def agree(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], v: Tensor) -> None:
    # Weights are exact to twice the digits of the dtype: what is left is the rounding of the result, and float32 noise.
    largest = float(v.nan_to_num(0.0, 0.0, 0.0).abs().max())
    bound = (unit_roundoff(v.dtype) + 2**-16) * largest
    assert float((found[0].double() - truth[0]).abs().max()) <= bound
    assert torch.equal(found[1] == -torch.inf, truth[1] == -torch.inf)
    seen = truth[1] != -torch.inf
    assert not seen.any() or float((found[1].double() - truth[1])[seen].abs().max()) <= 1e-4


def same(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1])


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU so large that each part is one tile of the largest size."""
    monkeypatch.setattr(decode, "multiprocessors", lambda _: 1000)


@pytest.mark.parametrize("dim", [64, 128, 256, 8, 20, 72, 136])
@pytest.mark.parametrize("rows", [1, 16, 17, 70, 130])
def test_head_dims_and_rows(dim: int, rows: int) -> None:
    check(draw(Shape(dim, dim, rows, dtype=F16 if dim % 64 == 0 else BF16)))


@pytest.mark.parametrize("dims", [(64, 128), (256, 24), (33, 200), (128, 1)])
def test_values_of_another_width(dims: tuple[int, int]) -> None:
    check(draw(Shape(*dims, len_q=3)), LoweredMask(band_right=0))


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("dim", [64, 100, 256])
@pytest.mark.parametrize("group", [4, 20])
def test_parts(dim: int, group: int) -> None:
    """Of 64 keys each; whole ones, one that a length cuts, and some behind it."""
    check(draw(Shape(dim, dim, group, room=500, lengths=(500, 64, 65, 1, 0))), sinks=torch.randn(2 * group))


@pytest.mark.parametrize("len_q", range(1, 9))
@pytest.mark.parametrize("band", [(None, 0), (30, 0), (7, None), (0, 0), (-3, 20), (40, -2), (2**40, 2**40)])
def test_bands(len_q: int, band: tuple[int | None, int | None]) -> None:
    shape = Shape(len_q=len_q, room=200, lengths=(200, 133, 5))
    check(draw(shape), LoweredMask(band_left=band[0], band_right=band[1]))


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("len_q", [1, 40])
def test_a_window_in_parts_of_many_rows(len_q: int) -> None:
    check(draw(Shape(len_q=len_q, room=900, lengths=(900, 333))), LoweredMask(band_left=150, band_right=0))


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("heads", [1, 4])
def test_intervals(count: int, heads: int) -> None:
    bounds = torch.randint(-20, 340, (count, 2, heads, 5, 2), dtype=torch.int32).sort(dim=-1).values
    bounds[0, 1, 0, 3] = torch.tensor([2**31 - 1, -(2**31)])
    bounds[:, 0, 0, 2] = 7  # sees nothing
    check(draw(Shape(len_q=5)), LoweredMask(intervals=bounds))
    check(draw(Shape(len_q=5)), LoweredMask(band_left=100, band_right=0, intervals=bounds))


BIASES = {
    "dense": LoweredBias(torch.randn(2, 4, 3, 300)),
    "dense of half, broadcast": LoweredBias(torch.randn(1, 4, 1, 300).to(BF16)),
    "dense of another half, one for all keys": LoweredBias(torch.randn(2, 1, 3, 1).to(F16)),
    "dense, by columns": LoweredBias(torch.randn(300, 3, 4, 2).permute(3, 2, 1, 0)),
    "table": LoweredBias(table=torch.randn(4, 41), first=-30),
    "one table for all heads, one column": LoweredBias(table=torch.randn(1, 1), first=7),
    "slopes": LoweredBias(slopes=torch.rand(1, 4)),
    "slopes per batch entry": LoweredBias(slopes=torch.rand(2, 4)),
    "all": LoweredBias(torch.randn(2, 1, 3, 300), torch.randn(4, 300), -100, torch.rand(1, 4)),
    "hidden by -inf": LoweredBias(table=torch.tensor([[0.0, -torch.inf, 1.0]]), first=-1),
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("dim", [64, 256])
def test_biases(name: str, dim: int) -> None:
    softcap = 15.0 if name == "all" else 0.0
    check(draw(Shape(dim, dim, len_q=3)), LoweredMask(band_right=0), BIASES[name], softcap=softcap)


def test_a_finite_bias_stays_finite() -> None:
    """Every score is the same lowest number: a mean, and an lse at the end of the range."""
    given = draw(Shape(lengths=(300, 300)))
    bias = LoweredBias(torch.full((1, 1, 1, 1), -3e38), torch.full((1, 9), -3e38), -100, torch.tensor([[3e38] * 4]))
    out, lse = run(given, bias=bias)
    mean = given.v.double().mean(dim=2, keepdim=True).repeat_interleave(2, dim=1)
    assert float((out.double() - mean).abs().max()) <= 2 * unit_roundoff(BF16)
    assert lse.isfinite().all()


@pytest.mark.parametrize("options", [{"scale": -0.3}, {"scale": 0.0}, {"softcap": 2.0}, {"softcap": 30.0}], ids=str)
@pytest.mark.parametrize("group", [3, 30])
def test_scales_and_softcaps(options: dict[str, float], group: int) -> None:
    check(draw(Shape(group=group, len_q=2)), LoweredMask(band_right=0), **options)


def test_sinks() -> None:
    sinks = torch.tensor([-50.0, 0.0, 5.0, 300.0])
    given = draw(Shape())
    check(given, sinks=sinks)
    same(run(given, sinks=sinks.to(BF16)), run(given, sinks=sinks.to(BF16).float()))


@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 300])
@pytest.mark.parametrize("dim", [64, 20])
def test_pages_are_bitwise_the_contiguous_cache(page_size: int, dim: int) -> None:
    each = -(-300 // page_size)
    given = draw(Shape(dim, dim, len_q=2, room=each * page_size))
    table = torch.randperm(2 * each + 3)[: 2 * each].view(2, each).int()
    k, v = (in_pages(cache, page_size, table, 2 * each + 3) for cache in (given.k, given.v))
    mask = LoweredMask(band_left=200, band_right=0)
    for name in range(-(-130 // page_size), each):  # past the second sequence's end
        table[1, name] = (-5, 10**9)[name % 2]
    same(run(given._replace(k=k, v=v), mask, table=table), run(given, mask))


def test_pages_and_lengths_beyond_the_cache_are_clamped() -> None:
    given = draw(Shape(room=4, lengths=(4, 4)))._replace(lengths=torch.tensor([96, 96], dtype=torch.int32))
    k, v = (torch.randn(6, 16, 2, 64).to(BF16) for _ in range(2))
    wild = torch.tensor([[0, -7, 5, 6, 2**31 - 1, -(2**31)], [1, 2, 3, 4, 5, 5]], dtype=torch.int32)
    same(run(given._replace(k=k, v=v), table=wild), run(given._replace(k=k, v=v), table=wild.clamp(0, 5)))
    whole = draw(Shape(room=100, lengths=(100, 0)))
    beyond = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32)
    same(run(whole._replace(lengths=beyond), LoweredMask(band_left=20)), run(whole, LoweredMask(band_left=20)))


def test_no_pages_at_all() -> None:
    given = draw(Shape())._replace(k=torch.empty(0, 16, 2, 64, dtype=BF16), v=torch.empty(0, 16, 2, 64, dtype=BF16))
    out, _ = run(given, table=torch.zeros(2, 3, dtype=torch.int32))
    assert not out.any()


@pytest.mark.parametrize("room", [0, 300])
@pytest.mark.parametrize("parts", [2, 1000])
def test_queries_that_see_no_key(room: int, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "multiprocessors", lambda _: parts)
    given = draw(Shape(len_q=4, room=room, lengths=(0, min(room, 2))))
    given.k[0], given.v[0] = torch.nan, torch.inf
    out, lse = run(given, LoweredMask(band_right=0), sinks=torch.randn(4))
    assert not out[0].any()
    assert (lse[0] == -torch.inf).all()
    assert not out[1, :, :2].any()  # before the first key
    assert (lse[1, :, :2] == -torch.inf).all()
    assert lse[1, :, 2:].isfinite().all() == (room > 0)


@pytest.mark.parametrize("parts", [2, 1000])
@pytest.mark.parametrize("hidden", ["length", "bias", "interval", "window"])
def test_keys_that_nobody_sees_may_hold_anything(hidden: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "multiprocessors", lambda _: parts)
    given, mask, bias = draw(Shape(len_q=2, lengths=(250, 70))), LoweredMask(band_right=0), NO_BIAS
    key = torch.arange(300)
    nobody = key >= given.lengths.view(-1, 1)
    if hidden == "bias":
        nobody = nobody | (key % 5 == 2)
        bias = LoweredBias(torch.zeros(300).masked_fill(key % 5 == 2, -torch.inf).view(1, 1, 1, 300))
    elif hidden == "interval":
        nobody = nobody | ((key >= 20) & (key < 60)) | (key >= 200)
        mask = LoweredMask(intervals=torch.tensor([[0, 20], [60, 200]], dtype=torch.int32).view(2, 1, 1, 1, 2))
    elif hidden == "window":
        nobody = nobody | (key < given.lengths.view(-1, 1) - 2 - 33)
        mask = LoweredMask(band_left=33, band_right=0)
    want = run(given, mask, bias)
    at = nobody[:, None, :, None]
    spoiled = given._replace(k=given.k.masked_fill(at, torch.nan), v=given.v.masked_fill(at, torch.inf))
    same(run(spoiled, mask, bias), want)
    check(given, mask, bias)


def test_nan_that_is_seen_comes_out() -> None:
    given = draw(Shape(lengths=(300, 300)))
    given.k[1, 1, 77, 3] = torch.nan
    out, lse = run(given)
    assert out[1, 2:].isnan().all()
    assert lse[1, 2:].isnan().all()
    assert out.isnan().sum() == 128


@pytest.mark.parametrize("layout", ["heads inside", "one element off", "odd rows", "expanded"])
def test_layouts(layout: str) -> None:
    given = draw(Shape(lengths=(300, 300)))

    def laid_out(t: Tensor) -> Tensor:
        if layout == "heads inside":
            return t.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "one element off":
            return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)
        if layout == "odd rows":
            return torch.cat((t, t[..., :3]), dim=3)[..., : t.shape[3]]
        return t[:1, :1].expand(t.shape)

    check(Inputs(*(laid_out(t) for t in given[:3]), given.lengths))


@pytest.mark.usefixtures("many_parts")
def test_results_are_bitwise_repeatable_whatever_order_warps_run_in(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = draw(Shape(128, 128, room=700, lengths=(700, 300))), draw(Shape(group=30, room=500, lengths=(500, 3)))
    results = []
    for seed in range(4):
        monkeypatch.setenv("FASTATTN_EMULATION_SEED", str(seed))
        results.append([run(given, sinks=torch.zeros(given.q.shape[1])) for given in (few, many)])
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            same(one, other)


def test_small_weights_of_many_keys_are_not_lost_in_float16() -> None:
    """One key with nearly all the weight, and a thousand whose weights are below float16's smallest number."""
    q, k, v = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1001, 16), torch.ones(1, 1, 1001, 16)
    q[..., 0], k[:, :, 0, 0], v[:, :, 0] = 1.0, 18.0, 0.0
    given = Inputs(q.to(F16), k.to(F16), v.to(F16), torch.tensor([1001], dtype=torch.int32))
    out, _ = run(given, scale=1.0)
    weight = torch.exp(torch.tensor(-18.0, dtype=torch.float64))
    assert float((out.double() / (1000 * weight) - 1).abs().max()) <= 0.01


@pytest.mark.parametrize(
    ("mask", "goes"),
    [
        ({}, True),
        ({"mask": masks.Causal()}, True),
        ({"mask": masks.KeyLengths([200, 70])}, True),
        ({"mask": masks.SlidingWindow(9, 0), "softcap": 3.0}, True),
        ({"bias": torch.linspace(-1, 1, 300).view(1, 1, 1, -1)}, True),
        ({"mask": masks.Causal("top-left")}, False),
    ],
)
@pytest.mark.parametrize("len_q", [1, 3])
def test_attention_of_few_queries_is_decoding(
    monkeypatch: pytest.MonkeyPatch, mask: dict[str, Any], goes: bool, len_q: int
) -> None:
    went: list[bool] = []
    real = attention.attention_decode
    monkeypatch.setattr(attention, "attention_decode", lambda *args: went.append(True) or real(*args))
    given = draw(Shape(group=3, len_q=len_q, dim_v=32))
    found = fastattn.attention(*given[:3], **mask, return_lse=True, backend="cuda")
    assert bool(went) == goes
    expected = fastattn.attention(*(t.float() for t in given[:3]), **mask, return_lse=True, backend="reference")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other, atol=2e-2, rtol=2e-2)


def test_a_refused_launch_names_the_call() -> None:
    given = draw(Shape())
    message = r"attention_decode on cuda:0 with q \(2, 4, 1, 64\) and a cache of 2 heads and 300 keys .*: invalid"
    pointer = given.q.data_ptr()
    view = (pointer, *given.q.stride())
    with pytest.raises(RuntimeError, match=message):
        library.load().attention_decode(
            dtype=1, sizes=(2, 4, 2, 1, 64, 64, 300), q=view, k=view, v=view, out=view, lse=pointer, entries=2,
            cache_lengths=given.lengths.data_ptr(), pages=(0, 0, 0), band=(None, None), intervals=None, n_intervals=0,
            bias=None, bias_dtype=0, distance=(0,) * 6 + (False,), sinks=0, scale=1.0, softcap=0.0,
            parts=(2, 192, 0, 0), device=0, stream=0,
        )  # fmt: skip
