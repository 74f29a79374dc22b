"""Bridges to other libraries. Each module imports its library; this package imports none."""

from __future__ import annotations

import functools
import importlib.metadata
import re

_FIRST_TRANSFORMERS = (4, 57)


@functools.cache
def why_not_transformers() -> str | None:
    """Why the attention interface of the installed transformers is not the one that this package speaks, or None."""
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return "transformers is not installed"
    if tuple(map(int, re.findall(r"\d+", version)[:2])) >= _FIRST_TRANSFORMERS:
        return None
    first = ".".join(map(str, _FIRST_TRANSFORMERS))
    return f"transformers {version} is older than {first}: install a newer one"
