"""Builds the CUDA kernels as host C++ against the emulation: `python csrc/cuda/emulation/build.py` prints the folder.

The folder holds the module _cuda and its library, ready for FASTATTN_CUDA_EMULATION. Needs a C++20 compiler (CXX or
g++) and pybind11; no CUDA toolkit. Objects are kept in build/emulation under a hash of their preprocessed source and
their command, so only what changed is compiled again; several processes may build at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

CUDA = Path(__file__).resolve().parents[1]
CSRC = CUDA.parent
OUT = CSRC.parent / "build" / "emulation"
JOBS = 2

WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]  # #pragma unroll is nvcc's
FLAGS = ["-std=c++20", "-fPIC", "-march=native", "-fno-math-errno", *WARNINGS, f"-I{CUDA / 'emulation'}", f"-I{CSRC}"]
FLAGS.append('-DFASTATTN_CUDA_ARCHITECTURES="emulation"')
# Kernels are many template instances and wait for one another more than they compute: compile time counts.
KERNEL = ["-O1", "-x", "c++"]
RUNTIME = ["-O3"]


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
    out.parent.mkdir(parents=True, exist_ok=True)
    run([*compiler(), "-shared", *map(str, objects), "-o", str(out), *flags])


@contextmanager
def locked() -> Iterator[None]:
    """One build at a time; a second one then finds everything done."""
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def runtime() -> list[tuple[Path, Sequence[str]]]:
    return [(source, RUNTIME) for source in sorted((CUDA / "emulation").glob("*.cpp"))]


def build_module() -> Path:
    """The folder with the module _cuda over the emulated kernels."""
    import pybind11

    kernels = [s for s in sorted(CUDA.rglob("*.cu")) if CUDA / "emulation" not in s.parents]
    python = [sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()]
    includes = [flag for path in dict.fromkeys(python) for flag in ("-isystem", path)]
    # Its own symbols only, as in the wheel: the module must not take names from another copy of pybind11.
    binding = (CSRC / "bindings" / "cuda.cpp", ["-O1", "-fvisibility=hidden", *includes])
    with locked():
        objects = compile_all([binding, *((kernel, KERNEL) for kernel in kernels), *runtime()])
        folder = OUT / digest(*objects)
        module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not module.exists():
            library = folder / "libfastattn_cuda_emulation.so"
            link(objects[1:], library, [f"-Wl,-soname,{library.name}", "-Wl,--no-undefined"])
            partial = folder / f"module.{os.getpid()}.tmp"
            link(objects[:1], partial, [str(library), "-Wl,-rpath,$ORIGIN"])
            partial.rename(module)
    return folder


def build_library(source: Path) -> Path:
    """A shared library of one source file of kernels and the emulation."""
    with locked():
        objects = compile_all([(source, KERNEL), *runtime()])
        library = OUT / digest(*objects) / f"lib{source.stem}.so"
        if not library.exists():
            link(objects, library, ["-Wl,--no-undefined"])
    return library


if __name__ == "__main__":
    print(build_module())
