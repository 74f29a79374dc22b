"""What the installed native libraries need and show. They run in the installation under test, whatever it holds."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fastattn

PACKAGE = Path(fastattn.__file__).parent
LIBRARIES = sorted((PACKAGE / "_lib").glob("*.so"))

pytestmark = pytest.mark.skipif(
    not LIBRARIES or not shutil.which("readelf"), reason="no native libraries are installed, or readelf is missing"
)


def tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def needed(file: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "-d", str(file))))


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_need_neither_torch_nor_python(library: Path) -> None:
    allowed = r"lib(c|m|gomp|stdc\+\+|gcc_s|dl|rt|pthread)\.so\.\d+|ld-linux.*"
    assert [name for name in needed(library) if not re.fullmatch(allowed, name)] == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_show_only_their_c_interface(library: Path) -> None:
    rows = [line.split() for line in tool("nm", "-D", "--defined-only", str(library)).splitlines()]
    assert rows
    assert [row[-1] for row in rows if not row[-1].startswith("fastattn_")] == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_modules_find_their_library_beside_them(library: Path) -> None:
    name = library.stem.removeprefix("libfastattn")
    spec = importlib.util.find_spec(f"fastattn.{name}")
    assert spec is not None
    assert spec.origin is not None
    module = Path(spec.origin)
    assert library.name in needed(module)
    assert not [n for n in needed(module) if "torch" in n or "python" in n]
    assert "[$ORIGIN/_lib]" in tool("readelf", "-d", str(module))
    assert importlib.import_module(f"fastattn.{name}").__file__ == spec.origin


def test_triton_kernels_are_installed() -> None:
    spec = importlib.util.find_spec("fastattn.kernels")
    assert spec is not None
    assert importlib.util.find_spec("fastattn.kernels.norm") is not None
    assert importlib.util.find_spec("fastattn.kernels.attention.forward") is not None
