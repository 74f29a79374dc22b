"""Wheels built from a copy of the checkout in isolation: with a compiler, without one, without CUDA."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(os.environ.get("FASTATTN_CHECKOUT", Path(__file__).resolve().parents[2]))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHECKOUT / "setup.py").exists(), reason="FASTATTN_CHECKOUT does not name a checkout"),
]

NO_COMPILER = {"CXX": "/nonexistent", "CC": "/nonexistent"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what the repository tracks, without anything built."""
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "_lib", "*.so")
    return Path(shutil.copytree(CHECKOUT, tmp_path / "source", ignore=skipped))


def pip(*arguments: str, cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    constraints = ("--build-constraint", "constraints.txt") if (cwd / "constraints.txt").exists() else ()
    command = [sys.executable, "-m", "pip", *arguments, *constraints]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)


def build_wheel(source: Path, environment: dict[str, str]) -> tuple[Path, str]:
    run = pip("wheel", "--verbose", "--no-deps", "--wheel-dir", "out", ".", cwd=source, environment=environment)
    output = run.stdout + run.stderr
    assert run.returncode == 0, output[-6000:]
    (wheel,) = (source / "out").glob("*.whl")
    return wheel, output


def contents(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def test_without_a_compiler_the_wheel_is_pure_python(source: Path) -> None:
    wheel, output = build_wheel(source, NO_COMPILER)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "no C++20 compiler with OpenMP was found, so it installs as pure Python" in output
    names = contents(wheel)
    assert not [name for name in names if name.endswith(".so")]
    expected = [
        *("__init__.py", "py.typed", "kernels/__init__.py", "kernels/norm.py", "kernels/philox.py"),
        *("kernels/attention/__init__.py", "kernels/attention/forward.py", "kernels/compiled.json"),
    ]
    assert not [name for name in expected if f"fastattn/{name}" not in names]
    assert "fastattn/kernels.py" not in names  # the checkout's way to kernels/
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastattn"}


def test_cuda_off_gives_a_cpu_wheel_and_kernels_share_no_inline_functions(source: Path) -> None:
    wheel, _ = build_wheel(source, {"FASTATTN_CUDA": "0"})
    names = contents(wheel)
    assert "fastattn/_lib/libfastattn_cpu.so" in names
    assert any(name.startswith("fastattn/_cpu.") for name in names)
    assert not [name for name in names if "cuda.so" in name or name.startswith("fastattn/_cuda")]
    # A weak symbol outside an instruction set's namespace is one copy for all; the linker may keep that of AVX-512.
    folder = source / "build" / "native" / "cpu"
    objects = sorted(folder.rglob("*/*.o"))
    assert objects
    for file in objects:
        own = f"fastattn_cpu::{file.relative_to(folder).parts[0]}::"
        listed = subprocess.run(["nm", "-C", str(file)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in listed.splitlines() if line[17:18] in ("W", "V", "u")]
        assert not [line for line in weak if own not in line], file


@pytest.mark.parametrize(("value", "sentence"), [("1", "nvcc is neither on PATH"), ("yes", "FASTATTN_CUDA is 'yes'")])
def test_cuda_switch_errors_say_what_to_do(source: Path, value: str, sentence: str) -> None:
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not Path(p, "nvcc").exists())
    environment = {"FASTATTN_CUDA": value, "PATH": path, "CUDA_HOME": "/nonexistent"}
    if not shutil.which("g++", path=path):
        pytest.skip("g++ lies in the folder of nvcc")
    run = pip("wheel", "--no-deps", "--wheel-dir", "out", ".", cwd=source, environment=environment)
    assert run.returncode != 0
    assert sentence in run.stdout + run.stderr


def test_the_source_distribution_builds(source: Path, tmp_path: Path) -> None:
    script = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=source, env={**os.environ, **NO_COMPILER}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    folders = "csrc", "kernels", "tests", "fastattn"
    for folder in folders:
        kept = {p.relative_to(source) for p in (source / folder).rglob("*") if p.is_file()}
        found = {p.relative_to(unpacked) for p in (unpacked / folder).rglob("*") if p.is_file()}
        assert found == kept, folder
    wheel, _ = build_wheel(unpacked, NO_COMPILER)
    assert "fastattn/kernels/norm.py" in contents(wheel)
