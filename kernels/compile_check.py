"""Compiles the Triton kernels ahead of time, without a GPU: python -m fastattn.kernels.compile_check

The calls of VARIANTS run through the backend with meta tensors, and what it would launch is compiled for sm_80, sm_90
and sm_100, some for sm_86 and sm_120: the same tiles, arguments and options as on a GPU. One line each: kernel, call,
architecture, registers, stack bytes, shared memory, tensor-core instructions. Exit code 1 where
- shared memory is over the architecture's limit,
- a kernel that multiplies half-precision tiles has no tensor-core instruction,
- a forward for half inputs of head dims up to 128 without options or biases has a stack (spilled registers),
- attention for half inputs without options or biases loads elements one by one, not 16 bytes at a time,
- a stack is larger than compiled.json, beside this file, says. --write writes that file anew.

--drawn N asks another question: whether what the random cases of `fastattn verify` launch, with their every mixture of
options, compiles for sm_90, or the architecture that --arch names, at all.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastattn.kernels.tiles import SHARED_BYTES

COMMITTED = Path(__file__).with_name("compiled.json")
ONE_BY_ONE = re.compile(r"\bld\.global\S*\.[bu]16\b")
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")
MULTIPLYING = (
    "attention_forward_kernel",
    "attention_decode_kernel",
    "attention_queries_kernel",
    "attention_keys_kernel",
    "attention_bias_kernel",
    "attention_distance_kernel",
)


# The operations of verify that the backend has kernels for.
DRAWN = ("attention", "attention_decode", "norm", "linear_act", "ffn", "gated_ffn")


class Variant(NamedTuple):
    """A call of the backend. mask: of attention; "cache" or "pages" for decoding over one; or the name of another
    operation, whose width is dim. options: bias, softcap, sinks and dropout of attention, all at once; of decoding all
    but dropout, and a window and intervals too. distance: biases by distance, with gradients. packed: of attention.
    tokens: new ones of a sequence in decoding; from 16 on, Hopper's instructions multiply their tile. bias: the dtype
    of the options' bias, where it is another one. tf32: products of float32 may be rounded so."""

    dtype: str
    dim: int
    dim_v: int
    mask: str
    options: bool = False
    distance: bool = False
    packed: bool = False
    archs: tuple[int, ...] = (80, 90, 100)
    short: bool = False
    tokens: int = 1
    bias: str = ""
    tf32: bool = False

    @property
    def name(self) -> str:
        dims = f"d{self.dim}" if self.dim == self.dim_v else f"d{self.dim}/{self.dim_v}"
        extras = [name for name in ("options", "distance", "packed", "tf32") if getattr(self, name)]
        extras += [f"{self.tokens} tokens"] if self.tokens > 1 else []
        extras += [f"{self.bias} bias"] if self.bias else []
        return " ".join([self.dtype, dims, self.mask, *extras])


VARIANTS = [
    Variant("bfloat16", 64, 64, "causal"),
    Variant("bfloat16", 128, 128, "causal", short=True),
    Variant("bfloat16", 256, 256, "causal", archs=(80, 86, 90, 100)),
    Variant("float16", 80, 80, "none"),
    Variant("bfloat16", 16, 16, "causal"),
    Variant("float16", 40, 40, "none", archs=(80, 90)),
    Variant("bfloat16", 72, 72, "causal", packed=True, archs=(90,)),
    Variant("float16", 192, 128, "none", archs=(90,)),
    Variant("bfloat16", 96, 96, "none", options=True, archs=(90,)),
    Variant("float32", 64, 64, "causal", archs=(80, 90)),
    Variant("float32", 128, 128, "causal", archs=(90,)),
    Variant("float32", 256, 256, "none", archs=(86,)),
    Variant("float32", 256, 256, "causal", archs=(80, 86, 120), tf32=True),
    Variant("float32", 128, 128, "causal", archs=(86, 90), tf32=True),
    Variant("bfloat16", 64, 64, "dense", options=True),
    Variant("bfloat16", 128, 128, "keys", options=True, archs=(90,)),
    Variant("bfloat16", 64, 64, "blocks", archs=(80, 90)),
    Variant("bfloat16", 128, 128, "intervals", archs=(90,)),
    Variant("bfloat16", 64, 64, "causal", distance=True),
    Variant("bfloat16", 128, 128, "none", distance=True, archs=(90,)),
    Variant("bfloat16", 64, 64, "none", distance=True, archs=(86, 120)),
    Variant("bfloat16", 64, 64, "dense", options=True, distance=True, bias="float32", archs=(80, 86, 90, 100, 120)),
    Variant("bfloat16", 128, 128, "dense", options=True, distance=True, bias="float32", archs=(80, 86, 90, 100, 120)),
    Variant("bfloat16", 256, 256, "dense", options=True, distance=True, bias="float32", archs=(86, 90)),
    Variant("float32", 128, 128, "dense", options=True, distance=True, archs=(86,)),
    Variant("float32", 64, 64, "intervals", distance=True, packed=True, archs=(80,)),
    Variant("bfloat16", 64, 64, "causal", packed=True, archs=(80, 90)),
    Variant("bfloat16", 128, 128, "causal", packed=True, archs=(90,)),
    Variant("bfloat16", 64, 64, "cache"),
    Variant("bfloat16", 128, 128, "cache", options=True, distance=True, archs=(80, 90)),
    Variant("bfloat16", 128, 128, "pages", short=True),
    Variant("bfloat16", 64, 64, "cache", options=True, archs=(90, 100), tokens=16),
    Variant("bfloat16", 128, 128, "cache", options=True, distance=True, bias="float32", archs=(86, 120)),
    Variant("bfloat16", 128, 128, "cache", options=True, distance=True, bias="float32", archs=(86, 90), tokens=16),
    Variant("float16", 256, 256, "pages", archs=(86, 90)),
    Variant("float32", 256, 256, "cache", archs=(86, 90)),
    Variant("bfloat16", 1024, 1024, "norm", short=True),
    Variant("bfloat16", 16384, 16384, "norm", archs=(90,)),
    Variant("bfloat16", 1024, 1024, "linear_act", archs=(80, 90, 100), short=True),
    Variant("float32", 1024, 1024, "gated_ffn", archs=(90,), short=True),
]


class Compiled(NamedTuple):
    """What came of one kernel of one call on one architecture."""

    kernel: str
    variant: str
    arch: int
    registers: int
    stack: int
    shared: int
    tensor_core: str
    one_by_one: int  # instructions that load a single element of 16 bits

    @property
    def key(self) -> str:
        return f"{self.kernel}, {self.variant}, sm_{self.arch}"


def launches(variant: Variant, arch: int) -> list[Any]:
    """What the backend launches for forward and backward of one call, each kernel once."""
    from fastattn.backends.triton.launch import recording

    with recording(arch) as found, _matmul_precision("high" if variant.tf32 else "highest"):
        if variant.mask in ("norm", "linear_act", "gated_ffn"):
            _call_layer(variant)
        elif variant.mask in ("cache", "pages"):
            _call_decode(variant)
        else:
            _call_attention(variant)
    return list({launch.kernel.__name__: launch for launch in found}.values())


@contextlib.contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    """Within the block torch.set_float32_matmul_precision(name)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _call_layer(variant: Variant) -> None:
    """A norm with all options, a linear layer, or a feed-forward layer with dropout, of (64, dim) rows."""
    from fastattn.backends import triton as backend

    dtype, dim = getattr(torch, variant.dtype), variant.dim
    x = torch.empty(64, dim, dtype=dtype, device="meta")
    weight, bias = x.new_empty(dim, dim), x.new_empty(dim)
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    if variant.mask == "norm":
        residual = x.float()
        y, z, mean, rstd = backend.norm_forward(x, bias, bias, residual, seed, "layer", 1e-5, 0.0, 0.1, True)
        backend.norm_backward(y, z, z, bias, mean, rstd, seed, "layer", 0.0, 0.1, dtype, dtype, dtype)
    elif variant.mask == "linear_act":
        y, pre = backend.linear_act_forward(x, weight, bias, "gelu", True)
        backend.linear_act_backward(y, x, weight, pre, "gelu", True, True, True)
    else:
        weights = (weight, bias, weight, bias, weight, bias)
        y, gate, up = backend.gated_ffn_forward(x, *weights, seed, "silu", 0.1, True)
        backend.gated_ffn_backward(y, x, weight, weight, weight, gate, up, seed, "silu", 0.1, *[True] * 7)


def _call_decode(variant: Variant) -> None:
    """New tokens of 4 sequences over 2,048 cached keys, 4 query heads for each of keys."""
    from fastattn.backends import triton as backend
    from fastattn.biases.lowered import LoweredBias
    from fastattn.masks.lowered import LoweredMask

    own = getattr(torch, variant.dtype)

    def tensor(*shape: int, dtype: torch.dtype = own) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def numbers(*shape: int) -> torch.Tensor:
        return tensor(*shape, dtype=torch.int32)

    batch, heads, heads_kv, room, page = 4, 16, 4, 2048, 16
    bias_dtype = getattr(torch, variant.bias or variant.dtype)
    pages = variant.mask == "pages"
    shape = (batch * room // page, page, heads_kv) if pages else (batch, heads_kv, room)
    mask = LoweredMask(band_left=1000, band_right=0, intervals=numbers(2, batch, 1, 1, 2))
    bias = LoweredBias(
        dense=tensor(1, heads, variant.tokens, room, dtype=bias_dtype) if variant.options else None,
        table=tensor(heads, 257, dtype=torch.float32) if variant.distance else None,
        first=-128,
        slopes=tensor(1, heads, dtype=torch.float32) if variant.distance else None,
    )
    backend.attention_decode(
        tensor(batch, heads, variant.tokens, variant.dim),
        tensor(*shape, variant.dim),
        tensor(*shape, variant.dim_v),
        numbers(batch),
        numbers(batch, room // page) if pages else None,
        mask if variant.options else LoweredMask(),
        bias,
        tensor(heads, dtype=torch.float32) if variant.options else None,
        0.125,
        30.0 * variant.options,
    )


def _call_attention(variant: Variant) -> None:
    from fastattn.backends import triton as backend
    from fastattn.biases.lowered import LoweredBias
    from fastattn.masks.lowered import Blocks, LoweredMask
    from fastattn.packed import Packed

    dtype, meta = getattr(torch, variant.dtype), torch.device("meta")
    batch, heads, heads_kv, length = 2, 8, 4, 1024
    bias_dtype = getattr(torch, variant.bias or variant.dtype)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=meta)

    def numbers(*shape: int) -> torch.Tensor:
        return tensor(*shape, dtype=torch.int32)

    masks = {
        "none": LoweredMask(),
        "causal": LoweredMask(band_right=0),
        "keys": LoweredMask(
            key_start=numbers(batch), key_end=numbers(batch), key_bits=tensor(batch, length // 64, dtype=torch.int64)
        ),
        "dense": LoweredMask(dense=tensor(batch, heads, length, length, dtype=torch.bool)),
        "intervals": LoweredMask(intervals=numbers(3, 1, heads, length, 2)),
        "blocks": LoweredMask(
            blocks=Blocks(
                row_ptr=numbers(1, heads, 17),
                col=numbers(99),
                id=numbers(99),
                bitmaps=tensor(5, 64, dtype=torch.int64),
                col_ptr=numbers(1, heads, 17),
                row=numbers(99),
                row_id=numbers(99),
            )
        ),
    }
    # (B, S, H, D) in memory, as projections leave them; packed (1, B S, H, D)
    rows = (1, batch * length) if variant.packed else (batch, length)
    q = tensor(*rows, heads, variant.dim).transpose(1, 2)
    k = tensor(*rows, heads_kv, variant.dim).transpose(1, 2)
    v = tensor(*rows, heads_kv, variant.dim_v).transpose(1, 2)
    packed = Packed(numbers(batch + 1), numbers(batch + 1), length, length) if variant.packed else None
    bias = LoweredBias(
        dense=tensor(1, heads, length, length, dtype=bias_dtype) if variant.options else None,
        table=tensor(heads, 257, dtype=torch.float32) if variant.distance else None,
        first=-128,
        slopes=tensor(1, heads, dtype=torch.float32) if variant.distance else None,
    )
    sinks = tensor(heads, dtype=torch.float32) if variant.options else None
    seed = tensor(1, dtype=torch.int64) if variant.options else None
    extras = (
        masks[variant.mask], bias, packed, sinks, seed, 0.125, 30.0 * variant.options, 0.1 * variant.options
    )  # fmt: skip
    out, lse = backend.attention_forward(q, k, v, *extras)
    grad_lse = lse if variant.options else None
    wanted = (variant.options, variant.distance, variant.distance, variant.options)
    backend.attention_backward(out, grad_lse, q, k, v, out, lse, *extras, *wanted, deterministic=True)


def compile_launch(variant: Variant, arch: int, index: int) -> Compiled:
    """Compiles one launch for one architecture."""
    return _compiled(launches(variant, arch)[index], variant.name, arch)


def drawn_launches(op: str, index: int, arch: int) -> list[Any]:
    """What the backend launches for a case of `fastattn verify`, forward and backward. Nothing runs, so that what the
    case finds means nothing."""
    from fastattn.backends.triton.launch import recording
    from fastattn.parity.cases import draw_case

    torch.set_num_threads(1)
    with recording(arch) as found:
        draw_case(op, 0, index).run("triton")
    return found


def compile_drawn(op: str, index: int, position: int, arch: int) -> Compiled:
    """Compiles one launch of a drawn case."""
    return _compiled(drawn_launches(op, index, arch)[position], f"{op} 0.{index}", arch)


def unlike_launches(op: str, cases: int, arch: int) -> list[tuple[str, int, int]]:
    """(op, case, position) of each launch in the first so many cases that compiles to something new."""
    seen = set()
    jobs = []
    for index in range(cases):
        for position, launch in enumerate(drawn_launches(op, index, arch)):
            _, *parts = _source(launch)
            key = (launch.kernel.__name__, repr(parts), repr(sorted(launch.options.items())))
            if key not in seen:
                seen.add(key)
                jobs.append((op, index, position))
    return jobs


def _compiled(launch: Any, name: str, arch: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, attributes = _source(launch)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    registers, stack = resources(compiled.asm["cubin"])
    text = compiled.asm["ptx"]
    kinds = "+".join(sorted(set(TENSOR_CORE.findall(text)))) or "-"
    shared, one_by_one = compiled.metadata.shared, len(ONE_BY_ONE.findall(text))
    return Compiled(kernel.__name__, name, arch, registers, stack, shared, kinds, one_by_one)


def _source(launch: Any) -> tuple[Any, dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], list[Any]]]:
    """The kernel, and what a launch makes of its arguments: types, constants, and which are multiples of 16."""
    kernel, arguments, _ = launch
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}
    for at, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        kind, aligned = argument_type(value, parameter.is_constexpr, not parameter.do_not_specialize)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(at,)] = value
        elif aligned:
            attributes[(at,)] = [["tt.divisibility", 16]]
    return kernel, signature, constants, attributes


def argument_type(value: Any, is_constant: bool, specialises: bool) -> tuple[str, bool]:
    """What a launch makes of an argument: its type in a signature, and whether it is known to be a multiple of 16."""
    if is_constant or value is None or (specialises and isinstance(value, int) and value == 1):
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        names = {
            torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.bool: "i1", torch.uint8: "u8",
            torch.int32: "i32", torch.int64: "i64",
        }  # fmt: skip
        return "*" + names[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), specialises and value % 16 == 0


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes (of which spills are a part) of the kernel in a cubin, by Triton's own cuobjdump."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers:\n{text}")
    return int(found[1]), int(found[2])


def troubles(found: Compiled, variant: Variant, committed: dict[str, int]) -> list[str]:
    """What is wrong with a compiled kernel, by the rules of this module."""
    wrong = []
    half = variant.dtype != "float32"
    if found.shared > SHARED_BYTES[found.arch]:
        wrong.append(f"{found.shared} bytes of shared memory, {SHARED_BYTES[found.arch]} are there")
    if half and found.kernel in MULTIPLYING and found.tensor_core == "-":
        wrong.append("no tensor-core instruction")
    plain = half and max(variant.dim, variant.dim_v) <= 128 and not (variant.options or variant.distance)
    if plain and found.kernel == "attention_forward_kernel" and found.stack > 0:
        wrong.append(f"a stack of {found.stack} bytes in a plain forward")
    attention = variant.mask not in ("norm", "linear_act", "gated_ffn", "cache", "pages")
    if half and attention and not (variant.options or variant.distance) and found.one_by_one:
        wrong.append(f"{found.one_by_one} loads of single elements")
    if found.key not in committed:
        wrong.append("not in compiled.json: run with --write")
    elif found.stack > committed[found.key]:
        wrong.append(f"a stack of {found.stack} bytes, {committed[found.key]} in compiled.json")
    return wrong


def check_drawn(cases: int, processes: int, arch: int) -> int:
    """Compiles what drawn cases launch, all of which has to fit a block's shared memory. Returns the exit code."""
    context = multiprocessing.get_context("spawn")
    compiled, failed = 0, 0
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        each = pool.map(unlike_launches, DRAWN, [cases] * len(DRAWN), [arch] * len(DRAWN))
        jobs = [job for found in each for job in found]
        running = [(job, pool.submit(compile_drawn, *job, arch)) for job in jobs]
        for (op, index, position), future in running:
            where = f"{op} 0.{index}, launch {position}, sm_{arch}"
            error = future.exception()
            if error is not None:
                failed += 1
                print(f"FAILED: {where}: {type(error).__name__}: {str(error)[-300:]}", flush=True)
                continue
            found = future.result()
            compiled += 1
            if found.shared > SHARED_BYTES[arch]:
                failed += 1
                print(f"FAILED: {where}: {found.kernel} with {found.shared} bytes of shared memory", flush=True)
    print(f"{compiled} kernels of drawn cases compiled, {failed} failed")
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Compiles and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time and check what came of it.")
    parser.add_argument("--short", action="store_true", help="only the variants marked short, for sm_90")
    parser.add_argument(
        "--drawn", type=int, metavar="N", help="instead what the first N cases of each operation of verify launch"
    )
    parser.add_argument("--arch", type=int, choices=SHARED_BYTES, default=90, help="for which --drawn compiles")
    parser.add_argument("--write", action="store_true", help="write compiled.json from what was found")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="how many compile at a time")
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")

    if given.drawn:
        return check_drawn(given.drawn, given.processes, given.arch)
    jobs = []
    for variant in VARIANTS:
        if given.short and not variant.short:
            continue
        for arch in (90,) if given.short else variant.archs:
            jobs += [(variant, arch, index) for index in range(len(launches(variant, arch)))]
    committed = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    context = multiprocessing.get_context("spawn")
    results, failed = {}, 0
    with concurrent.futures.ProcessPoolExecutor(given.processes, mp_context=context) as pool:
        running = [(variant, pool.submit(compile_launch, variant, arch, i)) for variant, arch, i in jobs]
        for variant, future in running:
            found = future.result()
            results[found.key] = found.stack
            wrong = troubles(found, variant, results if given.write else committed)
            failed += bool(wrong)
            print(
                f"{found.kernel:26s} {found.variant:36s} sm_{found.arch:<4d} {found.registers:4d} registers "
                f"{found.stack:6d} stack {found.shared:7d} shared  {found.tensor_core}"
                + "".join(f"\n    FAILED: {sentence}" for sentence in wrong),
                flush=True,
            )
    if given.write:
        COMMITTED.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    print(f"{len(results)} kernels compiled, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
