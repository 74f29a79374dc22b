"""The typer application: one module per command."""

from __future__ import annotations

from typing import Annotated

import typer

import fastattn
from fastattn.cli.bench import bench
from fastattn.cli.demo.command import demo
from fastattn.cli.explain import explain
from fastattn.cli.info import info
from fastattn.cli.verify import verify

app = typer.Typer(
    help="Fused attention, normalisation and feed-forward kernels for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastattn {fastattn.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for command in (info, demo, verify, explain):
    app.command()(command)
app.add_typer(bench, name="bench")
