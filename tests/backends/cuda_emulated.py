"""The CUDA backend on CPU tensors through the emulation, against the reference backend.

test_cuda_emulated.py runs this file in a process of its own, with FASTATTN_CUDA_EMULATION set. The backend functions
are called directly, so that each output is compared, statistics included, and so that wide rows take their own paths.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastattn.backends import cuda, reference
from fastattn.backends.cuda import library
from fastattn.biases.lowered import NO_BIAS, LoweredBias
from fastattn.masks.lowered import Blocks, LoweredMask
from fastattn.packed import Packed
from fastattn.parity.bound import unit_roundoff

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Norm(NamedTuple):
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    residual: torch.dtype | None = None
    dropout_p: float = 0.0
    offset: float = 0.0
    weight: torch.dtype | None = F32
    bias: torch.dtype | None = F32
    grad_z: bool = False


NORMS = [
    Norm("layer", (2, 3, 24), F32),
    Norm("layer", (7, 384), F32, residual=F32, dropout_p=0.1, grad_z=True),
    Norm("layer", (3, 2, 100), BF16, residual=F32, dropout_p=0.3, grad_z=True, weight=BF16, bias=F32),
    Norm("layer", (5, 33), F16, weight=F16, bias=None, dropout_p=0.5),
    Norm("rms", (5, 1032), F16, residual=F16, dropout_p=0.1, offset=1.0, bias=None, grad_z=True),
    Norm("rms", (9, 1), F32, weight=None, bias=None),
    Norm("rms", (0, 16), F32, residual=F32),
    Norm("layer", (21, 4096), BF16, residual=BF16),
    Norm("layer", (3, 2, 1024), BF16, bias=None),
    Norm("layer", (5, 2048), F16, weight=F16, bias=F16, grad_z=True),
    Norm("layer", (4, 3080), BF16, residual=BF16, weight=BF16, grad_z=True),
    # Whole chunks of every thread: one to four of them forward; backward rows of one warp and of several, of one team
    # and of several.
    Norm("rms", (3, 4096), BF16, weight=BF16, bias=None),
    Norm("layer", (19, 4096), BF16, residual=BF16, weight=BF16, bias=BF16, grad_z=True),
    Norm("layer", (90, 256), F16, weight=F16, bias=F16),
    Norm("rms", (70, 512), BF16, weight=BF16, bias=None, offset=1.0, residual=BF16, grad_z=True),
    Norm("layer", (33, 768), F16, weight=F16, bias=F16),
    Norm("layer", (11, 1280), BF16, weight=None, bias=None),
    Norm("layer", (17, 3584), F16, residual=F16, weight=F16, bias=F16, grad_z=True),
    Norm("rms", (7, 8192), BF16, weight=BF16, bias=None),
    Norm("layer", (9, 7168), F32, residual=F32, grad_z=True),
    Norm("layer", (3, 768), BF16, residual=F16, bias=BF16),
    Norm("layer", (5, 2048), F32),
    Norm("layer", (6, 4104), BF16, residual=F32, dropout_p=0.2, grad_z=True),
    Norm("layer", (3, 9001), F32, residual=BF16, dropout_p=0.1, grad_z=True),
    Norm("rms", (2, 20488), BF16, offset=1.0, bias=None, residual=BF16),
    Norm("layer", (1, 65536), F16, dropout_p=0.1),
]


def norm_outputs(module: object, case: Norm, seed: int) -> dict[str, Tensor]:
    """What forward and backward return for inputs drawn with `seed`; backward is given the reference's statistics."""
    draw = torch.Generator().manual_seed(seed)
    width = case.shape[-1]

    def tensor(shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor | None:
        return None if dtype is None else torch.randn(shape, generator=draw).to(dtype)

    x, residual = tensor(case.shape, case.dtype), tensor(case.shape, case.residual)
    weight, bias = tensor((width,), case.weight), tensor((width,), case.bias)
    dropout_seed = torch.tensor([-(2**62) + seed]) if case.dropout_p else None
    forward = (x, weight, bias, residual, dropout_seed, case.kind, 1e-5, case.offset, case.dropout_p)
    y, z, mean, rstd = module.norm_forward(*forward, True)
    again, _, *nothing = module.norm_forward(*forward, False)
    assert torch.equal(y, again) and [t.shape for t in nothing] == [(0,), (0,)]
    _, true_z, true_mean, true_rstd = reference.norm_forward(*forward, True)
    true_z = true_z if residual is not None or case.dropout_p else x
    grad_y, grad_z = tensor(case.shape, case.dtype), tensor(case.shape, true_z.dtype) if case.grad_z else None
    dx, dresidual, dweight, dbias = module.norm_backward(
        grad_y, grad_z, true_z, weight, true_mean, true_rstd, dropout_seed, case.kind, case.offset, case.dropout_p,
        case.dtype, case.weight, case.bias,
    )  # fmt: skip
    return dict(y=y, z=z, mean=mean, rstd=rstd, dx=dx, dresidual=dresidual, dweight=dweight, dbias=dbias)


@pytest.mark.parametrize("case", NORMS, ids=lambda c: f"{c.kind}-{c.shape}-{c.dtype}".replace("torch.", ""))
def test_norm_equals_the_reference(case: Norm) -> None:
    got, want = norm_outputs(cuda, case, seed=11), norm_outputs(reference, case, seed=11)
    for name, expected in want.items():
        found = got[name]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), name
        if expected.numel() == 0:
            continue
        # Two float32 computations of the same formula, each rounded once: two units of roundoff, and float32 noise.
        bound = (2 * unit_roundoff(expected.dtype) + 2**-20) * expected.abs().max().double()
        error = (found.double() - expected.double()).abs().max()
        assert error <= bound, f"{name} of {case}: error {error:.3g} > {bound:.3g}"


def test_kept_elements_are_bitwise_those_of_the_reference() -> None:
    for width in (384, 37, 9000):
        case = Norm("layer", (7, width), F32, dropout_p=0.3)
        assert torch.equal(norm_outputs(cuda, case, seed=5)["z"], norm_outputs(reference, case, seed=5)["z"])


@pytest.mark.parametrize("width", [128, 4200, 9000])
def test_weight_gradients_are_bitwise_repeatable(width: int) -> None:
    case = Norm("layer", (150 if width < 1000 else 11, width), F32)
    first, second = norm_outputs(cuda, case, seed=3), norm_outputs(cuda, case, seed=3)
    for name in ("dx", "dweight", "dbias"):
        assert torch.equal(first[name], second[name]), name


def test_a_stopped_kernel_is_an_exception_with_call_and_place() -> None:
    x = torch.randn(4, 40)
    message = r"norm_forward on cuda:0 with 4 x 40 elements .*: norm_forward, block .* at elements\.cuh:\d+: misaligned"
    with pytest.raises(RuntimeError, match=message):
        library.load().norm_forward(
            x=x.data_ptr(), residual=x.data_ptr() + 2, weight=0, bias=0, z=0, y=x.data_ptr(), mean=0,
            rstd=x.data_ptr(), dtypes=(0,) * 5, is_rms=True, rows=4, width=40, eps=1e-5, offset=0.0,
            dropout=(0, 0, 1.0), device=0, stream=0,
        )  # fmt: skip


# --- Attention ------------------------------------------------------------------------------------------------


class Attention(NamedTuple):
    dim: int
    dim_v: int
    len_q: int
    len_k: int
    heads_q: int = 2
    heads_kv: int = 1
    dtype: torch.dtype = BF16
    softcap: float = 0.0


def half_inputs(shape: Attention) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, shape.heads_q, shape.len_q, shape.dim)
    k = torch.randn(2, shape.heads_kv, shape.len_k, shape.dim)
    v = torch.randn(2, shape.heads_kv, shape.len_k, shape.dim_v)
    return q.to(shape.dtype), k.to(shape.dtype), v.to(shape.dtype)


def agree(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], v: Tensor) -> None:
    """out and lse of the kernel against those in float64."""
    # Each p and the result are rounded once: two roundings of at most max|v|, and one more of slack.
    bound = 3 * unit_roundoff(v.dtype) * float(v.abs().max())
    assert float((found[0].double() - truth[0]).abs().max()) <= bound
    assert torch.equal(found[1] == -torch.inf, truth[1] == -torch.inf)
    seen = truth[1] != -torch.inf
    assert not seen.any() or float((found[1].double() - truth[1])[seen].abs().max()) <= 1e-4


def check_forward(shape: Attention, mask: LoweredMask, visible: Tensor, scale: float | None = None) -> None:
    """The kernel under `mask` against float64 under the bool tensor `visible` (B, Hq, Sq, Skv)."""
    q, k, v = half_inputs(shape)
    rest = None, None, None, shape.dim**-0.5 if scale is None else scale, shape.softcap, 0.0
    exact = (q.double(), k.double(), v.double(), LoweredMask(dense=visible))
    agree(cuda.attention_forward(q, k, v, mask, NO_BIAS, *rest), reference.attention_forward(*exact, NO_BIAS, *rest), v)


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256, 8, 20, 72, 136])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
def test_head_dims(dim: int, extras: bool) -> None:
    shape = Attention(dim, dim, 130, 77, dtype=F16 if dim % 64 == 0 else BF16, softcap=20.0 if extras else 0.0)
    mask = LoweredMask(band_offset=77 - 130, band_right=0)
    visible = torch.arange(77) <= torch.arange(130).view(-1, 1) + 77 - 130
    check_forward(shape, mask, visible.expand(2, 2, 130, 77))


def blocks_of(visible: Tensor) -> Blocks:
    """Form D of a bool tensor (B, Hq, Sq, Skv); the transpose, which forward does not read, is left empty."""
    batch, heads, len_q, len_k = visible.shape
    nq, nk = -(-len_q // 64), -(-len_k // 64)
    whole = torch.zeros(batch, heads, nq * 64, nk * 64, dtype=torch.bool)
    whole[:, :, :len_q, :len_k] = visible
    exists = torch.zeros_like(whole)
    exists[:, :, :len_q, :len_k] = True
    col, ids, bitmaps, row_ptr = [], [], [torch.full((64,), -1, dtype=torch.int64)], [0]
    weights = torch.tensor([1 << i if i < 63 else -(1 << 63) for i in range(64)])
    for b in range(batch):
        for h in range(heads):
            if row_ptr[-1] != len(col) or len(row_ptr) % (nq + 1) == 0:
                row_ptr.append(len(col))
            for i in range(nq):
                for j in range(nk):
                    at = (b, h, slice(64 * i, 64 * i + 64), slice(64 * j, 64 * j + 64))
                    block = whole[at]
                    if block.any():
                        full = bool((block | ~exists[at]).all())
                        col.append(j)
                        ids.append(0 if full else len(bitmaps))
                        if not full:
                            bitmaps.append((block.long() * weights).sum(dim=1))
                row_ptr.append(len(col))
    pointers = torch.tensor(row_ptr, dtype=torch.int32).view(batch, heads, nq + 1)
    none = torch.empty(0, dtype=torch.int32)
    columns, names = torch.tensor(col, dtype=torch.int32), torch.tensor(ids, dtype=torch.int32)
    return Blocks(pointers, columns, names, torch.stack(bitmaps), none, none, none)


@pytest.mark.parametrize("dim", [64, 192])  # 128 and 64 queries to a tile
@pytest.mark.parametrize("kind", ["random", "blocks", "diagonal", "nothing"])
def test_blocks(dim: int, kind: str) -> None:
    len_q, len_k = 300, 270
    query, key = torch.arange(len_q).view(-1, 1), torch.arange(len_k)
    if kind == "random":
        visible = (torch.rand(2, 2, len_q, len_k) < 0.02) & (key // 64 != 2)
    elif kind == "blocks":
        visible = torch.rand(2, 2, 5, 5).lt(0.5).repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :len_q, :len_k]
    elif kind == "diagonal":
        visible = (((query - key) % 65 == 0) | (key < 64)).expand(2, 2, len_q, len_k)
    else:
        visible = torch.zeros(2, 2, len_q, len_k, dtype=torch.bool)
        visible[0, 0, 290, 260] = True
    check_forward(Attention(dim, dim, len_q, len_k), LoweredMask(blocks=blocks_of(visible)), visible)


@pytest.mark.parametrize("dim", [64, 192])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_intervals(dim: int, count: int) -> None:
    len_q, len_k = 200, 400
    bounds = torch.randint(-20, len_k + 40, (count, 2, 1, len_q, 2), dtype=torch.int32).sort(dim=-1).values
    bounds[0, 0, 0, :128] = torch.tensor([60, 330])  # tiles that one interval covers for all queries
    bounds[0, 1, 0, 5] = torch.tensor([2**31 - 1, -(2**31)])
    key = torch.arange(len_k)
    visible = ((key >= bounds[..., :1]) & (key < bounds[..., 1:])).any(dim=0).expand(2, 2, len_q, len_k)
    check_forward(Attention(dim, dim, len_q, len_k), LoweredMask(intervals=bounds), visible)


def test_keys_band_and_blocks_together() -> None:
    len_q, len_k = 150, 333
    bits = torch.rand(2, 384) < 0.8
    bits[0, 64:128] = True
    weights = torch.tensor([1 << i if i < 63 else -(1 << 63) for i in range(64)])
    words = (bits.view(2, 6, 64).long() * weights).sum(dim=-1)
    start, end = torch.tensor([3, 70], dtype=torch.int32), torch.tensor([300, 900], dtype=torch.int32)
    random = torch.rand(2, 2, len_q, len_k) < 0.7
    query, key = torch.arange(len_q).view(-1, 1), torch.arange(len_k)
    band = (key >= query + 100 - 90) & (key <= query + 100 + 40)
    keys = bits[:, None, None, :len_k] & (key >= start.view(2, 1, 1, 1)) & (key < end.view(2, 1, 1, 1))
    mask = LoweredMask(start, end, 100, 90, 40, key_bits=words, blocks=blocks_of(random))
    check_forward(Attention(48, 80, len_q, len_k), mask, random & band & keys)


def in_double(bias: LoweredBias) -> LoweredBias:
    return LoweredBias(*(part.double() if isinstance(part, Tensor) else part for part in bias))


BIASES = {
    "table": LoweredBias(table=torch.randn(2, 41), first=-30),
    "one table for all heads, one column": LoweredBias(table=torch.randn(1, 1), first=7),
    "slopes": LoweredBias(slopes=torch.tensor([[0.5, 0.01]])),
    "slopes per batch entry, top left": LoweredBias(slopes=torch.rand(2, 2), top_left=True),
    "all": LoweredBias(torch.randn(2, 1, 150, 1), torch.randn(2, 300), -100, torch.rand(1, 2), True),
    "finite stays finite": LoweredBias(
        torch.full((1, 1, 1, 1), -3e38), torch.full((1, 9), -3e38), -100, torch.tensor([[3e38, 0.0]])
    ),
    "hidden by -inf": LoweredBias(table=torch.tensor([[0.0, -torch.inf, 1.0]]), first=-1),
}


@pytest.mark.parametrize("dim", [64, 128, 192])
@pytest.mark.parametrize("name", BIASES)
def test_biases_by_distance(name: str, dim: int) -> None:
    shape = Attention(dim, dim, 150, 213, softcap=15.0 if name == "all" else 0.0)
    q, k, v = half_inputs(shape)
    mask = LoweredMask(band_offset=63, band_right=40)
    rest = None, None, None, dim**-0.5, shape.softcap, 0.0
    found = cuda.attention_forward(q, k, v, mask, BIASES[name], *rest)
    truth = reference.attention_forward(q.double(), k.double(), v.double(), mask, in_double(BIASES[name]), *rest)
    if (
        name == "finite stays finite"
    ):  # every score is the same lowest number: a mean, and an lse at the end of the range
        visible = torch.arange(213) <= torch.arange(150).view(-1, 1) + 63 + 40
        mean = (visible / visible.sum(dim=1, keepdim=True)).double() @ v.double()
        assert float((found[0].double() - mean).abs().max()) <= 3 * unit_roundoff(v.dtype) * float(v.abs().max())
        assert found[1].isfinite().all()
    else:
        agree(found, truth, v)


class Sequences(NamedTuple):
    """A packed batch: cu_seqlens, the rows that the tensors have, the longest lengths."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    rows: tuple[int, int]
    longest: tuple[int, int]


PACKED = {
    "several": Sequences((0, 70, 70, 71, 260), (0, 33, 40, 170, 170), (260, 170), (190, 140)),
    "rows of no sequence": Sequences((5, 20, 150), (3, 70, 100), (170, 110), (130, 67)),
    "cut off": Sequences((0, 100, 300), (0, 150, 260), (300, 260), (64, 70)),
    "past the tensors": Sequences((0, 50, 120), (0, 90, 200), (100, 150), (128, 128)),
    "no queries": Sequences((4, 4, 4), (0, 3, 9), (9, 9), (0, 9)),
    "no sequences": Sequences((0,), (0,), (5, 5), (0, 0)),
}


@pytest.mark.parametrize("dim", [64, 192])
@pytest.mark.parametrize("kind", ["plain", "causal", "intervals", "bias and dropout"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_batches(name: str, kind: str, dim: int) -> None:
    at = PACKED[name]
    cu = [torch.tensor(ends, dtype=torch.int32) for ends in (at.q, at.k)]
    packed, batch = Packed(cu[0], cu[1], *at.longest), len(at.q) - 1
    q = torch.randn(at.rows[0], 4, dim).to(BF16).transpose(0, 1)[None]
    k, v = (torch.randn(at.rows[1], 2, dim).to(BF16).transpose(0, 1)[None] for _ in range(2))
    mask, bias, seed, p = LoweredMask(), NO_BIAS, None, 0.0
    if kind == "causal":
        mask = LoweredMask(band_right=0, band_left=50)
    elif kind == "intervals":
        bounds = torch.randint(0, at.longest[1] + 9, (2, batch, 1, at.longest[0], 2), dtype=torch.int32)
        mask = LoweredMask(intervals=bounds.sort(dim=-1).values, key_end=torch.full((batch,), 100, dtype=torch.int32))
    elif kind == "bias and dropout":
        dense = torch.randn(batch, 1, 1, at.longest[1])
        bias = LoweredBias(dense, torch.randn(4, 60), -20, torch.rand(1, 4))
        seed, p = torch.tensor([77]), 0.25
    rest = packed, torch.randn(4), seed, dim**-0.5, 0.0, p
    exact = q.double(), k.double(), v.double(), mask, in_double(bias), packed, rest[1].double(), *rest[2:]
    agree(cuda.attention_forward(q, k, v, mask, bias, *rest), reference.attention_forward(*exact), v / (1 - p))


def test_keys_that_nobody_sees_may_hold_anything() -> None:
    q, k, v = half_inputs(Attention(64, 64, 100, 130))
    end = torch.tensor([70, 0], dtype=torch.int32)
    arguments = LoweredMask(key_end=end), NO_BIAS, None, None, None, 0.125, 0.0, 0.0
    want = cuda.attention_forward(q, k, v, *arguments)
    for b, first in enumerate(end):
        k[b, :, first:], v[b, :, first:] = torch.nan, torch.inf
    got = cuda.attention_forward(q, k, v, *arguments)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert not want[0][1].any()
    assert (want[1][1] == -torch.inf).all()


def test_nan_in_a_query_is_not_hidden() -> None:
    q, k, v = half_inputs(Attention(64, 64, 70, 70))
    q[0, 0, 3] = torch.nan
    out, lse = cuda.attention_forward(q, k, v, LoweredMask(), NO_BIAS, None, None, None, 0.125, 0.0, 0.0)
    assert out[0, 0, 3].isnan().all()
    assert lse[0, 0, 3].isnan()
    assert out.isnan().sum() == 64


def test_forward_is_bitwise_repeatable_whatever_order_warps_run_in(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = half_inputs(Attention(64, 64, 200, 190))
    results = []
    for seed in range(3):
        monkeypatch.setenv("FASTATTN_EMULATION_SEED", str(seed))
        mask = LoweredMask(band_right=0)
        results.append(cuda.attention_forward(q, k, v, mask, NO_BIAS, None, torch.zeros(2), None, 0.125, 0.0, 0.0))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("lowest", [torch.finfo(BF16).min, torch.finfo(F16).min, torch.finfo(F32).min])
def test_rows_at_the_lowest_number_keep_their_lse(lowest: float) -> None:
    """A dtype's lowest number for a mask, over whole rows: times log2 e it is beyond float32."""
    q, k, v = half_inputs(Attention(64, 64, 70, 130))
    bias = torch.zeros(1, 1, 70, 130)
    bias[:, :, 10:20] = lowest
    bias[:, :, 30:, :100] = lowest
    rest = None, None, None, 0.125, 0.0, 0.0
    _, found = cuda.attention_forward(q, k, v, LoweredMask(), LoweredBias(dense=bias), *rest)
    exact = q.double(), k.double(), v.double(), LoweredMask(), LoweredBias(dense=bias.double())
    _, truth = reference.attention_forward(*exact, *rest)
    assert float(((found.double() - truth) / truth.abs().clamp(min=1.0)).abs().max()) <= 1e-5
