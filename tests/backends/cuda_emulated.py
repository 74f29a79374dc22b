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
from fastattn.masks.lowered import Blocks, LoweredMask
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
    y, z, mean, rstd = module.norm_forward(*forward)
    _, true_z, true_mean, true_rstd = reference.norm_forward(*forward)
    true_z = true_z if residual is not None or case.dropout_p else x
    grad_y, grad_z = tensor(case.shape, case.dtype), tensor(case.shape, true_z.dtype) if case.grad_z else None
    dx, dresidual, dweight, dbias = module.norm_backward(
        grad_y, grad_z, true_z, weight, true_mean, true_rstd, dropout_seed, case.kind, case.offset, case.dropout_p,
        case.dtype, weight is not None, bias is not None,
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


def check_forward(shape: Attention, mask: LoweredMask, visible: Tensor, scale: float | None = None) -> None:
    """The kernel under `mask` against float64 under the bool tensor `visible` (B, Hq, Sq, Skv)."""
    q, k, v = half_inputs(shape)
    scale = shape.dim**-0.5 if scale is None else scale
    out, lse = cuda.attention_forward(q, k, v, mask, None, None, None, scale, shape.softcap, 0.0)
    exact = (q.double(), k.double(), v.double(), LoweredMask(dense=visible))
    truth, true_lse = reference.attention_forward(*exact, None, None, None, scale, shape.softcap, 0.0)
    # Each p and the result are rounded once: two roundings of at most max|v|, and one more of slack.
    bound = 3 * unit_roundoff(shape.dtype) * float(v.abs().max())
    assert float((out.double() - truth).abs().max()) <= bound
    assert torch.equal(lse == -torch.inf, true_lse == -torch.inf)
    seen = true_lse != -torch.inf
    assert float((lse.double() - true_lse)[seen].abs().max()) <= 1e-4


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


def test_keys_that_nobody_sees_may_hold_anything() -> None:
    q, k, v = half_inputs(Attention(64, 64, 100, 130))
    end = torch.tensor([70, 0], dtype=torch.int32)
    arguments = LoweredMask(key_end=end), None, None, None, 0.125, 0.0, 0.0
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
    out, lse = cuda.attention_forward(q, k, v, LoweredMask(), None, None, None, 0.125, 0.0, 0.0)
    assert out[0, 0, 3].isnan().all()
    assert lse[0, 0, 3].isnan()
    assert out.isnan().sum() == 64


def test_forward_is_bitwise_repeatable_whatever_order_warps_run_in(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = half_inputs(Attention(64, 64, 200, 190))
    results = []
    for seed in range(3):
        monkeypatch.setenv("FASTATTN_EMULATION_SEED", str(seed))
        mask = LoweredMask(band_right=0)
        results.append(cuda.attention_forward(q, k, v, mask, None, torch.zeros(2), None, 0.125, 0.0, 0.0))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
