"""`fastattn info`: what is installed, what this machine has, and which backends it can use."""

from __future__ import annotations

import json
from typing import Annotated

import torch
import typer
from rich.table import Table

from fastattn.cli.console import wide_console
from fastattn.cli.support import COLUMNS, refused_operations, support_table
from fastattn.dispatch import FASTER, FIRST_TRITON, ORDER, backends
from fastattn.environment import environment, instruction_sets, version_of


def _accelerators() -> list[str]:
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"cuda:{i} {p.name}, compute capability {p.major}.{p.minor}" for i, p in enumerate(found)]


def _cuda_architectures() -> list[str]:
    from fastattn.backends import cuda

    return cuda.architectures()


def _faster() -> dict[str, tuple[str, ...]]:
    """Which calls go by another order than their device's."""
    measured = {f"{op} on compute capability {major}": names for (op, major), names in FASTER.items()}
    return {**measured, "decoding, and attention with gradients, on any GPU": FIRST_TRITON}


def facts() -> dict[str, object]:
    """Everything that `fastattn info` shows, as JSON holds it."""
    _, available = instruction_sets()
    return {
        **environment(),
        "triton": version_of("triton"),
        "devices": ["cpu", *_accelerators()],
        "instruction_sets_available": available,
        "cuda_architectures": _cuda_architectures(),
        "backends": {name: reason or "usable" for name, reason in backends().items()},
        "refused_operations": {name: refused_operations(name) for name in COLUMNS},
        "order": {device: list(names) for device, names in ORDER.items()},
        "faster": {calls: list(names) for calls, names in _faster().items()},
    }


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    support: Annotated[bool, typer.Option("--support", help="Print what each backend supports, in Markdown.")] = False,
) -> None:
    """Show versions, devices, instruction sets, and each backend with why it is or is not usable."""
    if support:
        typer.echo(support_table())
        return
    found = facts()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = wide_console()
    versions = Table(show_header=False, box=None, title=f"fastattn {found['fastattn']}", title_justify="left")
    available = instruction_sets()[1]
    chosen = found["instruction_set"] or "none: the native CPU library is not usable"
    rows: list[tuple[str, object]] = [
        ("torch", found["torch"]),
        ("transformers", found["transformers"] or "not installed"),
        ("triton", found["triton"] or "not installed"),
        ("python", f"{found['python']} on {found['system']}"),
        ("processor", f"{found['cpu']}, {found['cores']} cores, torch uses {found['threads']} threads"),
        ("accelerators", ", ".join(_accelerators()) or "torch sees none"),
        ("instruction set", f"{chosen}" + (f" (available: {', '.join(available)})" if available else "")),
        ("CUDA architectures", ", ".join(_cuda_architectures()) or "none built in"),
    ]
    for name, value in rows:
        versions.add_row(name, str(value))
    console.print(versions, highlight=False)
    table = Table("backend", "usable", "why not", title="Backends", title_justify="left")
    for name, reason in backends().items():
        table.add_row(name, "yes" if reason is None else "no", reason or "")
    console.print(table, highlight=False)
    for device, names in ORDER.items():
        console.print(f"on {device} tensors: {', then '.join(names)}", highlight=False)
    for calls, names in _faster().items():
        console.print(f"{calls}: {', then '.join(names)}", highlight=False)
