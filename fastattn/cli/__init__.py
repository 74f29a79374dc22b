"""The command line: info, explain, verify, demo and bench."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """The entry point of the `fastattn` command."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"The fastattn command needs {' and '.join(missing)}: pip install 'fastattn[cli]'")
    try:
        from fastattn.cli.app import app
    except ValueError as error:  # of a variable of the environment
        sys.exit(f"fastattn: {error}")
    app()
