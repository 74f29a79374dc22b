"""The Triton backend: attention, norms and feed-forward layers on a GPU, and on CPU tensors under TRITON_INTERPRET=1
(Triton's interpreter, for tests).

The kernels are in fastattn.kernels, which this package imports at the first call: importing it needs no triton.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from fastattn.backends.triton.attention import attention_backward, attention_forward, attention_reasons
from fastattn.backends.triton.decode import attention_decode, decode_reasons
from fastattn.backends.triton.launch import is_recording
from fastattn.backends.triton.linear import (
    ffn_backward,
    ffn_forward,
    gated_ffn_backward,
    gated_ffn_forward,
    linear_act_backward,
    linear_act_forward,
    linear_reasons,
)
from fastattn.backends.triton.norm import norm_backward, norm_forward, norm_reasons
from fastattn.problems import AttentionProblem, DecodeProblem, LinearProblem, NormProblem, Problem

__all__ = [
    "NAME",
    "attention_backward",
    "attention_decode",
    "attention_forward",
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

NAME = "triton"

_OLDEST_CAPABILITY = (8, 0)
_OLDEST_TRITON = (3, 4)  # 3.3, which torch 2.7 comes with, knows no None in a tuple


def unavailable_reason() -> str | None:
    """Why Triton kernels cannot run on this machine, or None."""
    if not _triton_is_installed():
        return "triton is not installed; run: pip install 'fastattn[triton]'"
    if interpreting() or is_recording():
        return None
    if torch.version.hip is not None:
        return "the Triton kernels are untried on ROCm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; on CPU tensors Triton runs only under TRITON_INTERPRET=1"
    return _capability_reason() or _triton_reason()


def not_supported_reasons(problem: Problem) -> list[str]:
    """Why this problem is refused, one sentence each; empty when it runs."""
    if isinstance(problem, AttentionProblem):
        reasons = attention_reasons(problem)
    elif isinstance(problem, DecodeProblem):
        reasons = decode_reasons(problem)
    elif isinstance(problem, NormProblem):
        reasons = norm_reasons(problem)
    elif isinstance(problem, LinearProblem):
        reasons = linear_reasons(problem)
    else:
        return [f"the Triton backend has no kernel for {problem.op}"]
    runs = problem.device_type == "cuda" or (problem.device_type == "cpu" and interpreting()) or is_recording()
    if not runs:
        reasons.append(f"the Triton backend does not run on {problem.device_type} tensors")
    return reasons


def interpreting() -> bool:
    """Whether Triton's interpreter is asked for: TRITON_INTERPRET=1, set before anything imports triton."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton_reason() -> str | None:
    """What the installed Triton lacks. It is imported here, and builds its driver's module, or finds the one that it
    has built before: without a compiler every launch would raise."""
    try:
        triton = importlib.import_module("triton")
        version = tuple(map(int, triton.__version__.split(".")[:2]))
        if version < _OLDEST_TRITON:
            wanted = ".".join(map(str, _OLDEST_TRITON))
            return f"triton {triton.__version__} is too old: the kernels need {wanted}, which comes with torch 2.8"
        getattr(triton.runtime.driver.active, "utils", None)  # any attribute makes the driver
    except Exception as error:  # whatever a compiler, a loader or a driver says
        said = str(error).strip().splitlines() or [type(error).__name__]
        return (
            f"triton does not start: {said[0][:200]} (it compiles what launches kernels: that takes a C compiler, CC, "
            "gcc or clang, and the headers of Python)"
        )
    return None


@functools.cache
def _capability_reason() -> str | None:
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < _OLDEST_CAPABILITY:
            return (
                f"cuda:{index} has compute capability {capability[0]}.{capability[1]}; the Triton kernels need 8.0 on "
                "every visible GPU (hide older ones: CUDA_VISIBLE_DEVICES)"
            )
    return None
