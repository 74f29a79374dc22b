"""The CUDA backend's norms on CPU tensors through the emulation, against the reference backend.

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
    # Backward with 48 KiB of dynamic shared memory: the launch has to ask for more, since there is static one too.
    Norm("layer", (33, 768), BF16, residual=BF16, weight=BF16, bias=BF16, grad_z=True),
    Norm("layer", (11, 1280), BF16, weight=None, bias=None),
    Norm("layer", (17, 3584), F16, residual=F16, weight=F16, bias=F16, grad_z=True),
    Norm("rms", (7, 8192), BF16, weight=BF16, bias=None),
    # Three rows of one team on their way: more than the 99 KiB of compute capability 8.6 hold.
    Norm("rms", (7, 8192), BF16, residual=BF16, weight=BF16, bias=None, grad_z=True),
    Norm("layer", (3, 6160), F16, residual=F16, weight=F16, bias=F16, grad_z=True),
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
