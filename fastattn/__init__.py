"""fastattn: fused attention, normalisation and feed-forward kernels for PyTorch, held to a reference.

Names are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastattn import biases, integrations, masks, nn, reference
    from fastattn.dispatch import BackendWarning, backends, use_backend
    from fastattn.errors import NotSupported
    from fastattn.functional.attention import attention, explain
    from fastattn.functional.decode import attention_decode
    from fastattn.functional.encoder_layer import encoder_layer
    from fastattn.functional.ffn import ffn, gated_ffn, linear_act
    from fastattn.functional.norm import layer_norm, rms_norm
    from fastattn.functional.sdpa import scaled_dot_product_attention
    from fastattn.functional.varlen import attention_varlen
    from fastattn.swap import NotSwapped, Prepacked, SwapReport, plan, prepack, swap

_HOMES = {
    "attention": "fastattn.functional",
    "attention_decode": "fastattn.functional",
    "attention_varlen": "fastattn.functional",
    "backends": "fastattn.dispatch",
    "encoder_layer": "fastattn.functional",
    "explain": "fastattn.functional",
    "ffn": "fastattn.functional",
    "gated_ffn": "fastattn.functional",
    "layer_norm": "fastattn.functional",
    "linear_act": "fastattn.functional",
    "BackendWarning": "fastattn.dispatch",
    "NotSupported": "fastattn.errors",
    "NotSwapped": "fastattn.swap",
    "Prepacked": "fastattn.swap",
    "SwapReport": "fastattn.swap",
    "plan": "fastattn.swap",
    "prepack": "fastattn.swap",
    "rms_norm": "fastattn.functional",
    "scaled_dot_product_attention": "fastattn.functional",
    "use_backend": "fastattn.dispatch",
}
_MODULES = ("biases", "dispatch", "functional", "integrations", "masks", "nn", "reference", "swap")

__all__ = [
    "BackendWarning",
    "NotSupported",
    "NotSwapped",
    "Prepacked",
    "SwapReport",
    "attention",
    "attention_decode",
    "attention_varlen",
    "backends",
    "biases",
    "encoder_layer",
    "explain",
    "ffn",
    "gated_ffn",
    "integrations",
    "layer_norm",
    "linear_act",
    "masks",
    "nn",
    "plan",
    "prepack",
    "reference",
    "rms_norm",
    "scaled_dot_product_attention",
    "swap",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastattn.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
