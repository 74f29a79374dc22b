"""Linears that belong to no block, on a CPU: nn.Linear, and Conv1D of transformers.

Where the kernel was found faster than torch's it runs, else the original forward does. In inference:

- float32, up to 32 rows, as in generation: 1.0 to 4.6 times as fast; more rows equal. On AMD's processors with AVX-512,
  of which torch's MKL uses the half, any number of rows: 1.7 to 2.5 times as fast, of 64 rows 1.2 to 1.7 [1]. On Zen 4,
  where the half is nearly all, 1 row 0.8 to 1.4, 2 to 16 rows 1.1 to 2.9, more 1.02 to 1.3; smaller weights than 128
  thousand elements from 16 million products on [4].
- bfloat16 and float16, any number of rows, with AVX2: 0.95 (one row, 512 x 512) to 6 times as fast, and 30 times or
  more for weights that are kept transposed, as in Conv1D.
- float16 with AVX-512, any number of rows: 0.8 (one row, 512 x 512) to 10 times as fast [1].
- bfloat16 with AVX-512 BF16, up to 32 rows: 1.2 to 5 times as fast; of more torch's product is [1], unless the weight
  is kept packed (`fastattn.prepack`): then of 33 rows 1.13 to 1.4, of 64 1.05 to 1.2, of 128 1.01 to 1.1 times [1].
  Transposed up to 24 rows, from memory: 1 to 4 rows 2.6 to 3.2, 8 rows 2.4 to 2.7, 16 rows 1.3 to 1.4, 24 rows 1.1 to
  1.2; of 32 it would be 0.75 [1].
- With AMX [3]: bfloat16, up to 128 rows 1.14 (128 rows) to 1.85 times as fast, transposed up to 16 rows 1.04 to 3;
  float16, any number of rows, 1.1 (24 rows) to 2.7, transposed up to 8 rows 1.2 to 2.7, from 256 on 1.0 to 1.8.
- Smaller weights, 128 x 128 and up, where the call takes less time than it saves (PAYS_BY_LONG_CALLS) or, by the short
  way of fastattn.functional.direct, 7 us less (PAYS_BY_SHORT_CALLS). By that way, times as fast for weights of 16, 32,
  64, 144 and 256 thousand elements [1]; by way of AVX2 [2]:
    bfloat16, AVX-512 BF16     1 row 1.8, 1.9, 1.9, 2.1, 2.1     16 rows 1.6, 1.5, 1.5, 1.5, 1.5
    float16                    4 rows 1.7, 1.6, 2.5, 3.8, 4.8    bfloat16 by AVX2 1.8, 1.6, 2.3, 2.9, 3.0
    float32                    2 rows 0.5, 0.6, 0.8, 1.1, 1.3    16 rows 0.8, 1.1, 1.4, 1.9, 2.1

With gradients, forward and backward together, where torch's products of many rows are slow, from as many products on:
1.1 (32 rows, 256 x 256) to 2.2 times as fast in float32 with AVX-512 on an AMD, on Zen 4 from 64 million products on
0.97 to 1.14 [4]; 3 to 50 in float16 and, with AVX2, 4 to 24 in bfloat16 [2].

(2 cores of an AMD EPYC with AVX2, torch 2.13.0, 2026-11-26; [1] of an AMD EPYC of Zen 5, 2026-11-27; [2] one core of
the latter, told to use AVX2 alone where that is said; [3] of an Intel Xeon, Emerald Rapids, 2026-11-28, weights from
memory, one core and two; [4] one core of an AMD EPYC of Zen 4, 2026-11-29, weights from the caches.) Halves with any
other instruction set are unmeasured, and left to torch.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastattn.backends import cpu
from fastattn.backends.cpu.library import native
from fastattn.environment import cpu_family, cpu_name
from fastattn.functional import direct, linear_act
from fastattn.functional.checks import HALVES, resolve_backend
from fastattn.graphs import constant, is_exporting
from fastattn.nn.checks import why_not_input
from fastattn.nn.counting import note_call, note_choice, note_fallback
from fastattn.ops.library import is_recorded, tracks_gradients
from fastattn.swap.recipe import AS_FAST, Recipe
from fastattn.swap.recipes.linear import conv1d, is_projection, projection, why_not_own_tensors, why_not_replaced
from fastattn.swap.swapped import Swapped

FEW_ROWS = 32
_FEW_ROWS_OF_TRANSPOSED = 24  # of bfloat16
_FEW_ROWS_BY_AMX = {torch.bfloat16: 128}
_FEW_ROWS_OF_TRANSPOSED_BY_AMX = {torch.bfloat16: 16, torch.float16: 8}
_MANY_ROWS_OF_TRANSPOSED_BY_AMX = 256  # of float16
_KEPT_ROWS = 128  # of bfloat16, by a weight that is kept packed


class Pays(NamedTuple):
    """From where on a linear is worth the call around it."""

    one_row: int
    """Elements of a weight of which the product of a single row is."""
    few_rows: int
    """The same for two rows and more."""
    beside_slow: int
    """Rows x elements of a smaller weight, where torch's products are slow; two rows at least."""


PAYS_BY_LONG_CALLS = {
    torch.float32: Pays(512 * 1024, 512 * 1024, 2**21),
    torch.bfloat16: Pays(256 * 1024, 256 * 1024, 2**18),
    torch.float16: Pays(256 * 1024, 256 * 1024, 2**18),
}
PAYS_BY_SHORT_CALLS = {
    torch.float32: Pays(512 * 1024, 128 * 1024, 2**20),
    torch.bfloat16: Pays(256 * 1024, 128 * 1024, 2**17),
    torch.float16: Pays(256 * 1024, 128 * 1024, 2**17),
}
_PAYS_BY_PAIRS = Pays(16 * 1024, 16 * 1024, 16 * 1024)
"""bfloat16 by short calls, with instructions for pairs: oneDNN takes 16 us before it multiplies anything."""
_PAYS_ON_ZEN4 = {True: Pays(128 * 1024, 128 * 1024, 2**24), False: Pays(512 * 1024, 512 * 1024, 2**26)}
"""float32 by short calls and by long ones, where MKL's products take but a tenth longer."""
_FROM_FEATURES = 128  # narrower ones leave threads idle
_NEVER = sys.maxsize
_MEASURED_FOR_HALVES = {"avx2": HALVES, "avx512": (torch.float16,), "avx512bf16": HALVES, "amx": HALVES}


class FreeLinear(Swapped):
    """x W^T + b; x (..., K)."""

    def fastattn_forward(self, x: Tensor) -> Tensor:
        """The forward, whose argument each class names as its original does."""
        note_call(self)
        reason = (
            why_not_input(x, self.fastattn_backend)
            or why_not_own_tensors(self)
            or why_not_replaced(self.fastattn_original)
        )
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(x)  # type: ignore[misc, no-any-return]
        weight, bias = projection(self)
        if not resolve_backend(self.fastattn_backend) and not _is_faster(x, weight, bias):
            note_choice(self, AS_FAST)
            return super().forward(x)  # type: ignore[misc, no-any-return]
        return linear_act(x, weight, bias, backend=self.fastattn_backend)


class Linear(FreeLinear, nn.Linear):
    """A swapped nn.Linear."""

    fastattn_original = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return self.fastattn_forward(input)


class Conv1D(FreeLinear):
    """The mixin of the swapped Conv1D."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fastattn_forward(x)


def recipe(swapped: type[Swapped]) -> Recipe:
    """The recipe of nn.Linear or Conv1D."""
    why_not_replaced(swapped.fastattn_original)  # remembered for compiled graphs
    return Recipe(swapped, kernels={"linears": "linear_act"}, takes=_takes(swapped), misfit=_misfit)


def _takes(swapped: type[Swapped]) -> tuple[str, ...]:
    return ("self", "x" if conv1d(swapped.fastattn_original) else "input")


def _misfit(module: nn.Module) -> str | None:
    """AS_FAST where the module could gain nothing: it is small, or not on this CPU."""
    if not is_projection(module):
        return "it is a subclass"
    reason = why_not_own_tensors(module) or why_not_replaced(type(module))
    if reason is not None:
        return f"it {reason}"
    weight: Any = module._parameters["weight"]
    if not weight.is_cpu or not is_measured(weight.dtype):
        return AS_FAST
    return None if _fewest_rows(weight, _is_short()) < _NEVER else AS_FAST


def _is_short() -> bool:
    """Whether calls in inference go the short way."""
    return direct.calls("cpu") is not None


def _fewest_rows(weight: Tensor, is_short: bool) -> int:
    """The number of rows from which on the product is worth the call around it, long or short."""
    dtype, elements = weight.dtype, weight.numel()
    pays = _pays(dtype, is_short)
    if pays is None or min(weight.shape) < _FROM_FEATURES:
        return _NEVER
    if elements >= pays.few_rows:
        return 1 if elements >= pays.one_row else 2
    return max(2, -(-pays.beside_slow // elements)) if has_slow_products(dtype) else _NEVER


def _pays(dtype: torch.dtype, is_short: bool) -> Pays | None:
    if is_short and dtype is torch.bfloat16 and not has_slow_products(dtype):
        return _PAYS_BY_PAIRS
    if dtype is torch.float32 and _is_zen4():
        return _PAYS_ON_ZEN4[is_short]
    return (PAYS_BY_SHORT_CALLS if is_short else PAYS_BY_LONG_CALLS).get(dtype)


@constant
def is_measured(dtype: torch.dtype) -> bool:
    """Whether this machine has the kernel, and an instruction set on which it was found faster in this dtype."""
    if cpu.unavailable_reason() is not None:
        return False  # a model that was saved elsewhere
    return dtype not in HALVES or dtype in _MEASURED_FOR_HALVES.get(cpu.isa(), ())


def _is_faster(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not x.is_cpu or torch.is_autocast_enabled("cpu") or is_recorded():
        return False
    agree = x.dim() > 0 and x.shape[-1] == weight.shape[1] and x.dtype is weight.dtype
    if not agree or (bias is not None and bias.dtype is not x.dtype):
        return False  # torch has the words for it
    if not is_measured(x.dtype):
        return False
    if is_exporting():  # for any number of rows: to ask for it would bound what the graph takes
        return has_slow_products(x.dtype) and _fewest_rows(weight, is_short=False) <= 2
    if tracks_gradients(x, weight, bias):
        pays = _pays(x.dtype, is_short=False)
        is_worth_it = pays is not None and x.numel() * weight.shape[0] >= pays.beside_slow
        return is_worth_it and has_slow_products(x.dtype) and min(weight.shape) >= _FROM_FEATURES
    if x.numel() < _fewest_rows(weight, _is_short()) * weight.shape[1]:
        return False
    if x.numel() <= few_rows(weight) * weight.shape[1] or _is_kept(x, weight):
        return True
    is_between = _is_by_amx(x.dtype) and _is_transposed(weight)
    are_many = not is_between or x.numel() >= _MANY_ROWS_OF_TRANSPOSED_BY_AMX * weight.shape[1]
    return are_many and has_slow_products(x.dtype)


def few_rows(weight: Tensor) -> int:
    """How many rows are few for a weight (out features, in features)."""
    dtype, is_transposed = weight.dtype, _is_transposed(weight)
    if _is_by_amx(dtype):
        return (_FEW_ROWS_OF_TRANSPOSED_BY_AMX if is_transposed else _FEW_ROWS_BY_AMX).get(dtype, FEW_ROWS)
    return _FEW_ROWS_OF_TRANSPOSED if is_transposed and dtype is torch.bfloat16 else FEW_ROWS


def _is_transposed(weight: Tensor) -> bool:
    return weight.stride(0) == 1 and weight.shape[0] > 1


@constant
def _is_by_amx(dtype: torch.dtype) -> bool:
    """Whether products of halves are the matrix unit's."""
    return dtype in HALVES and cpu.unavailable_reason() is None and cpu.isa() == "amx"


def _is_kept(x: Tensor, weight: Tensor) -> bool:
    """Whether the weight is kept packed, and rows are so few that this makes the kernel the faster one."""
    if x.dtype is not torch.bfloat16 or x.numel() > _KEPT_ROWS * weight.shape[1] or torch.compiler.is_compiling():
        return False
    return bool(native().keeps_packed(weight.data_ptr()))


@constant
def has_slow_products(dtype: torch.dtype) -> bool:
    """Whether torch's products of many rows are known to be slow: where this processor cannot multiply halves, and
    MKL's of float32 on AMD's AVX-512, of which they use the half."""
    if dtype is torch.float16:
        return True
    if dtype is torch.bfloat16:
        return cpu.unavailable_reason() is None and cpu.isa() == "avx2"
    return cpu.has_avx512() and torch.backends.mkl.is_available() and _is_amds()


@functools.cache
def _is_amds() -> bool:
    return "AMD" in cpu_name()


@constant
def _is_zen4() -> bool:
    """Whether this is an AMD whose vectors of AVX-512 take two halves' time: MKL, which uses halves, loses little."""
    return _is_amds() and _family() == 25 and cpu.has_avx512()


@functools.cache
def _family() -> int | None:
    return cpu_family()
