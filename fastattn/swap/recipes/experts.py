"""Experts of transformers' mixtures (Mixtral, Qwen3-MoE, DeepSeek, GLM, ...): one gated feed-forward block for each.

Their classes hold the weights of all experts in two tensors, and their forwards ask an interface for the function that
runs them; all of these do the same. In inference on a CPU each expert's rows go through the kernel of one block; else
the original runs, whose grouped products have gradients for all experts at once.

Measured against `grouped_mm`, which transformers chooses by itself, in inference, 1 to 512 tokens, experts of
512 x 256, 2 of 8 for each token, to 2,048 x 768, 8 of 32 (one core of an AMD EPYC of Zen 5 with AVX-512, 2026-11-27):
1.2 to 1.95 times as fast in float32, 1.02 to 3.1 in bfloat16 up to 32 rows for an expert, of more 0.89 to 1.9, and 1.02
(one token) to 9 in float16.
"""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from fastattn.functional import gated_ffn
from fastattn.functional.checks import resolve_backend
from fastattn.nn.checks import is_plain, why_not_input, why_not_parameter
from fastattn.nn.counting import note_call, note_choice, note_fallback
from fastattn.ops.library import is_recorded, tracks_gradients
from fastattn.swap.code import is_copy
from fastattn.swap.expression import Input, Spelling, argument_names
from fastattn.swap.originals import original
from fastattn.swap.reading import FLAGGED, ReadForward, Reading, spelled_as, why_not_as_read
from fastattn.swap.recipe import AS_FAST, Recipe, always
from fastattn.swap.recipes import free_linear
from fastattn.swap.recipes.activations import activation_name, why_not_activation
from fastattn.swap.swapped import Swapped

_WEIGHTS = ("gate_up_proj", "down_proj")
_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")

_LATER = {"has_gate": True, "is_concatenated": True, "has_post_expert_norm": False, "_is_expert_parallel": False}
"""Flags that transformers 5.0 did not have, and what they would have said of its experts."""


class Experts(ReadForward):
    """sum over a token's experts of w * down(act(gate(x)) * up(x)), x (tokens, N), their indices and w (tokens, k)."""

    def fastattn_forward(self, *inputs: Any) -> Tensor:
        note_call(self)
        x, index, scale = inputs
        is_forced = bool(resolve_backend(self.fastattn_backend))
        reason = why_not_as_read(self) or self.fastattn_why_not(x, index, scale)
        if reason is None and is_forced and _is_traced():
            reason = "how many rows an expert has is not known inside a compiled graph"
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(x, index, scale)  # type: ignore[misc, no-any-return]
        if not is_forced and not self.fastattn_is_faster(x, index):
            note_choice(self, AS_FAST)
            return super().forward(x, index, scale)  # type: ignore[misc, no-any-return]
        y = self.fastattn_run(x, index, scale)
        if y is None:
            note_fallback(self, "an index is none of an expert")
            return super().forward(x, index, scale)  # type: ignore[misc, no-any-return]
        return y

    def fastattn_why_not(self, x: Any, index: Any, scale: Any) -> str | None:
        """Why the original runs; None where the kernel may."""
        reason = why_not_called(self, _WEIGHTS, _IMPLEMENTATIONS, x, index, scale)
        if reason is not None:
            return reason
        gate_up, down = (self._parameters[name] for name in _WEIGHTS)
        assert gate_up is not None and down is not None
        fit = gate_up.dim() == 3 and down.shape == (gate_up.shape[0], gate_up.shape[2], gate_up.shape[1] // 2)
        if not fit or gate_up.shape[1] % 2 or x.shape[1] != gate_up.shape[2]:
            return MISFIT
        reason = why_not_activation(self.act_fn)
        return None if reason is None else f"act_fn {reason}"

    def fastattn_is_faster(self, x: Tensor, index: Tensor) -> bool:
        gate_up, down = (self._parameters[name] for name in _WEIGHTS)
        assert gate_up is not None and down is not None
        return may_gain(x, index, (gate_up, down)) and _is_large(gate_up)

    def fastattn_run(self, x: Tensor, index: Tensor, scale: Tensor) -> Tensor | None:
        """Each expert's block over its rows; None where an index is none of an expert."""
        gate_up, down = (self._parameters[name] for name in _WEIGHTS)
        activation = activation_name(self.act_fn)
        assert gate_up is not None and down is not None and activation is not None
        sorted_rows = rows_of_experts(x, index, len(gate_up))
        if sorted_rows is None:
            return None
        order, rows = sorted_rows
        results = []
        for expert, row in rows:
            gate, up = gate_up[expert].chunk(2)
            results.append(gated_ffn(row, gate, up, down[expert], activation, backend=self.fastattn_backend))
        return added_up(torch.cat(results), order, scale).to(x.dtype) if results else x * 0.0


def rows_of_experts(x: Tensor, index: Tensor, count: int) -> tuple[Tensor, list[tuple[int, Tensor]]] | None:
    """The order that sorts the entries of `index` by expert, as `grouped_mm` does, and each expert with its rows; None
    where an index is none of an expert."""
    experts, order = index.reshape(-1).sort()
    if len(experts) and not 0 <= int(experts[0]) <= int(experts[-1]) < count:
        return None
    counts = torch.bincount(experts, minlength=count).tolist()
    pieces = x[order // index.shape[-1]].split(counts)
    return order, [(expert, piece) for expert, piece in enumerate(pieces) if len(piece)]


def added_up(y: Tensor, order: Tensor, scale: Tensor) -> Tensor:
    """The sorted results y (tokens * k, N) times their weights (tokens, k), summed for each token in its own order."""
    y = y * scale.reshape(-1)[order].unsqueeze(-1)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return y[place].view(*scale.shape, -1).sum(1)


def why_not_called(
    module: Any, names: tuple[str, ...], implementations: tuple[str, ...], x: Any, index: Any, scale: Any
) -> str | None:
    """Why the original runs, whatever it computes for an expert. names: of its parameters."""
    reason = why_not_input(x, module.fastattn_backend)
    if reason is not None:
        return reason
    for name in names:
        reason = why_not_parameter(module, name, optional=False)
        if reason is not None:
            return f"it {reason}"
    implementation = getattr(module.config, "_experts_implementation", None)
    if implementation not in implementations:
        return f"its config asks for the experts of {implementation}"
    if flag(module, "_is_expert_parallel"):
        return "its experts are shared out over processes"
    if any(module._parameters[name].dtype is not x.dtype for name in names):
        return "its weights are not of the input's dtype"
    if x.dim() != 2 or not is_plain(index) or not is_plain(scale) or index.shape != scale.shape or index.dim() != 2:
        return "its inputs are not rows, indices and weights"
    return None if len(x) == len(index) and index.dtype is torch.int64 else MISFIT


MISFIT = "its inputs and weights do not fit together"


def flag(module: Any, name: str) -> Any:
    """What the class was put behind the interface with; None where it was not."""
    return getattr(module, name, _LATER.get(name))


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or is_recorded()


def may_gain(x: Tensor, index: Tensor, weights: tuple[Tensor, ...], few: int = free_linear.FEW_ROWS) -> bool:
    """Whether products of so many rows for each expert are faster on the kernels, here and without gradients: of up to
    `few`, or of any number where torch's are slow."""
    if not x.is_cpu or _is_traced() or torch.is_autocast_enabled("cpu") or tracks_gradients(x, *weights):
        return False
    if not index.numel() or not free_linear.is_measured(x.dtype):
        return False
    return index.numel() <= few * len(weights[0]) or free_linear.has_slow_products(x.dtype)


def _is_large(gate_up: Tensor) -> bool:
    """Whether one expert's block is."""
    return is_large(gate_up.dtype, gate_up[0].numel() * 3 // 2)


def is_large(dtype: torch.dtype, elements: int) -> bool:
    """Whether weights of so many elements are those of a linear whose call is paid for."""
    pays = free_linear.PAYS_BY_LONG_CALLS.get(dtype)
    return pays is not None and elements >= pays.one_row


# ---- which classes ---------------------------------------------------------------------------------------------------


@moe.use_experts_implementation
class _Asks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


_ASKS_THE_INTERFACE = _Asks.forward
_INTERFACE = original("integrations.moe", "use_experts_implementation")
_EAGER = original("models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeExperts.forward")
_APPLY_GATE = original("integrations.moe", "_default_apply_gate")


def eager_of(module_class: type[nn.Module]) -> FunctionType | None:
    """The forward that a class had before it was put behind transformers' interface of experts; None where it is not
    behind it."""
    forward = module_class.forward
    eager = inspect.unwrap(forward)
    if _INTERFACE is None or not isinstance(forward, FunctionType) or not isinstance(eager, FunctionType):
        return None
    if forward is eager or forward.__code__ is not _ASKS_THE_INTERFACE.__code__:
        return None
    closure = inspect.getclosurevars(forward).nonlocals
    if closure.get("experts_interface", moe.ALL_EXPERTS_FUNCTIONS) is not moe.ALL_EXPERTS_FUNCTIONS:
        return None
    return eager if closure.get("original_forward") is eager else None


def read(module_class: type[nn.Module]) -> Reading | None:
    """The reading of a class whose forward is a copy of Qwen3-MoE's, behind transformers' interface of experts."""
    eager = eager_of(module_class)
    if eager is None or not is_copy(eager, inspect.unwrap(_EAGER)):
        return None
    apply_gate: Any = getattr(module_class, "_apply_gate", None)
    if not is_copy(apply_gate, _APPLY_GATE):
        return None
    spelling = Spelling(Input(0), argument_names(eager), {"forward": module_class.forward, "_apply_gate": apply_gate})
    return Reading(Experts, _recipe, spelled_as(spelling))


def _recipe(swapped: type[Swapped]) -> Recipe:
    return Recipe(
        swapped,
        kernels={"ffns": "gated_ffn of each expert"},
        children=always(("act_fn", "ffns", why_not_activation)),
        misfit=_misfit,
    )


def _misfit(module: nn.Module) -> str | None:
    """Why it is not laid out as the forward reads it, large, on a CPU, and of an activation with a kernel."""
    layout = {
        "has_gate": True,
        "is_concatenated": True,
        "is_transposed": False,
        "has_bias": False,
        "has_post_expert_norm": False,
    }
    if any(flag(module, name) is not value for name, value in layout.items()):
        return FLAGGED
    gate_up, down = (module._parameters.get(name) for name in _WEIGHTS)
    if gate_up is None or down is None or gate_up.dim() != 3:
        return f"its {' and '.join(_WEIGHTS)} are not the weights of all experts"
    if not gate_up.is_cpu or not free_linear.is_measured(gate_up.dtype) or not _is_large(gate_up):
        return AS_FAST
    reason = why_not_activation(module.act_fn)
    return None if reason is None else f"act_fn {reason}"
