"""`fastattn verify`: random cases of an operation, each held to the parity rule on one backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastattn import dispatch
from fastattn.backends import cuda, triton
from fastattn.cli.console import output_file, progress_bar, wide_console
from fastattn.dispatch import backends
from fastattn.environment import device_environment
from fastattn.parity.cases import OPERATIONS, draw_case, parse_token
from fastattn.parity.report import VerifyReport
from fastattn.parity.run import operations
from fastattn.parity.run import verify as run_verify

_SHOWN_FAILURES = 10
_DTYPES = ("float32", "bfloat16", "float16")


_NATIVE = ("cuda", "cpu")


def default_backend(console: Console) -> str:
    """That of FASTATTN_BACKEND, else the first native backend that this machine can use, else, which is said, the
    reference."""
    usable = backends()
    found = dispatch.forced or next((name for name in _NATIVE if usable[name] is None), "")
    if not found:
        reasons = "; ".join(f"{name}: {usable[name]}" for name in _NATIVE)
        console.print(f"no native backend can be used, the reference is checked: {reasons}", style="bold yellow")
    return found or "reference"


def _ratio(ratio: float) -> Text:
    return Text(f"{ratio:.3g}", style="red") if not ratio <= 1.0 else Text(f"{ratio:.3f}")


def worst_table(report: VerifyReport, op: str) -> Table:
    """Worst error ratio of each quantity of an op, a column per dtype; the gradients of dO * 2^-12 on the same line."""
    table = Table(title=f"{op}: worst error / bound", title_justify="left")
    table.add_column("quantity")
    for dtype in _DTYPES:
        table.add_column(dtype, justify="right")
    table.add_column("rows", justify="right")
    quantities: dict[str, None] = {}
    for key_op, _, name in report.worst:
        if key_op == op:
            quantities[name.removesuffix(" * 2^-12")] = None
    for name in quantities:
        cells: list[Text] = []
        rows = 0
        for dtype in _DTYPES:
            found = [report.worst.get((op, dtype, name + suffix)) for suffix in ("", " * 2^-12")]
            ratios = [worst.ratio for worst in found if worst is not None]
            rows += sum(worst.rows for worst in found if worst is not None)
            cells.append(_ratio(max(ratios)) if ratios else Text())
        table.add_row(name, *cells, str(rows))
    return table


def _print(report: VerifyReport, console: Console) -> None:
    for op in report.cases:
        if any(key[0] == op for key in report.worst):
            console.print(worst_table(report, op), highlight=False)
    if report.refusals:
        table = Table("op", "cases", "reason", title="Refused", title_justify="left")
        for (op, reason), count in report.refusals.most_common():
            table.add_row(op, str(count), reason)
        console.print(table, highlight=False)
    for failure in report.failures[:_SHOWN_FAILURES]:
        console.print(str(failure), style="red", highlight=False, soft_wrap=True)
    if len(report.failures) > _SHOWN_FAILURES:
        console.print(f"... and {len(report.failures) - _SHOWN_FAILURES} more failures", style="red")
    verdict = "all within the bound" if report.passed else f"{len(report.failures)} FAILED"
    if not report.failures and not report.checked:
        verdict = "so nothing is known"
    forward = f" ({report.forward_only} forward only)" if report.forward_only else ""
    console.print(
        f"backend {report.backend}, seed {report.seed}: {report.checked} cases checked{forward}, "
        f"{report.refused} refused, {verdict}, {report.seconds:.1f} s",
        style="bold" if report.passed else "bold red",
        highlight=False,
    )
    if report.left_out:
        ran = ", ".join(f"{op} {report.cases[op]} of {asked}" for op, asked in report.asked.items())
        console.print(f"the time was up: {report.left_out} cases were left out; run: {ran}", style="bold yellow")


def _run(title: str, total: int, console: Console, run: Callable[..., VerifyReport]) -> VerifyReport:
    with progress_bar(console, TimeRemainingColumn()) as progress:
        task = progress.add_task(title, total=total)
        return run(progress=lambda: progress.advance(task))


def _device(backend: str) -> str:
    """Where the cases are drawn: on a GPU for its kernels, unless Triton's interpreter or the emulation runs them."""
    if backend == "cuda":
        return cuda.device_type()
    return "cuda" if backend == "triton" and not triton.interpreting() else "cpu"


def verify(
    op: Annotated[str, typer.Option(help=f"Of {', '.join(OPERATIONS)}, with commas between them; or all.")] = "all",
    backend: Annotated[
        str, typer.Option(help="That under test; empty: FASTATTN_BACKEND, or the first native one.")
    ] = "",
    cases: Annotated[int, typer.Option(min=1, help="Random cases of each operation.")] = 200,
    first: Annotated[int, typer.Option(min=0, help="The first of them to run, for a count done in parts.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other cases.")] = 0,
    isa: Annotated[str | None, typer.Option(help="The CPU backend's instruction set; see `fastattn info`.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes that the cases run in.")] = 1,
    seconds: Annotated[float | None, typer.Option(help="Seconds after which no further case is begun.")] = None,
    repro: Annotated[str | None, typer.Option(help="Replay one case, such as 0.17, as a failure printed it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    output: Annotated[Path | None, typer.Option(callback=output_file, help="Also write the JSON to this file.")] = None,
    note: Annotated[str, typer.Option(help="A sentence that the JSON keeps, of how the kernels ran.")] = "",
) -> None:
    """Check a backend against float64 on random calls, forward and backward. Exit code 1 if one fails or none is run.

    Every output and gradient must satisfy max|x - ref64| <= 2 max|eager - ref64| + 2 u max|ref64| + 2^-20 max T, and
    every mask is also checked by exact integer counts. A case the backend refuses is counted by reason, not failed;
    where it refuses only the gradients, the forward is checked. A run that --seconds cuts off says what was left out.
    """
    console = wide_console(stderr=as_json)
    name = backend or default_backend(console)
    only = range(first, cases)
    try:
        if not only:
            raise ValueError(f"--first {first} of --cases {cases} leaves none: pass less than the cases")
        if repro is not None:
            if len(operations(op)) != 1:
                raise ValueError("--repro replays a case of one op: add --op")
            seed, index = parse_token(repro)
            only = range(index, index + 1)
            described = draw_case(op, seed, index).describe()
            console.print(f"{op} {repro}: {described}", highlight=False, soft_wrap=True)
        run = partial(run_verify, op, name, cases, seed, only=only, isa=isa, device=_device(name))
        total = len(operations(op)) * len(only)
        report = _run(f"{op} on {name}", total, console, partial(run, jobs=jobs, seconds=seconds))
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from None
    text = json.dumps({"note": note, "environment": device_environment(_device(name)), **report.to_json()}, indent=2)
    if as_json:
        typer.echo(text)
    else:
        _print(report, console)
    if output is not None:
        output.write_text(text + "\n")
    if not report.passed:
        raise typer.Exit(1)
