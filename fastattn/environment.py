"""What machine and what versions figures come from."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

import fastattn
from fastattn.dispatch import backends


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_family() -> int | None:
    """The number of an x86 processor's family, None where the system does not tell: 25 is Zen 3 and 4, 26 Zen 5."""
    family = _cpuinfo("cpu family")
    return int(family) if family else None


def _cpuinfo(field: str) -> str | None:
    """What Linux says of the first processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith(field):
                return line.split(":", 1)[1].strip()
    return None


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


def device_name(device: str) -> str:
    """The name of what runs tensors of a device type: the GPU's, or the processor's."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


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


def device_environment(device: str) -> dict[str, object]:
    """`environment` and what figures of that device type depend on besides: its name, driver, CUDA, triton, commit."""
    found = {**environment(), "device": device_name(device), "triton": version_of("triton"), "commit": commit()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30),
            "multiprocessors": properties.multi_processor_count,
        }
    return found


@functools.cache
def driver_version() -> str | None:
    """The NVIDIA driver's version as nvidia-smi gives it, or None."""
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that fastattn is imported from, with + behind it if files differ; None elsewhere."""
    root = Path(fastattn.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    found = _output("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return found and found + ("+" if changed else "")


def _output(*command: str) -> str | None:
    """The first line that a command prints, or None where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None
