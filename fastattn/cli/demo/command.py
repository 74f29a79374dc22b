"""The demo command: load, check, time, measure memory, print, plot, write JSON."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastattn.cli.console import output_file, progress_bar, wide_console
from fastattn.cli.demo.check import Agreement, compare, difference
from fastattn.cli.demo.memory import measure_apart
from fastattn.cli.demo.model import (
    MODEL_PACKAGE,
    VARIANTS,
    DemoError,
    full_batch,
    load_tokenizer,
    load_variant,
    model_folder,
    padded_batches,
    passages,
)
from fastattn.cli.demo.plot import draw
from fastattn.cli.demo.timing import SETTINGS, Effort, Timing, time_setting
from fastattn.environment import environment

TOLERANCE = 1e-5
_CORPUS_BATCH, _LONGEST = 32, 512
_QUICK = Effort(rounds=2, seconds=0.0, most=2, warm_up=1)


@dataclass(frozen=True)
class Plan:
    """What a run of the demo does."""

    folder: Path
    settings: tuple[tuple[int, int], ...] = SETTINGS
    effort: Effort = field(default_factory=Effort)
    with_compile: bool = True
    with_memory: bool = True
    texts: int | None = None


@dataclass(frozen=True)
class Result:
    """Everything a run found."""

    agreement: Agreement
    report: Any
    timings: list[Timing]
    compile_diff: float | None
    memory: dict[str, dict[str, float | str | None]]
    memory_setting: str
    seconds: float

    def to_json(self, folder: Path) -> dict[str, Any]:
        """Every figure of the run."""
        return {
            "model": model_name(folder),
            "max_abs_diff": self.agreement.max_abs_diff,
            "max_abs_diff_sdpa": self.agreement.sdpa_diff,
            "max_abs_diff_compile": self.compile_diff,
            "max_abs_diff_embedding": self.agreement.embedding_diff,
            "neighbours_agree": self.agreement.neighbours_agree,
            "all_called": self.agreement.all_called,
            "speedup_vs_sdpa": {t.name: t.speedup("sdpa") for t in self.timings},
            "settings": [t.to_json() for t in self.timings],
            "memory": {
                "measured": "one forward after a warm-up, each variant in its own process; growth_mb: rise of resident "
                "memory during the pass at its highest; peak_mb: highest resident memory of the whole process then",
                "setting": self.memory_setting,
                "variants": self.memory,
            },
            "swap": json.loads(self.report.to_json()),
            "environment": environment(),
            "seconds": self.seconds,
        }


def run_demo(plan: Plan, console: Console) -> Result:
    """Runs the demo and prints it as it goes."""
    began = time.perf_counter()
    texts = passages()[: plan.texts]
    tokenizer = load_tokenizer(plan.folder)
    names = [name for name in VARIANTS if name != "compile" or plan.with_compile]
    models: dict[str, Any] = {}
    with console.status("loading the model") as status:
        for name in names:
            status.update(f"loading the model: {name}")
            models[name], report = load_variant(plan.folder, name)
        status.update(f"embedding {len(texts)} passages with the original and the swapped model")
        batches = padded_batches(tokenizer, texts, _CORPUS_BATCH, _LONGEST)
        agreement = compare(models["eager"], models["sdpa"], models["fastattn"], report, batches)
    console.print(str(report), highlight=False, soft_wrap=True)
    _print_agreement(agreement, texts, console)
    timings, compile_diff = _time_all(plan, models, tokenizer, texts, console)
    console.print(_timing_table(timings))
    for timing in timings:
        for name, note in timing.notes.items():
            console.print(f"{timing.name}, {name}: {note}", style="yellow", highlight=False)
    models.clear()
    memory, setting = _memory(plan, names, console) if plan.with_memory else ({}, "")
    if memory:
        console.print(_memory_table(memory, setting))
    return Result(agreement, report, timings, compile_diff, memory, setting, time.perf_counter() - began)


def _time_all(
    plan: Plan, models: dict[str, Any], tokenizer: Any, texts: list[str], console: Console
) -> tuple[list[Timing], float | None]:
    """The timings, and the largest difference of the compiled model over the timed batches."""
    timings: list[Timing] = []
    worst: float | None = None
    with progress_bar(console) as progress:
        task = progress.add_task("timing", total=len(plan.settings))
        for size, length in plan.settings:
            batch = full_batch(tokenizer, texts, size, length)
            timing = time_setting(
                models, batch, plan.effort, lambda text: progress.update(task, description=f"timing {text}")
            )
            if timing.samples.get("compile"):
                with torch.no_grad():
                    compiled, eager = (batch.run(models[name]) for name in ("compile", "eager"))
                worst = max(worst or 0.0, difference([compiled], [eager], [batch]))
            timings.append(timing)
            progress.advance(task)
    return timings, worst


def _memory(plan: Plan, names: list[str], console: Console) -> tuple[dict[str, dict[str, float | str | None]], str]:
    size, length = max(plan.settings, key=lambda setting: setting[0] * setting[1] ** 2)
    found = {}
    with progress_bar(console) as progress:
        task = progress.add_task("peak memory", total=len(names))
        for name in names:
            progress.update(task, description=f"peak memory: {name}")
            found[name] = measure_apart(plan.folder, name, size, length, torch.get_num_threads())
            progress.advance(task)
    return found, f"{size}x{length}"


def _print_agreement(agreement: Agreement, texts: list[str], console: Console) -> None:
    good, bad = Text("yes", style="green"), Text("no", style="red")
    table = Table(show_header=False, box=None, title="The same answers?", title_justify="left")
    table.add_row("largest difference from eager, valid tokens", f"{agreement.max_abs_diff:.2e}")
    table.add_row("the same for torch's own sdpa", f"{agreement.sdpa_diff:.2e}")
    agree = good if agreement.neighbours_agree else bad + f": {agreement.neighbours_differing} of {len(texts)} differ"
    table.add_row(f"nearest-passage lists of {len(texts)} passages agree", agree)
    table.add_row("every swapped module ran, none fell back", good if agreement.all_called else bad)
    console.print(table, highlight=False)
    for here, there in agreement.examples[:: max(1, len(texts) // 3)][:3]:
        for label, index in (("passage", here), ("nearest", there)):
            console.print(f"  {label}: {texts[index][:90]}", highlight=False)


def _timing_table(timings: list[Timing]) -> Table:
    names = list(timings[0].samples) if timings else []
    title = "Time per batch in ms, median (quartiles), all variants interleaved"
    table = Table("batch x tokens", title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    others = [name for name in names if name != "fastattn"]
    for name in others:
        table.add_column(f"x {name}", justify="right", style="bold" if name == "sdpa" else "")
    for timing in timings:
        cells = []
        for name in names:
            middle, quartiles = timing.median(name), timing.quartiles(name)
            cells.append("failed" if middle is None or quartiles is None else _spread(middle, *quartiles))
        ratios = [timing.speedup(name) for name in others]
        table.add_row(timing.name, *cells, *("" if r is None else f"{r:.2f}" for r in ratios))
    return table


def _spread(middle: float, low: float, high: float) -> str:
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _memory_table(memory: dict[str, dict[str, float | str | None]], setting: str) -> Table:
    table = Table(title=f"Memory of one forward at {setting}, each variant in its own process", title_justify="left")
    table.add_column("variant")
    table.add_column("growth during the pass, MB", justify="right")
    table.add_column("peak of the process, MB", justify="right")
    for name, found in memory.items():
        if "error" in found:
            table.add_row(name, str(found["error"]), "")
            continue
        cells = [found.get(key) for key in ("growth_mb", "peak_mb")]
        table.add_row(name, *("unknown" if not isinstance(c, float) else f"{c:.0f}" for c in cells))
    return table


def model_name(folder: Path) -> str:
    """The checkpoint's name; the MiniLM package keeps its files in a folder called just model."""
    return "all-MiniLM-L6-v2" if folder.parent.name == MODEL_PACKAGE else folder.name


def subtitle() -> str:
    """One line under the plot's title: dtype, threads, processor, versions."""
    found = environment()
    return (
        f"float32, {found['threads']} threads on {found['cpu']} ({found['instruction_set']}), "
        f"torch {found['torch']}, fastattn {found['fastattn']}"
    )


def demo(
    model: Annotated[Path | None, typer.Option(help="Folder of a BERT checkpoint; else all-MiniLM-L6-v2.")] = None,
    plot: Annotated[
        Path | None, typer.Option(callback=output_file, help="Draw the timings into this PNG file.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--json", callback=output_file, help="Write every figure into this JSON file.")
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="Threads torch may use; 0 leaves its own choice.")] = 0,
    with_compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Also time torch.compile.")] = True,
    with_memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Also measure peak memory.")] = True,
    quick: Annotated[bool, typer.Option("--quick", hidden=True)] = False,
) -> None:
    """Swap a real pretrained BERT, check its answers, time it against torch, and measure its memory.

    Exit code 1 if the swapped model's answers differ.
    """
    console = wide_console()
    if threads:
        torch.set_num_threads(threads)
    try:
        folder = model_folder(model)
        plan = Plan(folder, with_compile=with_compile, with_memory=with_memory)
        if quick:
            settings = ((2, 24), (1, 16))
            plan = Plan(folder, settings, _QUICK, with_compile, with_memory, texts=12)
        result = run_demo(plan, console)
        if output is not None:
            output.write_text(json.dumps(result.to_json(folder), indent=2) + "\n")
            console.print(f"figures: {output}", highlight=False)
        if plot is not None:
            draw(result.timings, f"{model_name(folder)} before and after fastattn.swap", subtitle(), plot)
            console.print(f"plot: {plot}", highlight=False)
    except DemoError as error:
        console.print(str(error), style="red")
        raise typer.Exit(2) from None
    agreement = result.agreement
    if not (agreement.neighbours_agree and agreement.all_called and agreement.max_abs_diff <= TOLERANCE):
        console.print("The swapped model does not give the original's answers.", style="bold red")
        raise typer.Exit(1)
