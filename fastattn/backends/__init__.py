"""The backends, each a module or folder with the functions of `fastattn.backends.protocol`; dispatch imports them.

The public `fastattn.backends()` has the name of this package, so the package is callable: it asks dispatch.
"""

from __future__ import annotations

import sys
from types import ModuleType


class _CallablePackage(ModuleType):
    def __call__(self) -> dict[str, str | None]:
        """Each backend's name with None where this machine can use it, else the reason why not."""
        from fastattn import dispatch

        return dispatch.backends()


sys.modules[__name__].__class__ = _CallablePackage
