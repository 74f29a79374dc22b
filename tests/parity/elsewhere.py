"""Draws cases on a device of its own and checks the reference there; a tensor left on the CPU by mistake raises.

    python elsewhere.py OP FIRST LAST

The device "elsewhere" stands in for a GPU where there is none: its tensors wrap tensors of the CPU, and an operator
that is given tensors of both raises, as on a GPU. For a process of its own, since torch knows one such device.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastattn.parity.cases import draw_case

DEVICE = "elsewhere"
MOVES = ("aten::_to_copy", "aten::copy_", "aten::index", "aten::_index_put_impl_")  # take tensors of two devices


class Remote(torch.Tensor):
    """A tensor of that device. `inner` is the tensor of the CPU that has its numbers."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Remote:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        remote = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=f"{DEVICE}:0", **layout)
        remote.inner = inner
        return remote

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operator, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()


class DeviceModule(backend_registration._DummyBackendModule):
    """What torch asks a device's module for; autocast, even where it is turned off, for dtypes."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class Elsewhere(TorchDispatchMode):
    """Within it tensors can be made on that device."""

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(operator, args, kwargs or {})


def run(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operator on the tensors of the CPU behind the arguments, its results where those of a GPU would be."""
    if operator.namespace == "fastattn":
        return own_operator(operator)(*args, **kwargs)
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    remote = {id(tensor.inner): tensor for tensor in given if isinstance(tensor, Remote)}
    local = [tensor for tensor in given if not isinstance(tensor, Remote)]
    name = operator._schema.name
    if remote and any(tensor.dim() > 0 for tensor in local) and name not in MOVES:
        raise RuntimeError(f"{name}: tensors of two devices")
    device = kwargs.get("device")
    is_remote = bool(remote) if device is None else torch.device(device).type == DEVICE
    inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, Remote) else x, (args, kwargs))
    if device is not None:
        inner_kwargs["device"] = torch.device("cpu")

    def place(result: Any) -> Any:
        if not isinstance(result, torch.Tensor) or any(result is tensor for tensor in local):
            return result
        if id(result) in remote:
            return remote[id(result)]
        return Remote(result) if is_remote else result

    return tree_map(place, operator(*inner_args, **inner_kwargs))


def own_operator(operator: Any) -> Callable[..., Any]:
    """An operator of fastattn runs its implementation with the tensors as they are."""
    from fastattn.ops.library import _IMPLEMENTATIONS

    def call(*args: Any, **kwargs: Any) -> Any:
        with Elsewhere():
            return _IMPLEMENTATIONS[operator](*args, **kwargs)

    return call


def main(op: str, first: int, last: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, DeviceModule())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) asks the mode too
    checked = 0
    for index in range(first, last):
        # Without threads of its own for the device, one of which may outlive Python.
        with Elsewhere(), torch.autograd.set_multithreading_enabled(False):
            rows = draw_case(op, 0, index, DEVICE).run("reference")
        checked += len(rows)
        failed = [row for row in rows if not row.passed]
        assert not failed, f"{op} 0.{index}: {failed[0]}"
    print(f"{op}: {checked} rows")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
