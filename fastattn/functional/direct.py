"""The short way to the CPU's kernels, for small calls, whose time would go into Python (csrc/bindings/cpu_direct.cpp).

    calls = direct.calls(backend)
    if calls is not None and (y := calls.direct_linear_act(x, weight, bias, activation)) is not None:
        return y

Each of its functions runs a call that needs nothing but the kernel and gives None for any other, wrong ones too; the
caller then goes the long way, through checks, operators and dispatch. It reads tensors by DLPack's exchange API, which
torch offers from 2.10 on; before, every call goes the long way.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastattn import dispatch
from fastattn.backends import cpu
from fastattn.backends.codes import ACTIVATIONS
from fastattn.backends.cpu.attention import OFTEN
from fastattn.backends.cpu.library import matmul_precision, native
from fastattn.masks import Causal
from fastattn.modes import TRANSPARENT
from fastattn.problems import FEW_QUERIES

_NUMBERS = frozenset({float, int, bool})
"""The types of a dropout_p of 0 that may go the short way: others, a complex number say, the long way may refuse."""


def calls(backend: str | None, dropout_p: float = 0.0, dropout_seed: Tensor | None = None) -> ModuleType | None:
    """The module whose functions may run a call without dropout for which this backend was asked, None being the choice
    of dispatch."""
    if torch.compiler.is_compiling() or (dispatch.forced if backend is None else backend) not in ("", "cpu"):
        return None
    if dropout_p != 0.0 or dropout_seed is not None or type(dropout_p) not in _NUMBERS:
        return None
    return _opened()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: object,
    scale: float | None,
    backend: str | None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    grouped: bool = True,
) -> Tensor | None:
    """The output of attention with no more than these. grouped: whether keys may have fewer heads than queries."""
    module = calls(backend, dropout_p, dropout_seed)
    if module is None:
        return None
    if type(mask) is Causal:
        return module.direct_attention(q, k, v, None, mask.align, grouped, scale)
    return module.direct_attention(q, k, v, mask, None, grouped, scale)


@functools.cache
def _opened() -> ModuleType | None:
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None or cpu.unavailable_reason() is not None:
        return None
    is_open = native().open_direct(
        Tensor,
        nn.Parameter,
        exchange,
        _WATCHERS,
        vars(forward_ad),
        torch._C._is_torch_function_mode_enabled,
        torch._C._pop_torch_function_stack,
        torch._C._push_on_torch_function_stack,
        TRANSPARENT,
        torch.is_grad_enabled,
        torch.get_num_threads,
        matmul_precision,
        ACTIVATIONS,
        FEW_QUERIES,
        OFTEN,
    )
    return native() if is_open else None


_WATCHERS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._get_tracing_state,
    torch._C._autograd._profiler_enabled,
    torch._C._is_any_autocast_enabled,
)
"""What would see an operator, or change a call: each gives something true where it is at work. None of them may be
written in Python: what a handler of signals raises within it would be lost. That of forward-mode derivatives is, so its
number is read from its module."""
