"""The operators torch.ops.fastattn.*, with fake tensors and vmap rules, and the autograd.Functions over them."""

from __future__ import annotations

from fastattn.ops.attention import Attention, attention_backward, attention_forward
from fastattn.ops.decode import attention_decode_forward
from fastattn.ops.encoder_layer import encoder_layer_forward
from fastattn.ops.ffn import (
    Ffn,
    GatedFfn,
    LinearAct,
    ffn_backward,
    ffn_forward,
    gated_ffn_backward,
    gated_ffn_forward,
    linear_act_backward,
    linear_act_forward,
)
from fastattn.ops.flops import register_with_counter
from fastattn.ops.norm import Norm, norm_backward, norm_forward

__all__ = [
    "Attention",
    "Ffn",
    "GatedFfn",
    "LinearAct",
    "Norm",
    "attention_backward",
    "attention_decode_forward",
    "attention_forward",
    "encoder_layer_forward",
    "ffn_backward",
    "ffn_forward",
    "gated_ffn_backward",
    "gated_ffn_forward",
    "linear_act_backward",
    "linear_act_forward",
    "norm_backward",
    "norm_forward",
]

register_with_counter()
