"""Builds the native libraries of fastattn with ninja; everything else is in pyproject.toml.

csrc/cpu/**.cpp       -> fastattn/_lib/libfastattn_cpu.so    each kernel source once per instruction set
csrc/bindings/cpu*.cpp-> fastattn/_cpu.<abi>.so              a thin pybind11 module over it
csrc/cuda/**.cu       -> fastattn/_lib/libfastattn_cuda.so   where nvcc is found; csrc/cuda/emulation is for tests
csrc/bindings/cuda.cpp-> fastattn/_cuda.<abi>.so

No torch here: the libraries take pointers, so one wheel serves every torch version.

Environment: CXX names the compiler, FASTATTN_CUDA=0/1 turns the CUDA library off or insists on it, CUDA_HOME says
where nvcc is, MAX_JOBS limits the jobs. FASTATTN_PREBUILT=1 takes the libraries in fastattn/_lib as they are, built
elsewhere, and compiles only the modules. Without a C++ compiler fastattn installs as pure Python.
Objects stay in build/native, so a second build compiles only what changed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "native"
MACOS = sys.platform == "darwin"
PREBUILT = os.environ.get("FASTATTN_PREBUILT") == "1"

COMMON_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
]
KERNEL_FLAGS = ["-fno-exceptions"]  # kernels are C in all but templates; nothing may unwind through a parallel region
OPENMP_COMPILE = ["-Xpreprocessor", "-fopenmp"] if MACOS else ["-fopenmp"]
OPENMP_LINK = ["-lomp"] if MACOS else ["-fopenmp"]

AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
INSTRUCTION_SETS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": AVX512,
        "avx512bf16": [*AVX512, "-mavx512bf16"],
        "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    },
    "aarch64": {"neon": []},
}
MACHINE_ALIASES = {"amd64": "x86_64", "arm64": "aarch64"}

# sm_80 code runs on Ampere and Ada, sm_90 code on Hopper; drivers compile the PTX for what came later, which takes
# seconds when a process first needs a kernel, and a driver as new as the toolkit. All three come from the PTX of 8.0,
# which is therefore made once: kernels that need more are compiled for their architecture by name.
# FASTATTN_CUDA_ARCHITECTURES names others, such as "sm_80 sm_120 compute_80"; `make wheel` adds Blackwell's.
CUDA_ARCHITECTURES = ["sm_80", "sm_90", "compute_80"]
CUDA_VIRTUAL = "compute_80"
# Sources of kernels that exist for one architecture, by how their names begin: wgmma is Hopper's alone.
CUDA_SPECIFIC = {"sm90_": "90a"}
CUDA_FLAGS = ["-std=c++20", "-O3", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
# Host code that calls device code compiles with a warning, and ends the process.
CUDA_FLAGS += ["-Werror", "cross-execution-space-call"]


def say(sentence: str) -> None:
    print(f"fastattn: {sentence}", file=sys.stderr, flush=True)


# --- What this machine can compile --------------------------------------------------------------------------


def compiles(command: list[str], source: str, suffix: str) -> bool:
    """Whether `command` turns `source` into a shared library; successes are remembered in build/native."""
    program = shutil.which(command[0])
    if program is None:
        return False
    stamp = os.stat(program)
    key = repr((command, source, program, stamp.st_mtime_ns, stamp.st_size))
    folder = BUILD / "probe" / hashlib.sha256(key.encode()).hexdigest()[:16]
    passed = folder / "passed"
    if passed.exists():
        return True
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"probe{suffix}").write_text(source)
    run = subprocess.run(
        [*command, f"probe{suffix}", "-o", "probe.so"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if run.returncode == 0:
        passed.touch()
    return run.returncode == 0


@cache
def compiler() -> list[str]:
    """The C++ compiler as a command, or [] where there is none that builds a C++20 OpenMP library."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++" if shutil.which("g++") else "c++"]
    probe = "#include <cstdint>\n#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
    flags = [*COMMON_FLAGS, *OPENMP_COMPILE, "-shared"]
    if instruction_sets() and compiles([*command, *flags, *OPENMP_LINK], probe, ".cpp"):
        return command
    return []


def machine() -> str:
    name = platform.machine().lower()
    return MACHINE_ALIASES.get(name, name)


def instruction_sets() -> dict[str, list[str]]:
    return INSTRUCTION_SETS.get(machine(), {}) if os.name == "posix" else {}


def accepted_instruction_sets() -> dict[str, list[str]]:
    """The instruction sets whose flags the compiler takes; an old one lacks the newest."""
    accepted = {}
    for name, flags in instruction_sets().items():
        if compiles([*compiler(), *flags, "-shared", "-fPIC"], "int probe() { return 0; }\n", ".cpp"):
            accepted[name] = flags
        else:
            say(f"the compiler does not take {' '.join(flags)}: the {name} kernels are left out.")
    return accepted


@cache
def nvcc() -> list[str]:
    """nvcc as a command, or []. FASTATTN_CUDA=0 turns it off; =1 makes its absence an error."""
    wanted = os.environ.get("FASTATTN_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SetupError(f"FASTATTN_CUDA is {wanted!r}; set it to 0 (CPU only) or 1 (CUDA required), or leave it unset")
    if wanted == "0":
        return []
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which(str(Path(home) / "bin" / "nvcc"))
    if found is None:
        if wanted == "1":
            raise SetupError(
                "FASTATTN_CUDA=1, but nvcc is neither on PATH nor in CUDA_HOME/bin; "
                "install the CUDA toolkit, or set FASTATTN_CUDA=0"
            )
        return []
    command = [found, "-ccbin", compiler()[0]]
    probe = "__global__ void probe(int* x) { *x = 1; }\nvoid launch(int* x) { probe<<<1, 1>>>(x); }\n"
    if compiles([*command, *CUDA_FLAGS, *code_for([CUDA_VIRTUAL]), "-shared"], probe, ".cu"):
        return command
    sentence = f"{found} does not compile a C++20 kernel for {CUDA_VIRTUAL} with {compiler()[0]}"
    if wanted == "1":
        raise SetupError(f"FASTATTN_CUDA=1, but {sentence}; install CUDA 12 or later, or set FASTATTN_CUDA=0")
    say(f"{sentence}: the CUDA kernels are left out.")
    return []


def code_for(names: list[str]) -> list[str]:
    """nvcc's flags for machine code, or PTX, of these names."""
    return [flag for name in names for flag in ("-gencode", f"arch={CUDA_VIRTUAL},code={name}")]


@cache
def cuda_architectures() -> tuple[str, ...]:
    """Those that are asked for, less those that nvcc cannot make."""
    asked = os.environ.get("FASTATTN_CUDA_ARCHITECTURES", "").replace(",", " ").split() or CUDA_ARCHITECTURES
    for name in asked:
        if name != CUDA_VIRTUAL and not re.fullmatch(r"sm_\d+[a-z]?", name):
            raise SetupError(
                f"FASTATTN_CUDA_ARCHITECTURES names {name!r}: pass machine code such as sm_80 and, for PTX, "
                f"{CUDA_VIRTUAL}, with spaces between them"
            )
    known = []
    for name in asked:
        if compiles([*nvcc(), *CUDA_FLAGS, *code_for([name]), "-shared"], "__global__ void probe() {}\n", ".cu"):
            known.append(name)
        else:
            say(f"nvcc makes no {name} of {CUDA_VIRTUAL}: its code is left out.")
    if CUDA_VIRTUAL not in known:  # a device for which there is no code could not run kernels that it is said to have
        raise SetupError(
            f"FASTATTN_CUDA_ARCHITECTURES={' '.join(asked)} lacks {CUDA_VIRTUAL}, which every GPU can use: add it"
        )
    return tuple(known)


def gencode(source: str) -> list[str]:
    """What a source is compiled for."""
    for prefix, name in CUDA_SPECIFIC.items():
        if source.startswith(prefix):
            return ["-gencode", f"arch=compute_{name},code=sm_{name}"]
    return code_for(list(cuda_architectures()))


# --- build.ninja --------------------------------------------------------------------------------------------


def quoted(arguments: list[str]) -> str:
    """Arguments for a ninja command line: quoted for the shell, `$` doubled for ninja."""
    return " ".join(shlex.quote(a) for a in arguments).replace("$", "$$")


def ninja_path(path: Path | str) -> str:
    text = str(path)
    for character in "$ :":
        text = text.replace(character, f"${character}")
    return text


@dataclass
class NinjaFile:
    """build.ninja: three rules, then one build line per object, library and module."""

    lines: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rule("cxx", [*compiler()], "-MMD -MF $out.d $flags -c $in -o $out", depfile=True)
        self.rule("link", [*compiler()], "-shared $in -o $out $flags")
        if nvcc():
            self.rule("nvcc", nvcc(), "-MMD -MF $out.d $flags -c $in -o $out", depfile=True)
            self.rule("nvlink", nvcc(), "-shared $in -o $out $flags")

    def rule(self, name: str, command: list[str], arguments: str, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {quoted(command)} {arguments}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(
        self, rule: str, out: str, sources: list[str], flags: list[str], implicit: list[str] | None = None
    ) -> str:
        inputs = " ".join(map(ninja_path, sources))
        extra = " | " + " ".join(map(ninja_path, implicit)) if implicit else ""
        self.lines += [f"build {ninja_path(out)}: {rule} {inputs}{extra}", f"  flags = {quoted(flags)}"]
        return out

    def run(self, verbose: bool) -> None:
        BUILD.mkdir(parents=True, exist_ok=True)
        self.lines += ["default " + " ".join(map(ninja_path, self.targets)), ""]
        (BUILD / "build.ninja").write_text("\n".join(self.lines))
        command = [ninja_program(), "-C", str(BUILD)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        if verbose:
            command.append("-v")
        if subprocess.run(command).returncode != 0:
            raise SetupError("the native libraries did not compile; the first error of the compiler is above")


def ninja_program() -> str:
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
    if found is None:
        raise SetupError("ninja is needed to compile the native libraries; run: pip install ninja pybind11")
    return found


def library_flags(name: str) -> list[str]:
    return [f"-Wl,-install_name,@rpath/{name}"] if MACOS else [f"-Wl,-soname,{name}", "-Wl,--no-undefined"]


def add_cpu_library(ninja: NinjaFile) -> str:
    folder = ROOT / "csrc" / "cpu"
    common = [*COMMON_FLAGS, *OPENMP_COMPILE, f"-I{ROOT / 'csrc'}"]
    built = accepted_instruction_sets()
    has = [f"-DFASTATTN_HAS_{name.upper()}=1" for name in built]
    objects = [ninja.build("cxx", "cpu/library.o", [str(folder / "library.cpp")], [*common, *has])]
    kernels = sorted([*folder.glob("*.cpp"), *folder.glob("*/*.cpp")])
    for source in kernels:
        if source == folder / "library.cpp":
            continue
        name = source.relative_to(folder).with_suffix(".o")
        for isa, flags in built.items():
            define = f"-DFASTATTN_ISA={isa}"
            objects.append(
                ninja.build("cxx", f"cpu/{isa}/{name}", [str(source)], [*common, *KERNEL_FLAGS, *flags, define])
            )
    library = "libfastattn_cpu.so"
    return ninja.build("link", library, objects, [*OPENMP_LINK, *library_flags(library)])


def add_cuda_library(ninja: NinjaFile) -> str:
    folder = ROOT / "csrc" / "cuda"
    flags = [*CUDA_FLAGS, f"-I{ROOT / 'csrc'}", f"-I{folder}"]
    architectures = [*cuda_architectures(), *(f"sm_{name}" for name in CUDA_SPECIFIC.values())]
    flags.append(f'-DFASTATTN_CUDA_ARCHITECTURES="{",".join(architectures)}"')
    objects = []
    for source in sorted(folder.rglob("*.cu")):
        name = source.relative_to(folder).with_suffix(".o")
        objects.append(ninja.build("nvcc", f"cuda/{name}", [str(source)], [*flags, *gencode(source.name)]))
    library = "libfastattn_cuda.so"
    return ninja.build("nvlink", library, objects, ["-cudart", "static", "-Xlinker", f"-soname={library}"])


def native_library(ninja: NinjaFile, backend: str) -> str:
    return add_cpu_library(ninja) if backend == "cpu" else add_cuda_library(ninja)


def prebuilt_library(backend: str) -> Path:
    return ROOT / "fastattn" / "_lib" / f"libfastattn_{backend}.so"


def add_module(ninja: NinjaFile, backend: str, library: str) -> str:
    import pybind11

    folder = sysconfig.get_config_var("SOABI") or sys.implementation.cache_tag
    includes = [f"-I{ROOT / 'csrc'}"]
    python = [sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    for path in dict.fromkeys([*python, pybind11.get_include()]):
        includes += ["-isystem", path]
    # pybind11 modules are thin: -O2 compiles them in half the time of -O3 and costs nothing.
    flags = [*COMMON_FLAGS, "-O2", *includes]
    sources = sorted((ROOT / "csrc" / "bindings").glob(f"{backend}*.cpp"))
    compiled = [ninja.build("cxx", f"{folder}/{source.stem}.o", [str(source)], flags) for source in sources]
    rpath = "-Wl,-rpath,@loader_path/_lib" if MACOS else "-Wl,-rpath,$ORIGIN/_lib"
    undefined = ["-undefined", "dynamic_lookup"] if MACOS else []
    out = f"{folder}/_{backend}{sysconfig.get_config_var('EXT_SUFFIX')}"
    return ninja.build("link", out, [*compiled, library], [rpath, *undefined])


# --- setuptools commands ------------------------------------------------------------------------------------


def backends() -> list[str]:
    """The native backends that this machine can compile: [], ["cpu"] or ["cpu", "cuda"]; PREBUILT, those that lie
    there."""
    if PREBUILT:
        found = [name for name in ("cpu", "cuda") if prebuilt_library(name).exists()]
        if not found or not compiler():
            lacking = "a C++20 compiler" if found else f"a library built elsewhere in {prebuilt_library('cpu').parent}"
            raise SetupError(f"FASTATTN_PREBUILT=1 needs {lacking}; put one there, or leave the variable unset")
        return found
    if not compiler():
        if os.environ.get("FASTATTN_CUDA") == "1":
            raise SetupError("FASTATTN_CUDA=1, but there is no C++20 compiler with OpenMP; install g++ or set CXX")
        say("no C++20 compiler with OpenMP was found, so it installs as pure Python without its native kernels.")
        return []
    return ["cpu", "cuda"] if nvcc() else ["cpu"]


class BuildNative(build_ext):
    """Compiles with ninja in build/native, then copies the results beside the Python files."""

    def run(self) -> None:
        if not self.extensions:
            return
        ninja = NinjaFile()
        files: dict[str, Path] = {}
        for extension in self.extensions:
            backend = extension.name.removeprefix("fastattn._")
            library = str(prebuilt_library(backend)) if PREBUILT else native_library(ninja, backend)
            module = add_module(ninja, backend, library)
            ninja.targets.append(module)
            files[f"_lib/{Path(library).name}"] = BUILD / library  # an absolute path stays what it is
            files[Path(module).name] = BUILD / module
        ninja.run(verbose=self.verbose > 1)
        package = (ROOT if self.inplace else Path(self.build_lib)) / "fastattn"
        self.forget_stale(package, keep=set(files))
        for target, built in files.items():
            self.replace_file(built, package / target)

    @staticmethod
    def forget_stale(package: Path, keep: set[str]) -> None:
        """An earlier build with CUDA, or for another Python ABI tag of this version, must not reach this wheel."""
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        for name in ("_lib/libfastattn_cpu.so", "_lib/libfastattn_cuda.so", f"_cpu{suffix}", f"_cuda{suffix}"):
            if name not in keep:
                (package / name).unlink(missing_ok=True)

    @staticmethod
    def replace_file(source: Path, target: Path) -> None:
        """Copies through a rename: a process that has the old library mapped keeps it whole."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        shutil.copy2(source, temporary)
        os.replace(temporary, target)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "fastattn"
        names = [e.name.removeprefix("fastattn._") for e in self.extensions]
        libraries = [str(package / "_lib" / f"libfastattn_{name}.so") for name in names]
        return libraries + [str(package / f"_{name}{sysconfig.get_config_var('EXT_SUFFIX')}") for name in names]


class BuildPython(build_py):
    """Puts kernels/ into the wheel as fastattn.kernels.

    In a checkout the module fastattn/kernels.py leads there instead; it is left out of the wheel. A package_dir mapping
    for this would make setuptools install an import hook in editable mode.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        if not self.editable_mode:
            folders = sorted(file.parent for file in Path("kernels").rglob("__init__.py"))
            self.packages = [*self.packages, *(".".join(["fastattn", *folder.parts]) for folder in folders)]
            self.package_dir = {**self.package_dir, "fastattn.kernels": "kernels"}

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        if self.editable_mode:
            return modules
        return [m for m in modules if m[:2] != ("fastattn", "kernels")]

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "fastattn", ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension(f"fastattn._{name}", [f"csrc/bindings/{name}.cpp"]) for name in backends()],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
