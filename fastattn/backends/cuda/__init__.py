"""The CUDA backend: libfastattn_cuda.so, through the module fastattn._cuda.

Attention, norms and feed-forward layers, forward and backward, and decoding.

Without the library, a driver or a fitting device it is a sentence in `unavailable_reason`, never an import error.
"""

from __future__ import annotations

from fastattn.backends.cuda.attention import attention_backward, attention_forward, attention_reasons
from fastattn.backends.cuda.decode import attention_decode, decode_reasons
from fastattn.backends.cuda.library import architectures, device_type, devices, unavailable_reason
from fastattn.backends.cuda.linear import (
    ffn_backward,
    ffn_forward,
    gated_ffn_backward,
    gated_ffn_forward,
    linear_act_backward,
    linear_act_forward,
    linear_reasons,
)
from fastattn.backends.cuda.norm import norm_backward, norm_forward, norm_reasons
from fastattn.problems import AttentionProblem, DecodeProblem, LinearProblem, NormProblem, Problem

__all__ = [
    "NAME",
    "architectures",
    "attention_backward",
    "attention_decode",
    "attention_forward",
    "device_type",
    "devices",
    "ffn_backward",
    "ffn_forward",
    "gated_ffn_backward",
    "gated_ffn_forward",
    "linear_act_backward",
    "linear_act_forward",
    "norm_backward",
    "norm_forward",
    "not_supported_reasons",
    "unavailable_reason",
]

NAME = "cuda"


def not_supported_reasons(problem: Problem) -> list[str]:
    """Why this problem is refused; empty for norms and linear layers in float32, bfloat16 and float16, and for
    decoding and attention in the latter two: its gradients with head dims of 17 to 192, and without those of biases."""
    if isinstance(problem, NormProblem):
        return norm_reasons(problem)
    if isinstance(problem, LinearProblem):
        return linear_reasons(problem)
    if isinstance(problem, AttentionProblem):
        return attention_reasons(problem)
    if isinstance(problem, DecodeProblem):
        return decode_reasons(problem)
    return [f"the CUDA backend has no kernel for {problem.op}"]
