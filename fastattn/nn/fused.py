"""What every module of fastattn.nn, and every swapped module, has in common."""

from __future__ import annotations

from typing import Any, ClassVar, TypeGuard, TypeVar

from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Fused(nn.Module):
    """Base of the modules that run fastattn's kernels in place of another class's forward. It holds no state.

    Attributes are set on an instance where other than the defaults are wanted, so that they follow the module
    through deepcopy and torch.save.
    """

    fastattn_original: ClassVar[type[nn.Module]]
    """The class whose forward this one stands for. Set by each class itself: a subclass does not inherit the claim
    (see `stands_for`)."""
    fastattn_off: frozenset[str] = frozenset()
    """Parts ("attention", "norms", "ffns", "linears") that run the original code in this module."""
    fastattn_backend: str | None = None
    """The backend that this module's calls are forced to; None leaves the choice to dispatch."""
    fastattn_forms_weights: bool = False
    """Whether the attention weights are given to who asks, as the original gives them: its config asked for "eager"."""
    fastattn_strict: bool = False
    """Whether a call that would run original code raises instead, as swap(strict=True) wants it."""
    fastattn_replica_of: int | None = None
    """In a replica of nn.DataParallel, under whose calls its own are counted: the id of what it is a replica of."""

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica.fastattn_replica_of = id(self)
        return replica


def stands_for(module: nn.Module, original: type[ModuleT]) -> TypeGuard[ModuleT]:
    """Whether the module's class is exactly `original`, or exactly a class that computes the same from the same
    tensors."""
    return original_class(module) is original


def original_class(module: object) -> Any:
    """The class that the module's class stands for, or the module's class.

    What someone derives from a class of ours is of another package: to look into the class's own attributes instead
    would break Dynamo's graphs.
    """
    module_class = type(module)
    if module_class.__module__.startswith("fastattn."):
        return getattr(module_class, "fastattn_original", module_class)
    return module_class
