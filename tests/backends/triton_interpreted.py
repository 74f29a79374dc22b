"""The Triton backend's norms, on CPU tensors through Triton's interpreter, against the reference backend.

test_triton.py runs this file in a process of its own: whether Triton interprets is decided when it is first imported.
The backend functions are called directly, so that each output is compared, statistics and partial sums included.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastattn.backends import reference
from fastattn.backends import triton as backend
from fastattn.parity.bound import unit_roundoff

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class Case(NamedTuple):
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    residual: torch.dtype | None = None
    dropout_p: float = 0.0
    offset: float = 0.0
    weight: torch.dtype | None = F32
    bias: torch.dtype | None = F32
    grad_z: bool = False


CASES = [
    Case("layer", (2, 3, 24), F32),
    Case("layer", (7, 384), F32, residual=F32, dropout_p=0.1, grad_z=True),
    Case("layer", (3, 2, 100), BF16, residual=F32, dropout_p=0.3, grad_z=True, weight=BF16, bias=F32),
    Case("layer", (3, 100), BF16, residual=F32, weight=None, bias=BF16),
    Case("layer", (5, 33), F16, weight=F16, bias=None, dropout_p=0.5),
    Case("layer", (4, 64), BF16, weight=None, bias=None),
    Case("layer", (1, 1), F32, residual=F32),
    Case("rms", (5, 33), F16, residual=F16, dropout_p=0.1, offset=1.0, bias=None, grad_z=True),
    Case("rms", (6, 128), F32, bias=F32),
    Case("rms", (9, 1), F32, weight=None, bias=None),
    Case("rms", (0, 16), F32, residual=F32),
    Case("layer", (3, 9000), F32, residual=BF16, dropout_p=0.1, grad_z=True),
    Case("rms", (2, 20000), BF16, offset=1.0, bias=None),
    Case("layer", (1, 65536), F16),
]


def outputs(module: object, case: Case, seed: int) -> dict[str, Tensor]:
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


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}-{c.shape}-{c.dtype}".replace("torch.", ""))
def test_norm_equals_the_reference(case: Case) -> None:
    got, want = outputs(backend, case, seed=11), outputs(reference, case, seed=11)
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
    case = Case("layer", (7, 384), F32, dropout_p=0.3)
    assert torch.equal(outputs(backend, case, seed=5)["z"], outputs(reference, case, seed=5)["z"])


@pytest.mark.parametrize("width", [128, 9000])
def test_weight_gradients_are_bitwise_repeatable(width: int) -> None:
    case = Case("layer", (150 if width < 1000 else 70, width), F32)
    first, second = outputs(backend, case, seed=3), outputs(backend, case, seed=3)
    for name in ("dx", "dweight", "dbias"):
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[7]], ids=lambda c: c.kind)
def test_parity_rule(case: Case) -> None:
    from fastattn.parity.rule import check_norm, failures

    torch.manual_seed(13)
    width = case.shape[-1]
    x, residual = torch.randn(case.shape).to(case.dtype), torch.randn(case.shape).to(case.residual)
    rows = check_norm(
        x,
        torch.randn(width).to(case.weight),
        None if case.bias is None else torch.randn(width).to(case.bias),
        backend="triton",
        kind=case.kind,
        offset=case.offset,
        residual=residual,
        dropout_p=case.dropout_p,
        dropout_seed=torch.tensor([99]) if case.dropout_p else None,
    )
    assert not failures(rows), failures(rows)
