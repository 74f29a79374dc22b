"""What torch.utils.flop_counter counts for the operators: their products of matrices, as it counts torch's own.

Attention counts all scores, whatever a mask hides, and its backward the scores once more, which it computes anew. Of
packed sequences and of a cache those keys count that there are, where their lengths can be read. An operator of a whole
layer counts what its parts do.

Importing the counter takes longer than all of fastattn.ops, so that the formulas wait until somebody else does.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

COUNTER = "torch.utils.flop_counter"

Arguments = Mapping[str, Any]
"""An operator's arguments by their names."""


def _linear(x: Tensor, *weights: Tensor) -> int:
    """x with its features led through one weight after another, each (out, in)."""
    return 2 * math.prod(x.shape[:-1]) * sum(math.prod(weight.shape) for weight in weights)


def _linear_backward(a: Arguments, first: tuple[str, ...], last: str | None) -> int:
    """The gradients asked for of layers side by side that read x, and of one behind them.

    The gradient of the hidden features is one more product, needed for all but the last layer's own.
    """
    rows = math.prod(a["x"].shape[:-1])
    flops = 0
    for name in first:
        wanted = int(a["x_requires_grad"]) + int(a[f"{name}_requires_grad"])
        flops += wanted * 2 * rows * math.prod(a[name].shape)
    if last is not None:
        biases = (name.replace("w", "b", 1) for name in first)
        inner = a["x_requires_grad"] or any(a[f"{name}_requires_grad"] for name in (*first, *biases))
        flops += (int(inner) + int(a[f"{last}_requires_grad"])) * 2 * rows * math.prod(a[last].shape)
    return flops


def _pairs(a: Arguments) -> int:
    """Queries times keys, of all the sequences."""
    q, k, cu_seqlens_q, cu_seqlens_k = a["q"], a["k"], a["cu_seqlens_q"], a["cu_seqlens_k"]
    if cu_seqlens_q is None:
        return int(q.shape[0] * q.shape[2] * k.shape[2])
    if not (_can_be_read(cu_seqlens_q) and _can_be_read(cu_seqlens_k)):
        return int((cu_seqlens_q.shape[0] - 1) * a["max_len_q"] * a["max_len_k"])
    lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist(), strict=True)
    return sum(len_q * len_k for len_q, len_k in lengths)


def _can_be_read(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return not (isinstance(tensor, (FakeTensor, FunctionalTensor)) or tensor.is_meta)


def _attention_forward(a: Arguments) -> int:
    return 2 * a["q"].shape[1] * _pairs(a) * (a["q"].shape[3] + a["v"].shape[3])


def _attention_backward(a: Arguments) -> int:
    dims = 3 * a["q"].shape[3] + 2 * a["v"].shape[3]  # scores, their gradient, dq and dk; dv
    return 2 * a["q"].shape[1] * _pairs(a) * dims


def _decode_forward(a: Arguments) -> int:
    (batch, heads, len_q, dim), lengths, table = a["q"].shape, a["cache_lengths"], a["block_table"]
    if _can_be_read(lengths):
        keys = int(lengths.sum())
    else:
        room = a["k_cache"].shape[2] if table is None else table.shape[1] * a["k_cache"].shape[1]
        keys = batch * room
    return 2 * heads * len_q * keys * (dim + a["v_cache"].shape[3])


def _encoder_layer_forward(a: Arguments) -> int:
    x, bounds = a["x"], a["cu_seqlens"]
    length = x.shape[-2]
    if bounds is None:
        pairs = x.shape[0] * length * length
    elif _can_be_read(bounds):
        pairs = sum(each * each for each in bounds.diff().tolist())
    else:
        pairs = length * length
    linears = _linear(x, *(a[name] for name in ("wq", "wk", "wv", "wo", "w1", "w2")))
    return linears + 4 * pairs * x.shape[-1]


_FORMULAS: dict[str, Callable[[Arguments], int]] = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "attention_decode_forward": _decode_forward,
    "encoder_layer_forward": _encoder_layer_forward,
    "linear_act_forward": lambda a: _linear(a["x"], a["weight"]),
    "linear_act_backward": lambda a: _linear_backward(a, ("weight",), None),
    "ffn_forward": lambda a: _linear(a["x"], a["w1"], a["w2"]),
    "ffn_backward": lambda a: _linear_backward(a, ("w1",), "w2"),
    "gated_ffn_forward": lambda a: _linear(a["x"], a["w_gate"], a["w_up"], a["w_down"]),
    "gated_ffn_backward": lambda a: _linear_backward(a, ("w_gate", "w_up"), "w_down"),
}
for _name in ("attention", "linear_act", "ffn", "gated_ffn"):  # what graphs of torch.export hold
    _FORMULAS[_name] = _FORMULAS[f"{_name}_forward"]


def register_with_counter() -> None:
    """Gives torch's counter the formulas: now if it is imported, else once it is."""
    counter = sys.modules.get(COUNTER)
    if counter is None:
        sys.meta_path.insert(0, _Finder())
    else:
        _register(counter)


def _register(counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        operator = getattr(torch.ops.fastattn, name)
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator, get_raw=True)(_of_operator(operator, formula))


def _of_operator(operator: Any, formula: Callable[[Arguments], int]) -> Callable[..., int]:
    names = [argument.name for argument in operator.default._schema.arguments]

    def flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula({**dict(zip(names, args, strict=False)), **kwargs})

    return flops


class _Finder(MetaPathFinder):
    """Finds the counter as the others would, with a loader that registers the formulas."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Registering(self, spec.loader)
                return spec
        return None


class _Registering(Loader):
    """Loads as the loader that it wraps, which answers all else."""

    def __init__(self, finder: _Finder, loader: Any) -> None:
        self.finder, self.loader = finder, loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader  # the module is to show nothing of this
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        _register(module)
