"""Triton's interpreter at a bearable speed.

Every call of a device function, those of triton.language included, puts the interpreter's versions of all of Triton's
builtins in place again: milliseconds each, of nearly all the time a small kernel takes. Within one launch once per
module is enough.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def patching_once() -> Iterator[None]:
    """Within the block, a single launch, the builtins that a module sees are replaced once. Triton's own way where its
    interpreter is not the one known here."""
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:
        yield
        return
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch(function)

    interpreter._patch_lang = patch_once
    try:
        yield
    finally:
        interpreter._patch_lang = patch
