"""Trains a small translator twice from the same weights, once as torch.nn builds it and once after `fastattn.swap`, and
plots both loss curves and the time of a step. The model is an nn.Transformer between embeddings and a projection; it
learns to write a sequence of tokens backwards, with padding, a causal mask and dropout, as one would train the real
thing. Dropout masks are drawn by different generators, so the curves differ as two seeds of one model do; without
dropout (`--dropout 0`) they lie on each other to rounding. Run it as `python examples/train_swapped.py`; it takes about
a minute, prints a table and writes train_swapped.png.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import fastattn

VOCABULARY, LENGTH, BATCH, WIDTH = 32, 48, 16, 192


class Translator(nn.Module):
    """source (B, S) and what comes before each target token (B, S) -> logits (B, S, VOCABULARY)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.transformer = nn.Transformer(
            WIDTH, 6, 2, 2, 4 * WIDTH, dropout=dropout, activation="gelu", batch_first=True
        )
        self.project = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("causal", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, source: Tensor, before: Tensor, padding: Tensor) -> Tensor:
        hidden = self.transformer(
            self.embed(source),
            self.embed(before),
            tgt_mask=self.causal,
            tgt_is_causal=True,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return self.project(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.places.weight


def draw_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Source and target tokens (B, S), 0 where there is padding, and where that is."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1), generator=generator)
    position = torch.arange(LENGTH)
    padding = position >= lengths
    source = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=generator).masked_fill(padding, 0)
    target = source.gather(1, (lengths - 1 - position).clamp(min=0)).masked_fill(padding, 0)
    return source, target, padding


@dataclass
class Trainee:
    """A model with its optimizer, and what its steps gave."""

    name: str
    model: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def step(self, source: Tensor, target: Tensor, padding: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        logits = self.model(source, F.pad(target, (1, 0))[:, :-1], padding)
        loss = F.cross_entropy(logits[~padding], target[~padding])
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def train(trainees: list[Trainee], steps: int, console: Console) -> None:
    """The same batches to all, in turns, so that they share whatever else the machine does."""
    with Progress(console=console, transient=True) as progress:
        for step in progress.track(range(steps), description="training"):
            batch = draw_batch(step)
            for trainee in trainees:
                torch.manual_seed(step)
                trainee.step(*batch)


def table(trainees: list[Trainee]) -> Table:
    found = Table("", "first loss", "last loss", "ms per step", "times as fast", title="the same training, twice")
    baseline = statistics.median(trainees[0].seconds)
    for trainee in trainees:
        seconds = statistics.median(trainee.seconds)
        last = statistics.mean(trainee.losses[-10:])
        cells = f"{trainee.losses[0]:.4f}", f"{last:.4f}", f"{1e3 * seconds:.1f}", f"{baseline / seconds:.2f}"
        found.add_row(trainee.name, *cells)
    return found


def plot(trainees: list[Trainee], path: Path) -> None:
    figure, (curves, times) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(3, 1), layout="constrained")
    for trainee in trainees:
        curves.plot(trainee.losses, label=trainee.name, linewidth=1.2, alpha=0.85)
        times.bar(trainee.name, 1e3 * statistics.median(trainee.seconds))
    curves.set(xlabel="step", ylabel="cross-entropy", title="loss")
    curves.legend(frameon=False)
    times.set(ylabel="ms", title="median time of a step")
    for axes in (curves, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--output", type=Path, default=Path("train_swapped.png"))
    options = parser.parse_args()

    console = Console()
    torch.manual_seed(0)
    original = Translator(options.dropout)
    swapped = copy.deepcopy(original)
    report = fastattn.swap(swapped, strict=True)
    console.print(report)
    trainees = [Trainee("torch.nn", original), Trainee("fastattn", swapped)]
    train(trainees, options.steps, console)
    console.print(table(trainees))
    plot(trainees, options.output)
    console.print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
