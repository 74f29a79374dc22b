"""What ptxas made of the CUDA kernels: `python tests/packaging/kernel_gate.py [library]` prints it, fails on a fault.

Per kernel and architecture: registers of a thread, stack, static shared memory, launch bound, and how many tensor-core
(HMMA, or HGMMA where the kernel multiplies by wgmma) and local-memory (LDL, STL: spills and arrays that found no
registers) instructions the machine code has, how often it waits for wgmma, how many exponentials it computes beside
products by wgmma, and how many stores to global memory that move less than 16 bytes.
A fault is any local memory, more registers than a block of the launch bound can have, attention without its tensor-core
instructions, products by wgmma that the compiler made wait for one another, or made the softmax wait for, or a kernel
of whole vectors that stores more than its statistics by less than 16 bytes.
Needs cuobjdump, of a CUDA toolkit or of the triton package. The library is by default the installed one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REGISTERS_OF_A_BLOCK = 65536
REGISTERS_OF_A_THREAD = 255
# What the names of kernels match, and the tensor-core instructions that they are to have.
TENSOR_CORE_KERNELS = {r"attention_\w+_sm90": "HGMMA", "attention_": "HMMA"}
INSTRUCTIONS = r"Function : |HMMA\.|HGMMA\.|WARPGROUP\.DEPBAR|MUFU\.EX2|LDL|STL|STG"  # of machine code, all that count
PRODUCTS_PER_WAIT = 4  # of wgmma, at least: where registers are not safe the compiler waits behind each
# Between the wait for all products but the last ones and the wait for those: a softmax of 64 keys has 32 of a thread.
EXPONENTIALS_BESIDE_PRODUCTS = 32
# Kernels of whole vectors, and what else they store: norm_forward a row's mean and rstd. A compiler that loses sight of
# an alignment splits a vector into four words.
NARROW_STORES = {
    "norm_forward_kernel<true": 2,
    "norm_backward_wide_kernel<true": 0,
    "activation_forward_kernel<true": 0,
    "activation_backward_kernel<true": 0,
}


@dataclass
class Kernel:
    """One kernel in the machine code of one architecture."""

    architecture: str
    name: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    threads: int = 0
    hmma: int = 0
    hgmma: int = 0
    waits: int = 0
    beside: int | None = None  # the most exponentials beside products; none where nothing runs beside them
    local: int = 0
    narrow: int = 0

    def faults(self) -> list[str]:
        """What is wrong with it, as sentences; empty for a good one."""
        found = []
        if self.local or self.stack:
            found.append(f"uses local memory: {self.stack} bytes of stack, {self.local} LDL and STL")
        # Registers are given out to warps eight at a time per thread.
        rounded = -(-self.registers // 8) * 8
        if self.threads == 0:
            found.append("has no launch bound")
        elif self.registers > REGISTERS_OF_A_THREAD or rounded * self.threads > REGISTERS_OF_A_BLOCK:
            found.append(f"has {self.registers} registers, too many for its launch bound of {self.threads} threads")
        wanted = next((w for name, w in TENSOR_CORE_KERNELS.items() if re.match(name, self.plain_name())), "")
        if wanted and not (self.hgmma if wanted == "HGMMA" else self.hmma):
            found.append(f"has no {wanted} instruction")
        if self.waits * PRODUCTS_PER_WAIT > self.hgmma:
            found.append(f"waits {self.waits} times for {self.hgmma} products by wgmma")
        if self.beside is not None and self.beside < EXPONENTIALS_BESIDE_PRODUCTS:
            found.append(f"computes {self.beside} exponentials beside products by wgmma, and the others behind them")
        for name, most in NARROW_STORES.items():
            if self.plain_name().startswith(name) and self.narrow > most:
                found.append(f"stores {self.narrow} times less than 16 bytes, where {most} do")
        return found

    def plain_name(self) -> str:
        """The kernel's name and template arguments, without what surrounds them."""
        text = demangled(self.name).removeprefix("void ").replace("(anonymous namespace)::", "")
        return re.sub(r"\(\w+\)(?=-?\d)|\(bool\)|__nv_", "", text).split("(")[0]


@functools.cache
def demangled(name: str) -> str:
    """As C++ spells it, where c++filt is there; else the symbol."""
    if shutil.which("c++filt") is None:
        return re.sub(r"^_Z(N\d+_GLOBAL__N_\w*?)?\d+", "", name)
    return subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()


def cuobjdump() -> str | None:
    """The program, from PATH, a CUDA toolkit or the triton package; None where there is none."""
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return found


def lines_of(program: str, option: str, library: Path, words: str) -> Iterator[tuple[str, str]]:
    """The lines of a dump with one of `words`, between bars, and the architecture that each belongs to.

    A dump has hundreds of megabytes, nearly all of which nobody asks for: grep drops it where it is here.
    """
    dump = subprocess.Popen([program, option, str(library)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    command = ["grep", "-aE", f"^arch = |{words}"] if shutil.which("grep") else ["cat"]
    fast = {**os.environ, "LC_ALL": "C"}
    with dump, subprocess.Popen(command, stdin=dump.stdout, stdout=subprocess.PIPE, text=True, env=fast) as found:
        architecture = ""
        for line in found.stdout or ():
            if line.startswith("arch = "):
                architecture = line.removeprefix("arch = ").rstrip()
            yield architecture, line
    if dump.returncode:
        raise subprocess.CalledProcessError(dump.returncode, dump.args)


def read_kernels(program: str, library: Path) -> list[Kernel]:
    """All kernels of the machine code in a library."""
    kernels: dict[tuple[str, str], Kernel] = {}

    def at(architecture: str, name: str) -> Kernel:
        return kernels.setdefault((architecture, name), Kernel(architecture, name))

    name = ""
    for architecture, line in lines_of(program, "--dump-resource-usage", library, " Function |REG:"):
        if function := re.match(r" Function (\S+):", line):
            name = function[1]
        elif usage := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            kernel = at(architecture, name)
            kernel.registers, kernel.stack, kernel.shared = map(int, usage.groups())
    beside: int | None = None
    for architecture, line in lines_of(program, "--dump-sass", library, INSTRUCTIONS):
        if function := re.match(r"\s*Function : (\S+)", line):
            name, beside = function[1], None
        elif re.search(r"\bHMMA\.", line):
            at(architecture, name).hmma += 1
        elif re.search(r"\bHGMMA\.", line):
            at(architecture, name).hgmma += 1
        elif "WARPGROUP.DEPBAR" in line:
            kernel = at(architecture, name)
            kernel.waits += 1
            if beside is not None:
                kernel.beside = max(beside, kernel.beside or 0)
            beside = 0 if re.search(r"gsb0, 0x[1-9a-f]", line) else None
        elif beside is not None and "MUFU.EX2" in line:
            beside += 1
        elif re.search(r"\b(LDL|STL)\b", line):
            at(architecture, name).local += 1
        elif re.search(r"\bSTG\b", line) and not re.search(r"\bSTG\.\S*128\b", line):
            at(architecture, name).narrow += 1
    bound = False
    for architecture, line in lines_of(program, "-elf", library, "^\\.nv\\.info\\.|Attribute:|Value:"):
        if section := re.match(r"\.nv\.info\.(\S+)$", line):
            name = section[1]
        elif "Attribute:" in line:
            bound = "EIATTR_MAX_THREADS" in line
        elif bound and (value := re.match(r"\s*Value:\s*0x(\w+) 0x(\w+) 0x(\w+)", line)):
            x, y, z = (int(number, 16) for number in value.groups())
            at(architecture, name).threads = x * y * z
    return sorted(kernels.values(), key=lambda kernel: (kernel.plain_name(), kernel.architecture))


def table(kernels: list[Kernel]) -> str:
    """One line per kernel and architecture."""
    lines = ["arch   regs stack shared threads  HMMA HGMMA waits beside local narrow  kernel"]
    for k in kernels:
        usage = f"{k.registers:4d} {k.stack:5d} {k.shared:6d} {k.threads:7d}"
        instructions = f"{k.hmma:5d} {k.hgmma:5d} {k.waits:5d} {k.beside or 0:6d} {k.local:5d} {k.narrow:6d}"
        lines.append(f"{k.architecture:6s} {usage} {instructions}  {k.plain_name()}")
    return "\n".join(lines)


def installed_library() -> Path:
    """libfastattn_cuda.so of the fastattn that Python imports."""
    import fastattn

    return Path(fastattn.__file__).parent / "_lib" / "libfastattn_cuda.so"


def main(arguments: list[str]) -> int:
    """Prints the table and the faults; 1 where there are any, 2 where it cannot look."""
    library = Path(arguments[0]) if arguments else installed_library()
    program = cuobjdump()
    if program is None or not library.exists():
        print("cuobjdump is not here" if program is None else f"{library} does not exist", file=sys.stderr)
        return 2
    kernels = read_kernels(program, library)
    print(table(kernels))
    faults = [f"{k.architecture} {k.plain_name()} {fault}" for k in kernels for fault in k.faults()]
    print("\n".join(faults) or f"{len(kernels)} kernels pass")
    return 1 if faults or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
