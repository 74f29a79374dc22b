"""The child linears of a swapped module, and the heads that they project to."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from fastattn.functional import linear_act
from fastattn.nn.checks import why_not_input, why_not_linear, why_not_parameter, why_not_unwatched
from fastattn.nn.counting import note_fallback
from fastattn.nn.sublayers import child_reason
from fastattn.swap.swapped import Swapped


def linear(module: Swapped, name: str, x: Tensor, part: str) -> Tensor:
    """The child nn.Linear `name` applied to x: by the kernel where it is plain, by calling it where it is not."""
    child = getattr(module, name)
    if part in module.fastattn_off:
        return child(x)
    reason = why_not_input(x) or child_reason(name, why_not_linear(child))
    if reason is not None:
        note_fallback(module, reason)
        return child(x)
    return linear_act(x, child.weight, child.bias, backend=module.fastattn_backend)


def is_conv1d(child: object) -> bool:
    """Conv1D of transformers: a linear that keeps its weight transposed, as GPT-2 has it."""
    kind = type(child)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def why_not_projection(child: nn.Module) -> str | None:
    """As `why_not_linear`, for a Conv1D too."""
    if not is_conv1d(child):
        return why_not_linear(child)
    if type(child).forward is not _conv1d_forward(type(child)):
        return "is of a class whose forward was replaced"
    reason = (
        why_not_unwatched(child)
        or why_not_parameter(child, "weight", optional=False)
        or why_not_parameter(child, "bias", optional=False)
    )
    if reason is not None:
        return reason
    weight: Any = child._parameters["weight"]
    bias: Any = child._parameters["bias"]
    return None if weight.dim() == 2 and bias.shape == weight.shape[1:] else "has a weight or a bias of another shape"


@functools.cache
def _conv1d_forward(kind: type[nn.Module]) -> object:
    """The forward that the class had when it was first met."""
    return kind.forward


def projection(child: nn.Module) -> tuple[Any, Any]:
    """Weight (out features, in features), a view where it is kept transposed, and bias, of a checked child."""
    parameters = child._parameters
    weight: Any = parameters["weight"]
    return weight.t() if is_conv1d(child) else weight, parameters["bias"]


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, S, H*D) -> (B, H, S, D), a view."""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)
