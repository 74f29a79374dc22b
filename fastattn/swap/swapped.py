"""What every swapped class has in common."""

from __future__ import annotations

from typing import ClassVar

from torch import nn


class Swapped(nn.Module):
    """Base of the classes that `swap` assigns to modules; they add a forward and no state of their own.

    A swapped class keeps the `__name__` of its original, which wrapping policies and device maps look at; only the
    printed model says "fastattn." before it. The two attributes below are set on a module where a swap asked for other
    than the defaults, so that they follow the module through deepcopy and torch.save.
    """

    fastattn_original: ClassVar[type[nn.Module]]
    fastattn_off: frozenset[str] = frozenset()
    """Parts ("attention", "norms", "ffns", "linears") that run the original code in this module."""
    fastattn_backend: str | None = None
    """The backend that this module's calls are forced to; None leaves the choice to dispatch."""

    def _get_name(self) -> str:
        return "fastattn." + type(self).__name__
