"""`fastattn explain`: which backend would run an attention call described by options, and why each other does not."""

from __future__ import annotations

import json
from typing import Annotated

import torch
import typer
from rich.table import Table

from fastattn import dispatch
from fastattn.cli.console import wide_console
from fastattn.dispatch import Explanation, backends, check_backend_name, explain_problem
from fastattn.functional.attention import MAX_HEAD_DIM
from fastattn.masks.intervals import MOST
from fastattn.problems import AttentionProblem

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_MASKS = ("none", "causal", "window", "lengths", "keys", "ranges", "intervals", "blocks", "dense")


def parse_shape(text: str) -> tuple[int, ...]:
    """B,Hq,Hkv,Sq,Skv,D or B,Hq,Hkv,Sq,Skv,D,Dv as whole numbers. Raises typer.BadParameter for anything else."""
    parts = text.split(",")
    if len(parts) not in (6, 7) or not all(part.strip().isdigit() for part in parts):
        raise typer.BadParameter(
            f"{text!r}: pass B,Hq,Hkv,Sq,Skv,D such as 8,12,12,360,360,32 (a seventh number is Dv)"
        )
    numbers = tuple(int(part) for part in parts)
    if numbers[2] == 0 or numbers[1] % numbers[2]:
        raise typer.BadParameter(f"{text!r}: Hq={numbers[1]} is no multiple of Hkv={numbers[2]}")
    shape = numbers if len(numbers) == 7 else (*numbers, numbers[5])
    if not all(1 <= dim <= MAX_HEAD_DIM for dim in shape[5:]):
        raise typer.BadParameter(f"{text!r}: attention takes head dims of 1 to {MAX_HEAD_DIM}, not {max(shape[5:])}")
    return shape


def _choice(value: str, options: list[str] | tuple[str, ...], name: str) -> str:
    if value not in options:
        raise typer.BadParameter(f"{name} {value!r}: pass one of {', '.join(options)}")
    return value


def problem_of(
    shape: tuple[int, ...], device: str, dtype: str, masks: list[str], bias: str | None, **flags: bool
) -> AttentionProblem:
    """The problem that the options describe; masks combine as `&` combines them."""
    batch, heads_q, heads_kv, len_q, len_k, dim, dim_v = shape
    return AttentionProblem(
        device_type=device,
        dtype=_DTYPES[dtype],
        batch=batch,
        heads_q=heads_q,
        heads_kv=heads_kv,
        len_q=len_q,
        len_k=len_k,
        dim_qk=dim,
        dim_v=dim_v,
        key_range="lengths" in masks,
        band="causal" in masks or "window" in masks,
        intervals=MOST if "intervals" in masks else 1 if "ranges" in masks else 0,
        dense_mask="dense" in masks,
        key_bits="keys" in masks,
        blocks="blocks" in masks,
        bias=None if bias is None else _DTYPES[bias],
        **flags,
    )


_RUNS, _ELSEWHERE = "runs it", "would run it"


def _verdict(found: Explanation, name: str, missing: str | None) -> str:
    """missing: why this machine lacks the backend; with nothing else against it, it would run the call elsewhere."""
    reasons = found.reasons[name]
    if name == found.chosen:
        return _RUNS
    if not reasons:
        return "could run it"
    return _ELSEWHERE if reasons == [missing] else "does not"


def _print(found: Explanation) -> None:
    console = wide_console()
    missing = backends()
    verdicts = {name: _verdict(found, name, missing[name]) for name in found.reasons}
    elsewhere = next((name for name, verdict in verdicts.items() if verdict in (_RUNS, _ELSEWHERE)), found.chosen)
    headline = f"{found.chosen or 'no backend'} runs this call"
    if elsewhere != found.chosen:
        headline += f" here, {elsewhere} where it is available"
    console.print(headline, style="bold", highlight=False)
    table = Table("backend", "verdict", "why not")
    for name, reasons in found.reasons.items():
        table.add_row(name, verdicts[name], "\n".join(reasons))
    console.print(table, highlight=False)
    console.print(str(found.problem), highlight=False)


def explain(
    shape: Annotated[str, typer.Option(help="B,Hq,Hkv,Sq,Skv,D and, if it differs from D, Dv.")] = "8,12,12,360,360,32",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(_DTYPES)}.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda; the machine need not have it.")] = "cpu",
    mask: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(_MASKS)}; repeat it to combine masks.")
    ] = None,
    bias: Annotated[str | None, typer.Option(help="The dtype of an additive bias.")] = None,
    bias_grad: Annotated[bool, typer.Option("--bias-grad", help="The bias requires a gradient.")] = False,
    softcap: Annotated[bool, typer.Option("--softcap", help="Scores are capped.")] = False,
    sinks: Annotated[bool, typer.Option("--sinks", help="There is one more logit per head.")] = False,
    dropout: Annotated[bool, typer.Option("--dropout", help="Weights are dropped.")] = False,
    grad: Annotated[bool, typer.Option("--grad", help="q, k or v require a gradient.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="The backward is to be repeatable.")] = False,
    backend: Annotated[str, typer.Option(help="A backend that is forced; empty: FASTATTN_BACKEND, or a choice.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show which backend runs an attention call, and why each other does not. Exit code 1 if none does."""
    masks = [_choice(name, _MASKS, "--mask") for name in mask or []]
    _choice(dtype, list(_DTYPES), "--dtype")
    _choice(device, ("cpu", "cuda"), "--device")
    if bias is not None:
        _choice(bias, list(_DTYPES), "--bias")
        if bias not in (dtype, "float32"):
            allowed = " or ".join(dict.fromkeys((dtype, "float32")))
            raise typer.BadParameter(f"--bias {bias}: beside q of {dtype} a bias is of {allowed}")
    if bias_grad and bias is None:
        raise typer.BadParameter("--bias-grad: there is no bias; add --bias float32")
    problem = problem_of(
        parse_shape(shape),
        device,
        dtype,
        masks,
        bias,
        bias_requires_grad=bias_grad,
        softcap=softcap,
        sinks=sinks,
        dropout=dropout,
        requires_grad=grad or bias_grad,
        deterministic=deterministic,
    )
    try:
        found = explain_problem(problem, check_backend_name(backend) or dispatch.forced)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if as_json:
        typer.echo(json.dumps({"chosen": found.chosen, "reasons": found.reasons, "problem": str(problem)}, indent=2))
    else:
        _print(found)
    if found.chosen is None:
        raise typer.Exit(1)
