"""The CUDA backend: libfastattn_cuda.so, through the module fastattn._cuda. It has the forward of linear_act.

Without the library, a driver or a fitting device it is a sentence in `unavailable_reason`, never an import error.
"""

from __future__ import annotations

from fastattn.backends.cuda.library import architectures, devices, unavailable_reason
from fastattn.backends.cuda.linear_act import linear_act_forward, linear_act_reasons
from fastattn.problems import LinearProblem, Problem

__all__ = ["NAME", "architectures", "devices", "linear_act_forward", "not_supported_reasons", "unavailable_reason"]

NAME = "cuda"


def not_supported_reasons(problem: Problem) -> list[str]:
    """Why this problem is refused; empty for linear_act without gradients in float32, bfloat16 and float16."""
    if not isinstance(problem, LinearProblem) or problem.op != "linear_act":
        return [f"the CUDA backend has no kernel for {problem.op}"]
    return linear_act_reasons(problem)
