"""Slow, plain PyTorch in any dtype up to float64: it defines correctness. It imports nothing of the package above
it."""

from __future__ import annotations

from fastattn.reference.attention import attention
from fastattn.reference.decode import attention_decode
from fastattn.reference.encoder_layer import encoder_layer
from fastattn.reference.ffn import ffn, gated_ffn, linear_act
from fastattn.reference.norm import norm

__all__ = ["attention", "attention_decode", "encoder_layer", "ffn", "gated_ffn", "linear_act", "norm"]
