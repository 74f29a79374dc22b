"""The console that commands print to."""

from __future__ import annotations

from rich.console import Console


def wide_console(*, stderr: bool = False) -> Console:
    """A console as wide as its terminal, or 120 columns where there is none, so that tables in a log stay readable."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=120)
