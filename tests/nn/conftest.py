"""Comparison of a module with torch.nn's, by the rule of fastattn.parity."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastattn import dispatch
from fastattn.parity import failures, parity
from fastattn.parity.guards import torch_threads

Arguments = dict[str, Any]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Every test starts as if nothing had been warned about; what torch says about its own prototypes is not shown."""
    dispatch._warned.clear()
    with torch_threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", dispatch.BackendWarning)
        for message in (
            "Support for mismatched",
            "enable_nested_tensor",
            "The PyTorch API of nest",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


@contextmanager
def fast_path(on: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(on)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _run(
    module: nn.Module,
    inputs: dict[str, Tensor],
    masks: Arguments,
    dtype: torch.dtype,
    grad: bool,
    grad_out: Tensor | None,
) -> dict[str, Tensor]:
    """The output and, with grad, the gradients of the inputs and of every parameter."""
    leaves = {name: x.to(dtype).requires_grad_(grad) for name, x in inputs.items()}
    floats = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in masks.items()}
    with torch.set_grad_enabled(grad):
        out = module(*leaves.values(), **floats)
    found = {"out": out.detach()}
    if grad:
        parameters = dict(module.named_parameters())
        tensors = {**leaves, **parameters}
        grads = torch.autograd.grad(out, list(tensors.values()), torch.ones_like(out) if grad_out is None else grad_out)
        found |= {f"d{name}": g for name, g in zip(tensors, grads, strict=True)}
    return found


_DRAWS = (
    3  # of the output's gradient: the largest of few numbers in one draw is a matter of luck, torch's error as well
)


def _runs(
    ours: nn.Module,
    theirs: nn.Module,
    inputs: dict[str, Tensor],
    masks: Arguments,
    dtype: torch.dtype,
    grad: bool,
    torch_fast_path: bool,
) -> list[dict[str, Tensor]]:
    """What ours, torch in float64 and torch in `dtype` give, results of several draws of gradients stacked."""
    grads_out = [torch.randn_like(theirs(*inputs.values(), **masks)) for _ in range(_DRAWS)] if grad else [None]
    wide = copy.deepcopy(theirs).double()
    stacked = []
    for module, own, fast in (
        (ours, dtype, True),
        (wide, torch.float64, torch_fast_path),
        (theirs, dtype, torch_fast_path),
    ):
        with fast_path(fast):
            draws = [
                _run(module, inputs, masks, own, grad, None if grad_out is None else grad_out.to(own))
                for grad_out in grads_out
            ]
        stacked.append({name: torch.stack([draw[name] for draw in draws]) for name in draws[0]})
    return stacked


def _magnitude(name: str, truth: dict[str, Tensor]) -> Tensor:
    """In place of T, which only an operator's formula can give: the largest value among the gradients of one child.

    Those of a weight and of its bias sum over the same rows, and the bias's, with no factor beside them, may cancel
    more.
    """
    child = name.rpartition(".")[0]
    peers = [value for other, value in truth.items() if child and other.rpartition(".")[0] == child]
    largest = max(float(value.abs().max()) for value in (truth[name], *peers))
    return torch.full_like(truth[name], largest)


@pytest.fixture
def against_torch() -> Callable[..., dict[str, Tensor]]:
    """against_torch(ours, theirs, inputs, masks, dtype=, grad=, torch_fast_path=) -> what ours gave.

    ours and theirs: modules with the same state dict, put into `dtype`. Each output and gradient may lie no further
    from torch in float64 (on the same rounded weights and inputs) than twice torch's own error in `dtype` plus
    rounding: the rule of fastattn.parity.
    torch_fast_path: whether torch may take the one that it has for inference.
    """

    def check(
        ours: nn.Module,
        theirs: nn.Module,
        inputs: dict[str, Tensor],
        masks: Arguments,
        *,
        dtype: torch.dtype,
        grad: bool,
        torch_fast_path: bool = True,
    ) -> dict[str, Tensor]:
        theirs.load_state_dict(ours.state_dict())
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        inputs = {name: x.to(dtype) for name, x in inputs.items()}
        masks = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in masks.items()}
        found, truth, eager = _runs(ours, theirs, inputs, masks, dtype, grad, torch_fast_path)
        rows = [parity(name, found[name], truth[name], eager[name], _magnitude(name, truth)) for name in truth]
        assert not failures(rows), "\n" + failures(rows)
        assert found["out"].dtype == eager["out"].dtype
        return {name: tensor[0] for name, tensor in found.items()}

    return check


@pytest.fixture
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Weights that are neither zero nor one."""

    def change(module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        return module

    return change
