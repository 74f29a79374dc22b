"""The child linears of a swapped module, and the heads that they project to."""

from __future__ import annotations

from torch import Tensor

from fastattn.functional import linear_act
from fastattn.nn.checks import why_not_input, why_not_linear
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


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, S, H*D) -> (B, H, S, D), a view."""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)
