"""The norm kernels compile ahead of time for the GPUs they are written for, with all features on and with all off."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

# Under TRITON_INTERPRET=1 a kernel is not compilable, and other tests set it: so this runs in a process of its own.
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastattn.kernels import norm

capability = int(sys.argv[1])


def compile_all(block, full):
    half, wide = "*bf16", "*fp32" if full else "*bf16"
    extra = "*fp32" if full else None
    values = dict(
        x=half, residual=extra, weight=extra, bias=extra, seed_pointer="*i64" if full else None, z_out=wide, y=half,
        mean_out="*fp32", rstd_out="*fp32", mean_in="*fp32", rstd_in="*fp32", grad_y=half, grad_z=extra, z=wide,
        dx=half, dresidual=wide, weight_parts="*fp32", bias_parts="*fp32", rows="i32", width="i32", eps="fp32",
        offset="fp32", threshold="i32", scale="fp32", IS_RMS=not full, HAS_RESIDUAL=full, HAS_WEIGHT=full,
        HAS_BIAS=full, HAS_DROPOUT=full, HAS_GRAD_Z=full, STORES_RESIDUAL=full, SUMS_WEIGHT=full, SUMS_BIAS=full,
        ONE_BLOCK=block < 8192, BLOCK=block,
    )
    for kernel in (norm.norm_forward_kernel, norm.norm_backward_kernel, norm.norm_column_sums_kernel):
        given = {name: values[name] for name in kernel.arg_names}
        signature = {name: value if isinstance(value, str) else "constexpr" for name, value in given.items()}
        constants = {(kernel.arg_names.index(n),): v for n, v in given.items() if not isinstance(v, str)}
        source = ASTSource(kernel, signature, constants)
        target = GPUTarget("cuda", capability, 32)
        asm = triton.compile(source, target=target, options={"num_warps": block // 512}).asm
        print(kernel.__name__, block, full, f"sm_{capability}" in asm["ptx"], len(asm["cubin"]) > 1000)


compile_all(512, full=True)
compile_all(512, full=False)
compile_all(8192, full=True)
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_ahead_of_time_compilation(fresh_process, capability: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = fresh_process(COMPILE, str(capability), TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr[-4000:]
    kernels = "norm_forward_kernel", "norm_backward_kernel", "norm_column_sums_kernel"
    variants = "512 True", "512 False", "8192 True"
    assert run.stdout.splitlines() == [f"{kernel} {variant} True True" for variant in variants for kernel in kernels]
