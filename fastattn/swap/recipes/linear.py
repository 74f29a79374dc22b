"""The child linears of a swapped module, and the heads that they project to."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastattn.functional import linear_act
from fastattn.nn.checks import (
    own_forward,
    why_not_input,
    why_not_linear,
    why_not_parameter,
    why_not_shaped,
    why_not_unwatched,
)
from fastattn.nn.counting import note_fallback
from fastattn.nn.fused import original_class
from fastattn.nn.sublayers import child_reason
from fastattn.swap.recipes.spelled_linear import is_spelled_linear
from fastattn.swap.swapped import Swapped


def linear(module: Swapped, name: str, x: Tensor, part: str) -> Tensor:
    """The child nn.Linear `name` applied to x: by the kernel where it is plain, by calling it where it is not."""
    child = getattr(module, name)
    if part in module.fastattn_off:
        return child(x)
    reason = why_not_input(x, module.fastattn_backend) or child_reason(name, why_not_linear(child))
    if reason is not None:
        note_fallback(module, reason)
        return child(x)
    return linear_act(x, child.weight, child.bias, backend=module.fastattn_backend)


_own_forwards: dict[type[nn.Module], object] = {}  # looked up, since Dynamo does not see where a function is from


def conv1d(kind: type) -> bool:
    """Whether a class is Conv1D of transformers: a linear that keeps its weight transposed, as GPT-2 has it."""
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_projection(child: object) -> bool:
    """Whether the child is exactly an nn.Linear or a Conv1D, or a linear of a class's own, or stands for one."""
    kind = original_class(child)
    return kind is nn.Linear or conv1d(kind) or is_spelled_linear(kind)


def why_not_projection(child: nn.Module) -> str | None:
    """As `why_not_linear`, for a Conv1D and for a linear of a class's own, whose casts do nothing to tensors of the
    input's dtype: that these are, its caller asks."""
    kind = original_class(child)
    if kind is not nn.Linear and is_spelled_linear(kind):
        return why_not_unwatched(child) or why_not_own_tensors(child) or _why_not_one_dtype(child)
    if not conv1d(kind):
        return why_not_linear(child)
    return why_not_replaced(kind) or why_not_unwatched(child) or why_not_own_tensors(child)


def _why_not_one_dtype(linear: nn.Module) -> str | None:
    weight, bias = projection(linear)
    return None if bias is None or bias.dtype is weight.dtype else "has a bias of another dtype than its weight"


def why_not_replaced(kind: type[nn.Module]) -> str | None:
    """None where the class's forward is its own."""
    if kind.forward is not _own_forwards.get(kind):
        if own_forward(kind) is None:
            return "is of a class whose forward was replaced"
        _own_forwards[kind] = kind.forward
    return None


def why_not_own_tensors(linear: nn.Module) -> str | None:
    """None where weight and bias are plain parameters whose shapes are those of a linear."""
    reason = why_not_parameter(linear, "weight", optional=False) or why_not_parameter(linear, "bias", optional=True)
    return reason or why_not_shaped(*projection(linear))


def projection(linear: nn.Module) -> tuple[Any, Any]:
    """Weight (out features, in features), a view where it is kept transposed, and bias."""
    parameters = linear._parameters
    weight: Any = parameters["weight"]
    return weight.t() if conv1d(original_class(linear)) else weight, parameters["bias"]


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, S, H*D) -> (B, H, S, D), a view. The heads are counted: of an empty batch torch cannot tell them."""
    return x.view(*x.shape[:-1], x.shape[-1] // head_dim, head_dim).transpose(1, 2)
