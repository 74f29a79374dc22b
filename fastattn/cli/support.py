"""The support table, asked of the backends themselves through their `not_supported_reasons`."""

from __future__ import annotations

import importlib
from dataclasses import replace

import torch

from fastattn.problems import AttentionProblem, DecodeProblem, EncoderLayerProblem, LinearProblem, NormProblem

COLUMNS = ("cpu", "triton", "cuda", "reference")
_DEVICE = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda", "reference": "cpu"}

Problem = AttentionProblem | DecodeProblem | NormProblem | LinearProblem | EncoderLayerProblem
_ATTENTION = AttentionProblem("cpu", torch.float32, 2, 4, 4, 64, 64, 64, 64)
_DECODE = DecodeProblem("cpu", torch.float32, 2, 4, 4, 1, 64, 64, 64)
_NORM = NormProblem("cpu", torch.float32, "layer", 64, 64, weight_dtype=torch.float32)
_LINEAR = LinearProblem("linear_act", "cpu", torch.float32, torch.float32, "gelu", 64, 64, 0, 64)
_FFN = replace(_LINEAR, op="ffn", hidden_features=64)

ROWS: dict[str, Problem] = {
    "attention": _ATTENTION,
    "with grouped heads (GQA, MQA), Dv != D": replace(_ATTENTION, heads_kv=1, dim_v=32),
    "with causal and sliding-window masks": replace(_ATTENTION, band=True),
    "with key lengths and key ranges": replace(_ATTENTION, key_range=True),
    "with a key range per query": replace(_ATTENTION, intervals=1),
    "with block masks (BigBird, dilated, predicates)": replace(_ATTENTION, blocks=True),
    "with bool masks": replace(_ATTENTION, dense_mask=True),
    "with an additive mask or bias": replace(_ATTENTION, bias=torch.float32),
    "with a bias that requires grad": replace(
        _ATTENTION, bias=torch.float32, bias_requires_grad=True, requires_grad=True
    ),
    "with ALiBi, relative and T5 biases": replace(_ATTENTION, table=True, slopes=True),
    "with their gradients": replace(
        _ATTENTION,
        table=True,
        slopes=True,
        table_requires_grad=True,
        slopes_requires_grad=True,
        requires_grad=True,
    ),
    "with packed batches (`attention_varlen`)": replace(_ATTENTION, packed=True),
    "with softcap": replace(_ATTENTION, softcap=True),
    "with sinks": replace(_ATTENTION, sinks=True),
    "with dropout": replace(_ATTENTION, dropout=True),
    "attention_decode": _DECODE,
    "with a paged cache": replace(_DECODE, paged=True),
    "with a window, a bias, softcap or sinks": replace(
        _DECODE, band=True, bias=torch.float32, table=True, slopes=True, softcap=True, sinks=True
    ),
    "layer_norm, rms_norm": _NORM,
    "with dropout and residual add": replace(_NORM, dropout=True, residual_dtype=torch.float32),
    "linear_act": _LINEAR,
    "ffn, gated_ffn": _FFN,
    "with dropout of the hidden layer": replace(_FFN, dropout=True),
    "encoder_layer": EncoderLayerProblem("cpu", torch.float32, 2, 64, 4, 64, 128, "gelu"),
}


def _accepts(backend: str, problem: Problem) -> bool:
    module = importlib.import_module(f"fastattn.backends.{backend}")
    return not module.not_supported_reasons(replace(problem, device_type=_DEVICE[backend]))


def refused_operations(backend: str) -> dict[str, str]:
    """The operations that a backend refuses in every row of the table, each with its reasons."""
    module = importlib.import_module(f"fastattn.backends.{backend}")
    by_op: dict[str, list[Problem]] = {}
    for problem in ROWS.values():
        by_op.setdefault(problem.op, []).append(problem)
    return {
        op: "; ".join(module.not_supported_reasons(replace(problems[0], device_type=_DEVICE[backend])))
        for op, problems in by_op.items()
        if all(verdict(backend, problem) == "no" for problem in problems)
    }


def _in_half(problem: Problem) -> Problem:
    """The same call in bfloat16; backends take float16 alike."""
    if isinstance(problem, LinearProblem):
        return replace(problem, dtype=torch.bfloat16, weight_dtype=torch.bfloat16)
    return replace(problem, dtype=torch.bfloat16)


def _directions(backend: str, problem: Problem) -> str:
    if isinstance(problem, (DecodeProblem, EncoderLayerProblem)):  # inference only
        return "forward" if _accepts(backend, problem) else "no"
    if _accepts(backend, replace(problem, requires_grad=True)):
        return "yes"
    return "forward" if not problem.requires_grad and _accepts(backend, problem) else "no"


def verdict(backend: str, problem: Problem) -> str:
    """ "yes", "forward" (there is no backward for this), or "no"; with the dtypes where they differ."""
    single, half = _directions(backend, problem), _directions(backend, _in_half(problem))
    if single == half:
        return single
    parts = [f"{what}, {dtypes}" for what, dtypes in ((single, "float32"), (half, "half")) if what != "no"]
    return "; ".join(parts)


def support_table() -> str:
    """The table in Markdown: a line per feature, a column per backend."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for name, problem in ROWS.items():
        label = f"&nbsp;&nbsp;{name}" if name.startswith("with ") else f"`{name}`".replace(", ", "`, `")
        lines.append(f"| {label} | {' | '.join(verdict(backend, problem) for backend in COLUMNS)} |")
    return "\n".join(lines)
