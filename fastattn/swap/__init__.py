"""Swapping the modules of a model for fastattn's, in place and undoable.

`fastattn.swap` is this package and, called, its function: importing a part of the package, as unpickling a swapped
model does, binds the name `swap` in `fastattn` to the package.
"""

from __future__ import annotations

import sys
import types

from torch import nn

from fastattn.swap.engine import plan, swap
from fastattn.swap.packing import PackedRow, Prepacked, prepack
from fastattn.swap.report import NotSwapped, Row, SwapReport

__all__ = ["NotSwapped", "PackedRow", "Prepacked", "Row", "SwapReport", "plan", "prepack", "swap"]


class _CallablePackage(types.ModuleType):
    def __call__(
        self,
        model: nn.Module,
        *,
        attention: bool = True,
        norms: bool = True,
        ffns: bool = True,
        linears: bool = True,
        backend: str | None = None,
        strict: bool = False,
    ) -> SwapReport:
        return swap(model, attention=attention, norms=norms, ffns=ffns, linears=linears, backend=backend, strict=strict)


_CallablePackage.__call__.__doc__ = swap.__doc__
sys.modules[__name__].__class__ = _CallablePackage
