"""FeedForward and GatedFeedForward: feed-forward blocks as modules, on fastattn.ffn and fastattn.gated_ffn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.functional import gated_ffn
from fastattn.nn.activations import Activation, activation_function, activation_name, why_not_activation
from fastattn.nn.checks import why_not_dropout, why_not_input, why_not_linear
from fastattn.nn.counting import note_call, note_fallback
from fastattn.nn.fused import Fused
from fastattn.nn.sublayers import child_reason, feed_forward
from fastattn.reference.ffn import ACTIVATIONS


class FeedForward(Fused):
    """linear2(dropout(activation(linear1(x)))): x (..., d_model) -> (..., d_model) in x's dtype.

    Args:
        d_model, hidden: features in and out, and between.
        activation: relu, gelu, gelu_tanh, silu, quick_gelu, relu2, None, or any callable. F.relu, F.gelu, F.silu,
            nn.ReLU, nn.GELU and nn.SiLU run in the kernel as well; another callable is called, between plain linears.
        dropout: share of the hidden features that training drops.
        bias: whether both linears have one.

    State dict: linear1.weight (hidden, d_model), linear1.bias, linear2.weight (d_model, hidden), linear2.bias; named
    and initialised as in nn.TransformerEncoderLayer. float32, bfloat16 and float16 run on kernels.
    Raises ValueError for an unknown activation, TypeError for what is none.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int,
        activation: Activation | None = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = _checked(activation)
        self.linear1 = nn.Linear(d_model, hidden, bias=bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(hidden, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        note_call(self)
        return feed_forward(self, x)

    def extra_repr(self) -> str:
        return _activation_repr(self.activation)


class GatedFeedForward(Fused):
    """down_proj(dropout(activation(gate_proj(x)) * up_proj(x))): x (..., d_model) -> (..., d_model) in x's dtype.

    With silu it is SwiGLU, with gelu GEGLU (Shazeer 2020). Arguments as in `FeedForward`; bias is False by default.

    State dict: gate_proj.weight and up_proj.weight (hidden, d_model), down_proj.weight (d_model, hidden), and biases,
    named as in the Llama family.
    """

    def __init__(
        self,
        d_model: int,
        hidden: int,
        activation: Activation | None = "silu",
        dropout: float = 0.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = _checked(activation)
        self.gate_proj = nn.Linear(d_model, hidden, bias=bias, device=device, dtype=dtype)
        self.up_proj = nn.Linear(d_model, hidden, bias=bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.down_proj = nn.Linear(hidden, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        note_call(self)
        gate, up, down, dropout = self.gate_proj, self.up_proj, self.down_proj, self.dropout
        reason = self._why_not(x)
        if reason is None:
            return gated_ffn(
                x,
                gate.weight,
                up.weight,
                down.weight,
                activation_name(self.activation),
                gate.bias,
                up.bias,
                down.bias,
                dropout_p=dropout.p if dropout.training else 0.0,
                backend=self.fastattn_backend,
            )
        note_fallback(self, reason)
        result: Tensor = down(dropout(activation_function(self.activation)(gate(x)) * up(x)))
        return result

    def _why_not(self, x: Tensor) -> str | None:
        return (
            why_not_input(x, self.fastattn_backend)
            or child_reason("gate_proj", why_not_linear(self.gate_proj))
            or child_reason("up_proj", why_not_linear(self.up_proj))
            or child_reason("down_proj", why_not_linear(self.down_proj))
            or child_reason("dropout", why_not_dropout(self.dropout))
            or child_reason("activation", why_not_activation(self.activation))
        )

    def extra_repr(self) -> str:
        return _activation_repr(self.activation)


def _checked(activation: Activation | None) -> Activation:
    if activation is None:
        return "none"
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            known = ", ".join(name for name in ACTIVATIONS if name != "none")
            raise ValueError(f"activation={activation!r} is unknown: pass one of {known}, a callable, or None")
        return activation
    if isinstance(activation, type):
        raise TypeError(f"activation is the class {activation.__name__}: pass an object of it, {activation.__name__}()")
    if not callable(activation):
        raise TypeError(f"activation={activation!r} is a {type(activation).__name__}: pass a name, a callable, or None")
    return activation


def _activation_repr(activation: Activation) -> str:
    """Modules print themselves."""
    if isinstance(activation, nn.Module):
        return ""
    return f"activation={activation if isinstance(activation, str) else getattr(activation, '__name__', activation)}"
