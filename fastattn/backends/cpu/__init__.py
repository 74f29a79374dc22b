"""The native CPU backend: csrc/cpu compiled once per instruction set, on float32, bfloat16 and float16 tensors.

Forward and backward of attention, norms and feed-forward layers, and the forward of whole encoder layers; the protocol
is `fastattn.backends.protocol`.
"""

from __future__ import annotations

import torch

from fastattn.backends.codes import DTYPES
from fastattn.backends.cpu.attention import attention_backward, attention_forward
from fastattn.backends.cpu.decode import attention_decode
from fastattn.backends.cpu.encoder_layer import encoder_layer_forward
from fastattn.backends.cpu.library import (
    available_isas,
    has_avx512,
    isa,
    multiplies_rounded,
    unavailable_reason,
    use_isa,
)
from fastattn.backends.cpu.linear import (
    ffn_backward,
    ffn_forward,
    gated_ffn_backward,
    gated_ffn_forward,
    linear_act_backward,
    linear_act_forward,
)
from fastattn.backends.cpu.norm import norm_backward, norm_forward
from fastattn.problems import AttentionProblem, DecodeProblem, LinearProblem, NormProblem, Problem

__all__ = [
    "NAME",
    "attention_backward",
    "attention_decode",
    "attention_forward",
    "available_isas",
    "encoder_layer_forward",
    "ffn_backward",
    "ffn_forward",
    "gated_ffn_backward",
    "gated_ffn_forward",
    "has_avx512",
    "isa",
    "linear_act_backward",
    "linear_act_forward",
    "multiplies_rounded",
    "norm_backward",
    "norm_forward",
    "not_supported_reasons",
    "unavailable_reason",
    "use_isa",
]

NAME = "cpu"


def not_supported_reasons(problem: Problem) -> list[str]:
    """Why this problem is refused, one sentence each; empty when it runs."""
    reasons = []
    if problem.device_type != "cpu":
        reasons.append(f"tensors are on {problem.device_type!r}, not on the CPU")
    for dtype in _dtypes(problem):
        if dtype not in DTYPES:
            reasons.append(f"dtype {dtype} is not float32, bfloat16 or float16")
    if isinstance(problem, LinearProblem) and problem.weight_dtype != problem.dtype:
        reasons.append(f"weights are {problem.weight_dtype} and inputs {problem.dtype}, not one dtype")
    return reasons


def _dtypes(problem: Problem) -> set[torch.dtype]:
    if isinstance(problem, (AttentionProblem, DecodeProblem)):
        given = {problem.dtype, problem.bias}
    elif isinstance(problem, NormProblem):
        given = {problem.dtype, problem.weight_dtype, problem.bias_dtype, problem.residual_dtype}
    else:
        given = {problem.dtype}
    return {dtype for dtype in given if dtype is not None}
