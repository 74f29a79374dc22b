"""Drop-in modules: the constructors, signatures and state_dict keys of torch.nn, on fastattn's kernels."""

from __future__ import annotations

from fastattn.nn.attention import MultiheadAttention
from fastattn.nn.decoder import TransformerDecoderLayer
from fastattn.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from fastattn.nn.feedforward import FeedForward, GatedFeedForward
from fastattn.nn.norm import LayerNorm, RMSNorm

__all__ = [
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
