"""What a user calls: functions on tensors, with their checks, defaults and shapes."""

from __future__ import annotations

from fastattn.functional.attention import attention, explain
from fastattn.functional.decode import attention_decode
from fastattn.functional.encoder_layer import encoder_layer
from fastattn.functional.ffn import ffn, gated_ffn, linear_act
from fastattn.functional.norm import layer_norm, rms_norm
from fastattn.functional.sdpa import scaled_dot_product_attention
from fastattn.functional.varlen import attention_varlen

__all__ = [
    "attention",
    "attention_decode",
    "attention_varlen",
    "encoder_layer",
    "explain",
    "ffn",
    "gated_ffn",
    "layer_norm",
    "linear_act",
    "rms_norm",
    "scaled_dot_product_attention",
]
