"""`fastattn bench`: run suites, compare two runs, and write the performance page."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from fastattn.bench.cases.base import DIRECTIONS
from fastattn.bench.cases.grid import SHAPES, SUITES, Choice, cases
from fastattn.bench.compare import Change, compare_results
from fastattn.bench.providers import PROVIDERS
from fastattn.bench.report import write_report
from fastattn.bench.report.table import print_result
from fastattn.bench.rows import Result, merge, read_result, why_apart
from fastattn.bench.run import Options, questions, run_bench
from fastattn.cli.console import output_file, progress_bar, wide_console
from fastattn.dispatch import BackendWarning
from fastattn.environment import device_environment

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _RunByDefault(TyperGroup):
    """`fastattn bench attention` is `fastattn bench run attention`: whatever names no command is for `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] == "--help")
        parsed: list[str] = super().parse_args(ctx, args if named else ["run", *args])
        return parsed


bench = typer.Typer(
    cls=_RunByDefault,
    help="Verify and time fastattn beside everything else that is installed; `run` may be left out.",
    add_completion=False,
    rich_markup_mode=None,
)


def _one_of(values: list[str], known: Any, option: str) -> tuple[str, ...]:
    for value in values:
        if value not in known:
            raise typer.BadParameter(f"{option} {value}: unknown; pass one of {', '.join(known)}")
    return tuple(dict.fromkeys(values))


def default_device() -> str:
    """cuda where torch sees a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@bench.command()
def run(
    suites: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SUITES)}; all if none is named.")] = None,
    shapes: Annotated[
        list[str] | None, typer.Option(help=f"Only the cases of a model, one of {', '.join(SHAPES)}; may be repeated.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(_DTYPES)}; float32 on CPUs, bfloat16 on GPUs.")] = "",
    direction: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(DIRECTIONS)}; may be repeated. Each case has its own.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; empty takes cuda where torch sees a GPU.")] = "",
    threads: Annotated[int, typer.Option(min=0, help="Threads torch may use; 0 leaves its own choice.")] = 0,
    provider: Annotated[
        list[str] | None, typer.Option("--only", help="Only this provider, by its exact name; may be repeated.")
    ] = None,
    match: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Providers that compile for every shape join all cases, or none."),
    ] = None,
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Also measure peak memory.")] = True,
    output: Annotated[
        Path | None, typer.Option("--json", callback=output_file, help="Write every figure into this JSON file.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write report.md, plots and results.json to this folder.")] = None,
    append: Annotated[bool, typer.Option("--append", help="Add to what --report or --json holds already.")] = False,
    budget: Annotated[float, typer.Option(min=0, help="Seconds after which no case is begun; 0: no limit.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, two rounds: a trial, no figures.")] = False,
) -> None:
    """Verify every provider on every case under the parity rule, then time them together. Exit code 1 on a mismatch.

    Providers are found at run time: fastattn's backends, torch eager, each SDPA backend, torch.compile, FlexAttention,
    FlashAttention-3, Liger and, for whole models, ONNX Runtime and OpenVINO. One that is missing or refuses a case is
    listed with its reason.
    """
    chosen = _one_of(suites or list(SUITES), SUITES, "suite")
    where = _device(device)
    named = _one_of([dtype or ("bfloat16" if where == "cuda" else "float32")], _DTYPES, "--dtype")[0]
    picked = None if not shapes else _one_of(shapes, SHAPES, "--shapes")
    directions = _one_of(direction or [], DIRECTIONS, "--direction")
    only = frozenset(_one_of(provider or [], [p.name for p in PROVIDERS], "--only")) or None
    if append and output is None and report is None:
        raise typer.BadParameter("--append adds to the results of --json FILE or --report DIR: pass one of them")
    if threads:
        torch.set_num_threads(threads)
    console = wide_console()
    options = Options(where, directions, memory, compiled, quick, only, budget=budget or None)
    wanted = cases(chosen, Choice(where, _DTYPES[named], picked, quick))
    wanted = [case for case in wanted if match in case.name]
    if not questions(wanted, options):
        raise typer.BadParameter("no case is left: loosen --shapes, --direction or --match")
    files = [file for file in (output, report and report / "results.json") if file is not None]
    held = {file: read_result(file) if append and file.exists() else None for file in files}
    for file, before in held.items():
        reason = None if before is None else why_apart(before, device_environment(where), quick)
        if reason is not None:
            raise typer.BadParameter(f"--append to {file}: {reason}; write to another file")
    result = _run(wanted, options, console, lambda so_far: _write(so_far, held))
    print_result(result, console)
    _write(result, held)
    if report is not None:
        page = write_report(read_result(report), report)[1]
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
    if not result.passed:
        raise typer.Exit(1)


def _device(name: str) -> str:
    if name not in ("", "cpu", "cuda"):
        raise typer.BadParameter(f"--device {name}: unknown; pass cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: torch sees no GPU here")
    return name or default_device()


def _run(wanted: list[Any], options: Options, console: Console, keep: Callable[[Result], object]) -> Result:
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(questions(wanted, options)))
        begun = -1  # the first step measures the limits

        def step(text: str) -> None:
            nonlocal begun
            progress.update(task, description=text, completed=max(begun, 0))
            begun += 1

        return run_bench(wanted, options, step, keep)


def _write(result: Result, held: dict[Path, Result | None]) -> None:
    """Writes every figure into each JSON file, after what it held before the run where that is kept."""
    for file, before in held.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        (result if before is None else merge([before, result])).write(file)


@bench.command()
def compare(
    old: Annotated[Path, typer.Argument(help="A JSON file or report folder of an earlier run.")],
    new: Annotated[Path, typer.Argument(help="The same of a later run.")],
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 where fastattn became slower.")] = False,
) -> None:
    """Say what became faster or slower between two runs beyond the noise of both."""
    console = wide_console()
    try:
        found = compare_results(read_result(old), read_result(new))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console.print(found.text(), highlight=False, soft_wrap=True)
    if strict and any(change.row.ours and change.verdict == Change.SLOWER for change in found.changes):
        raise typer.Exit(1)


@bench.command()
def tune(
    output: Annotated[
        Path | None, typer.Option(callback=output_file, help="Also write the times of every choice to this JSON file.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(_DTYPES)}.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda; empty takes cuda where torch sees a GPU.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A few choices, two rounds: a trial, no figures.")] = False,
) -> None:
    """Time every choice of the backends' tile tables, each verified first. Changes no table."""
    from fastattn.bench.tune import Tuned
    from fastattn.bench.tune import tune as run_tune

    where = _device(device)
    named = _one_of([dtype or ("bfloat16" if where == "cuda" else "float32")], _DTYPES, "--dtype")[0]
    console = wide_console()
    environment = device_environment(where)

    def keep(found: list[Tuned]) -> None:
        if output is not None:
            entries = [asdict(tuned) for tuned in found]
            content = {"environment": environment, "dtype": named, "quick": quick, "entries": entries}
            output.write_text(json.dumps(content, indent=1, default=str) + "\n")

    with console.status("tuning") as status, warnings.catch_warnings():
        warnings.simplefilter("ignore", BackendWarning)
        found = run_tune(
            where, _DTYPES[named], quick=quick, step=lambda text: status.update(Text(f"tuning {text}")), keep=keep
        )
    keep(found)
    for tuned in found:
        console.print(str(tuned), highlight=False, soft_wrap=True)
    if not found:
        console.print("no backend that this machine can use has anything to tune", highlight=False)


@bench.command()
def docs(
    results: Annotated[Path, typer.Argument(help="The folder of committed result folders.")] = Path("bench/results"),
    folder: Annotated[Path, typer.Option(help="Where performance.md and parity.md are written.")] = Path("docs"),
) -> None:
    """Write the pages of performance and of parity from committed results."""
    from fastattn.bench.docs import performance_page
    from fastattn.parity.page import parity_page

    try:
        pages = {"performance.md": performance_page(results, folder), "parity.md": parity_page(results)}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():
        (folder / name).write_text(page)
