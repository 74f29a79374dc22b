"""The console that commands print to, and the progress bar on it."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn


def wide_console(*, stderr: bool = False) -> Console:
    """A console as wide as its terminal, or 120 columns where there is none, so that tables in a log stay readable.

    It prints texts as they are: reasons and shapes hold square brackets, which rich would take for markup.
    """
    console = Console(stderr=stderr, markup=False)
    return console if console.is_terminal else Console(stderr=stderr, markup=False, width=120)


def output_file(path: Path | None) -> Path | None:
    """The callback of an option that names a file to write: makes its folder, before the work rather than after it.

    Raises typer.BadParameter where no file can be written there.
    """
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{path}: its folder cannot be made: {error}") from None
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder: name a file")
    return path


def progress_bar(console: Console, *more: ProgressColumn) -> Progress:
    """A bar that is gone when it is done: what is going on, how many of how many, how long already."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, *more, console=console, transient=True)
