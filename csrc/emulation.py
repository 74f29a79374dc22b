"""Builds kernels for a processor that lacks their instructions: `python csrc/emulation.py cpu|cuda` prints the folder.

cuda: the module _cuda and its library, the CUDA kernels as host C++ against csrc/cuda/emulation, for
FASTATTN_CUDA_EMULATION. cpu: libfastattn_cpu.so with the instruction sets that csrc/cpu/emulation stands in for, from
AVX-512 to AMX, and NEON, on a processor with AVX2; LD_LIBRARY_PATH puts it before the installed one.

Both are for tests. They need a C++20 compiler (CXX or g++), cuda pybind11 too; no CUDA toolkit. Objects are kept in
build/emulation under a hash of their preprocessed source and their command, so only what changed is compiled again;
several processes may build at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

CSRC = Path(__file__).resolve().parent
CUDA, CPU = CSRC / "cuda", CSRC / "cpu"
OUT = CSRC.parent / "build" / "emulation"
JOBS = 2

FLAGS = ["-std=c++20", "-fPIC", "-fno-math-errno", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]

CUDA_FLAGS = ["-march=native", "-Wno-unknown-pragmas", f"-I{CUDA / 'emulation'}"]  # #pragma unroll is nvcc's
CUDA_FLAGS.append('-DFASTATTN_CUDA_ARCHITECTURES="emulation"')
# Kernels are many template instances and wait for one another more than they compute: compile time counts.
CUDA_KERNEL = [*CUDA_FLAGS, "-O1", "-x", "c++"]
CUDA_RUNTIME = [*CUDA_FLAGS, "-O3"]

# As setup.py has it, but that compile time counts. Vectors of 64 bytes have no calling convention in AVX2, and need
# none; the warning of uninitialised values is false at -O1. What fuses products and sums belongs to -O2.
CPU_FLAGS = ["-O1", "-fexpensive-optimizations", "-fvisibility=hidden", "-Wno-psabi", "-Wno-maybe-uninitialized"]
CPU_KERNEL = [*CPU_FLAGS, "-fno-trapping-math", "-ffp-contract=fast", "-fno-exceptions", "-fopenmp"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
CPU_INSTRUCTION_SETS = {
    "amx": ["-include", str(CPU / "emulation" / "avx512.h"), "-DFASTATTN_EMULATE=3", *AVX2],
    "avx512bf16": ["-include", str(CPU / "emulation" / "avx512.h"), "-DFASTATTN_EMULATE=2", *AVX2],
    "avx512": ["-include", str(CPU / "emulation" / "avx512.h"), "-DFASTATTN_EMULATE=1", *AVX2],
    "neon": ["-include", str(CPU / "emulation" / "neon.h"), "-DFASTATTN_EMULATE=0", "-mfma"],
}


def compiler() -> list[str]:
    """The C++ compiler as a command; RuntimeError without one."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} is not on PATH: install g++ or set CXX to build the emulation")
    return command


def run(command: Sequence[str]) -> str:
    """Its standard output; RuntimeError with the compiler's words where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-6000:]}")
    return done.stdout


def digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


def compile_object(source: Path, flags: Sequence[str]) -> Path:
    command = [*compiler(), *FLAGS, *flags]
    # -march=native is spelled out by the macros it sets, which are part of what -E sees with -dD.
    text = run([*command, "-E", "-dD", str(source)])
    out = OUT / "objects" / f"{source.stem}-{digest(command, text)}.o"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_suffix(f".{os.getpid()}.tmp")
        run([*command, "-c", str(source), "-o", str(partial)])
        partial.rename(out)
    return out


def compile_all(sources: Sequence[tuple[Path, Sequence[str]]]) -> list[Path]:
    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(lambda pair: compile_object(*pair), sources))


def link(objects: Sequence[Path], out: Path, flags: Sequence[str]) -> None:
    """Whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    run([*compiler(), "-shared", *map(str, objects), "-o", str(partial), *flags])
    partial.rename(out)


@contextmanager
def locked() -> Iterator[None]:
    """One build at a time; a second one then finds everything done."""
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cuda_runtime() -> list[tuple[Path, Sequence[str]]]:
    return [(source, CUDA_RUNTIME) for source in sorted((CUDA / "emulation").glob("*.cpp"))]


def build_cuda() -> Path:
    """The folder with the module _cuda over the emulated kernels."""
    import pybind11

    kernels = [s for s in sorted(CUDA.rglob("*.cu")) if CUDA / "emulation" not in s.parents]
    python = [sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()]
    includes = [flag for path in dict.fromkeys(python) for flag in ("-isystem", path)]
    # Its own symbols only, as in the wheel: the module must not take names from another copy of pybind11.
    binding = (CSRC / "bindings" / "cuda.cpp", [*CUDA_FLAGS, "-O1", "-fvisibility=hidden", *includes])
    with locked():
        objects = compile_all([binding, *((kernel, CUDA_KERNEL) for kernel in kernels), *cuda_runtime()])
        folder = OUT / digest(*objects)
        module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not module.exists():
            library = folder / "libfastattn_cuda_emulation.so"
            link(objects[1:], library, [f"-Wl,-soname,{library.name}", "-Wl,--no-undefined"])
            link(objects[:1], module, [str(library), "-Wl,-rpath,$ORIGIN"])
    return folder


def build_cuda_test(source: Path) -> Path:
    """A shared library of one source file of CUDA kernels and the emulation."""
    with locked():
        objects = compile_all([(source, CUDA_KERNEL), *cuda_runtime()])
        library = OUT / digest(*objects) / f"lib{source.stem}.so"
        if not library.exists():
            link(objects, library, ["-Wl,--no-undefined"])
    return library


def build_cpu(instruction_sets: Sequence[str] = tuple(CPU_INSTRUCTION_SETS)) -> Path:
    """The folder with libfastattn_cpu.so of these instruction sets, emulated."""
    entries = CPU / "library.cpp"
    kernels = [source for source in sorted(CPU.rglob("*.cpp")) if source != entries]
    processor = ["-Wno-unused-function", "-include", str(CPU / "emulation" / "processor.h")]
    has = [f"-DFASTATTN_HAS_{isa.upper()}=1" for isa in instruction_sets]
    sources = [(entries, [*CPU_FLAGS, *processor, *has])]
    for isa in instruction_sets:
        flags = [*CPU_KERNEL, *CPU_INSTRUCTION_SETS[isa], f"-DFASTATTN_ISA={isa}"]
        sources += [(kernel, flags) for kernel in kernels]
    with locked():
        objects = compile_all(sources)
        library = OUT / digest(*objects) / "libfastattn_cpu.so"
        if not library.exists():
            link(objects, library, ["-fopenmp", f"-Wl,-soname,{library.name}", "-Wl,--no-undefined"])
    return library.parent


if __name__ == "__main__":
    builds = {"cpu": build_cpu, "cuda": build_cuda}
    if sys.argv[1:] not in [[name] for name in builds]:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(builds)}")
    print(builds[sys.argv[1]]())
