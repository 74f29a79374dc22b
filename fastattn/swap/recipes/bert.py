"""BERT of transformers: attention, its projections, the residual blocks and the feed-forward.

Importing this file registers the attention interface, so that a swapped model that was saved whole runs when it is
loaded in a process that never called swap.

    BertSelfAttention    q, k and v as linears; attention through the interface, on the config that swap copied
    BertCrossAttention   attention through the interface
    BertSelfOutput       LayerNorm(dropout(linear(x)) + residual) as linear, then one fused dropout-add-LayerNorm
    BertOutput           the same
    BertIntermediate     act(linear(x)) as one kernel
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from transformers import activations
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert import modeling_bert

from fastattn.functional import linear_act
from fastattn.integrations import transformers as interface
from fastattn.nn.activations import activation_name as torch_activation_name
from fastattn.nn.checks import why_not_dropout, why_not_input, why_not_linear, why_not_unwatched
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.norm import why_not_layer_norm
from fastattn.nn.sublayers import add_and_normalise, child_reason
from fastattn.swap.recipe import Recipe
from fastattn.swap.swapped import Swapped

interface.register()


class BertSelfAttention(Swapped, modeling_bert.BertSelfAttention):
    """Self-attention. hidden_states (B, S, hidden) -> ((B, S, hidden), attention weights or None)."""

    fastattn_original = modeling_bert.BertSelfAttention

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        note_call(self)
        _note_interface(self)
        query = self._heads(_linear(self, "query", hidden_states, "linears"))
        key = self._heads(_linear(self, "key", hidden_states, "linears"))
        value = self._heads(_linear(self, "value", hidden_states, "linears"))
        if past_key_values is not None:
            is_pair = isinstance(past_key_values, EncoderDecoderCache)
            cache = past_key_values.self_attention_cache if is_pair else past_key_values
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_bert.eager_attention_forward
        )
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return out.reshape(*hidden_states.shape[:-1], -1).contiguous(), weights

    def _heads(self, x: Tensor) -> Tensor:
        """(B, S, H*D) -> (B, H, S, D), a view."""
        return x.view(*x.shape[:-1], -1, self.attention_head_size).transpose(1, 2)


class BertCrossAttention(Swapped, modeling_bert.BertCrossAttention):
    """Cross-attention: the original forward, whose attention comes through the interface."""

    fastattn_original = modeling_bert.BertCrossAttention

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        note_call(self)
        _note_interface(self)
        return super().forward(*args, **kwargs)


class BertSelfOutput(Swapped, modeling_bert.BertSelfOutput):
    """LayerNorm(dropout(dense(hidden_states)) + input_tensor), both (B, S, hidden)."""

    fastattn_original = modeling_bert.BertSelfOutput

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        note_call(self)
        x = _linear(self, "dense", hidden_states, "linears")
        return add_and_normalise(self, x, input_tensor, "dropout", "LayerNorm")[0]


class BertOutput(Swapped, modeling_bert.BertOutput):
    """LayerNorm(dropout(dense(hidden_states)) + input_tensor); hidden_states (B, S, intermediate)."""

    fastattn_original = modeling_bert.BertOutput

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        note_call(self)
        x = _linear(self, "dense", hidden_states, "ffns")
        return add_and_normalise(self, x, input_tensor, "dropout", "LayerNorm")[0]


class BertIntermediate(Swapped, modeling_bert.BertIntermediate):
    """act(dense(hidden_states)): (B, S, hidden) -> (B, S, intermediate)."""

    fastattn_original = modeling_bert.BertIntermediate

    def forward(self, hidden_states: Tensor) -> Tensor:
        note_call(self)
        activation = activation_name(self.intermediate_act_fn)
        reason = why_not_input(hidden_states) or child_reason("dense", why_not_linear(self.dense))
        if activation is None:
            reason = reason or "intermediate_act_fn has no kernel"
        if reason is not None:
            note_fallback(self, reason)
            return super().forward(hidden_states)
        dense = self.dense
        return linear_act(hidden_states, dense.weight, dense.bias, activation, backend=self.fastattn_backend)


# ---- what the forwards share -----------------------------------------------------------------------------------------


def _linear(module: Swapped, name: str, x: Tensor, part: str) -> Tensor:
    """The child nn.Linear `name` applied to x: by the kernel where it is plain, by calling it where it is not."""
    child = getattr(module, name)
    if part in module.fastattn_off:
        return child(x)
    reason = why_not_input(x) or child_reason(name, why_not_linear(child))
    if reason is not None:
        note_fallback(module, reason)
        return child(x)
    return linear_act(x, child.weight, child.bias, backend=module.fastattn_backend)


def _note_interface(module: Swapped) -> None:
    """Counts a fallback where the config has since been told to use another attention."""
    chosen = module.config._attn_implementation
    if chosen != interface.NAME and "attention" not in module.fastattn_off:
        note_fallback(module, f'the config asks for the attention "{chosen}"')


def activation_name(function: object) -> str | None:
    """The fastattn name of an activation module of transformers or torch, None where no kernel computes exactly it."""
    if not isinstance(function, nn.Module) or why_not_unwatched(function) is not None:
        return None
    kind = type(function)
    if kind.__module__.startswith("torch."):
        return torch_activation_name(function)
    if kind is activations.GELUActivation:
        return "gelu" if function.act in (nn.functional.gelu, function._gelu_python) else None
    if kind is activations.GELUTanh:
        return "gelu_tanh" if _is_gelu_tanh(function) else None
    return _ACTIVATION_MODULES.get(kind)


def _is_gelu_tanh(function: activations.GELUTanh) -> bool:
    act = function.act
    if isinstance(act, functools.partial):
        return act.func is nn.functional.gelu and not act.args and act.keywords == {"approximate": "tanh"}
    return act == function._gelu_tanh_python


_ACTIVATION_MODULES: dict[type, str] = {
    activations.NewGELUActivation: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    activations.ReLUSquaredActivation: "relu2",
    activations.SiLUActivation: "silu",
}


# ---- what swap and plan ask ------------------------------------------------------------------------------------------


def _refuse_intermediate(module: nn.Module) -> list[str]:
    if activation_name(module.intermediate_act_fn) is None:
        function = module.intermediate_act_fn
        name = getattr(function, "__name__", type(function).__name__)
        return [f"the activation {name} has no kernel"]
    return []


_PROJECTIONS = tuple((name, "linears", why_not_linear) for name in ("query", "key", "value"))
_NORM = (("LayerNorm", "norms", why_not_layer_norm), ("dropout", "norms", why_not_dropout))
_ALL_RECIPES = (
    Recipe(
        BertSelfAttention,
        kernels={"attention": "attention", "linears": "linear (q, k, v)"},
        takes=("self", "hidden_states", "attention_mask", "past_key_values", "kwargs"),
        children=_PROJECTIONS,
        interface=True,
    ),
    Recipe(
        BertCrossAttention,
        kernels={"attention": "attention"},
        takes=("self", "hidden_states", "encoder_hidden_states", "attention_mask", "past_key_values", "kwargs"),
        interface=True,
    ),
    Recipe(
        BertSelfOutput,
        kernels={"linears": "linear", "norms": "dropout_add_layer_norm"},
        takes=("self", "hidden_states", "input_tensor"),
        children=(("dense", "linears", why_not_linear), *_NORM),
    ),
    Recipe(
        BertOutput,
        kernels={"ffns": "linear", "norms": "dropout_add_layer_norm"},
        takes=("self", "hidden_states", "input_tensor"),
        children=(("dense", "ffns", why_not_linear), *_NORM),
    ),
    Recipe(
        BertIntermediate,
        kernels={"ffns": "linear_act"},
        takes=("self", "hidden_states"),
        children=(("dense", "ffns", why_not_linear),),
        refuse=_refuse_intermediate,
    ),
)

RECIPES = {recipe.original: recipe for recipe in _ALL_RECIPES}
