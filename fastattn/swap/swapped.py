"""What every swapped class has in common."""

from __future__ import annotations

from typing import ClassVar

from fastattn.nn.fused import Fused


class Swapped(Fused):
    """Base of the classes that `swap` assigns to modules; they add a forward and no state of their own.

    A swapped class keeps the `__name__` of its original, which wrapping policies and device maps look at; only the
    printed model says "fastattn." before it.
    """

    fastattn_runs_original: ClassVar[bool] = False
    """Whether the forward calls the original's, whatever that is by then."""

    def _get_name(self) -> str:
        return "fastattn." + type(self).__name__
