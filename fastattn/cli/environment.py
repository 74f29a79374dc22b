"""What machine and what versions figures come from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch
from rich.console import Console

import fastattn
from fastattn.dispatch import backends


def wide_console(*, stderr: bool = False) -> Console:
    """A console as wide as its terminal, or 120 columns where there is none, so that tables in a log stay readable."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=120)


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_sets() -> tuple[str | None, list[str]]:
    """The CPU backend's instruction set in use and those available, best first; (None, []) without the library."""
    if backends()["cpu"] is not None:
        return None, []
    from fastattn.backends import cpu

    return cpu.isa(), list(cpu.available_isas())


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, object]:
    """Versions, processor, threads and instruction set, as they go into JSON files."""
    return {
        "fastattn": fastattn.__version__,
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_sets()[0],
    }
