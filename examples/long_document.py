"""Reads a long document with an encoder on the CPU: full attention beside Longformer's and BigBird's masks.

    pip install 'fastattn[cli,plot]' && python examples/long_document.py

The encoder is a pre-norm transformer over bytes with random weights: what it computes means nothing, what it costs does
not depend on that. Every variant runs the same weights on the same document; the two Longformer variants compute the
same thing, and the example checks it. Prints time, memory and density, and draws the masks and the times.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastattn
from fastattn.masks import BigBird, Longformer, Mask

WIDTH, HEADS, HIDDEN = 256, 4, 1024
TORCH = "torch sdpa, Longformer as a bool mask"
VARIANTS: dict[str, Mask | None] = {
    "full attention": None,
    "Longformer": Longformer(512, 64),
    "BigBird": BigBird(64, window_blocks=3, global_blocks=2, random_blocks=3),
    TORCH: Longformer(512, 64),
}
COLOURS = {"full attention": "#7d8ea6", "Longformer": "#c8443c", "BigBird": "#d9a441", TORCH: "#b8bfc9"}


class Encoder:
    """x + attention(norm(x)), then x + ffn(norm(x)), a few times over; (S,) bytes to (S, WIDTH)."""

    def __init__(self, layers: int) -> None:
        torch.manual_seed(0)
        self.embedding = torch.randn(256, WIDTH)
        shapes = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}
        self.layers = [{n: torch.randn(s) * s[1] ** -0.5 for n, s in shapes.items()} for _ in range(layers)]

    def __call__(self, document: Tensor, variant: str) -> Tensor:
        x = self.embedding[document][None]
        for weights in self.layers:
            qkv = fastattn.linear_act(fastattn.layer_norm(x), weights["qkv"])
            q, k, v = qkv.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            x = x + fastattn.linear_act(self.attend(q, k, v, variant).transpose(1, 2).flatten(2), weights["out"])
            x = x + fastattn.ffn(fastattn.layer_norm(x), weights["up"], None, weights["down"], None)
        return x[0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, variant: str) -> Tensor:
        if variant == TORCH:
            seen = bool_mask(q.shape[2])
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return fastattn.attention(q, k, v, mask=VARIANTS[variant])


@functools.cache
def bool_mask(tokens: int) -> Tensor:
    """Longformer's mask as torch takes it: tokens x tokens bools, made once."""
    return VARIANTS[TORCH].to_dense(1, 1, tokens, tokens)


def read(text: Path | None, tokens: int) -> Tensor:
    """The first `tokens` bytes of a file, or of the prose that comes with fastattn; repeated if there are fewer."""
    path = Path(fastattn.__file__).with_name("cli") / "passages.txt" if text is None else text
    content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).int()
    return content.repeat(-(-tokens // content.numel()))[:tokens]


def seconds(encoder: Encoder, document: Tensor, repeats: int) -> dict[str, float]:
    """The median time of a forward pass of each variant, taken in turns after a first pass."""
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(repeats + 1):
        for variant, found in times.items():
            start = time.perf_counter()
            encoder(document, variant)
            found.append(time.perf_counter() - start)
    return {variant: sorted(found[1:])[repeats // 2] for variant, found in times.items()}


def peak_mib(variant: str, tokens: int, layers: int) -> float | None:
    """By how much a forward pass raises the resident memory of a fresh process at its highest; None without Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, "--tokens", str(tokens), "--layers", str(layers), "--memory-of", variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def memory_of(variant: str, document: Tensor, layers: int) -> float:
    """`peak_mib` of this process."""

    def status(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024

    encoder = Encoder(layers)
    encoder(document[:128], variant)  # what is loaded once
    mask = bool_mask(document.numel()).nbytes / 2**20 if variant == TORCH else 0.0
    before = status("VmRSS") - mask
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark goes back to what is resident now
    encoder(document, variant)
    return status("VmHWM") - before


def draw(times: dict[str, float], tokens: int, layers: int, target: Path) -> None:
    """The masks, and under them the times."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [["Longformer", "BigBird"], ["times", "times"]], figsize=(11, 9.2), height_ratios=[2.6, 1], layout="constrained"
    )
    for variant in ("Longformer", "BigBird"):
        VARIANTS[variant].plot(tokens, tokens, axes[variant])
    bars = axes["times"].barh(list(times), list(times.values()), color=[COLOURS[variant] for variant in times])
    axes["times"].bar_label(bars, [f"{value:.2f} s" for value in times.values()], padding=4, fontsize=9)
    axes["times"].invert_yaxis()
    axes["times"].spines[["top", "right"]].set_visible(False)
    axes["times"].margins(x=0.12)
    axes["times"].set_xlabel(f"seconds per forward pass, {tokens} tokens, {layers} layers (lower is better)")
    figure.savefig(target, dpi=130)


def main(
    tokens: Annotated[int, typer.Option(min=64, help="Length of the document in bytes.")] = 8192,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the encoder.")] = 2,
    text: Annotated[Path | None, typer.Option(help="A file to read instead of the prose in the package.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes of each variant.")] = 3,
    output: Annotated[Path, typer.Option(help="Where to save the picture.")] = Path("long_document.png"),
    memory_of_variant: Annotated[str, typer.Option("--memory-of", hidden=True)] = "",
) -> None:
    """Time, memory and density of an encoder over a long document with full, Longformer and BigBird attention."""
    document = read(text, tokens)
    with torch.inference_mode():
        if memory_of_variant:
            typer.echo(json.dumps(memory_of(memory_of_variant, document, layers)))
            return
        encoder = Encoder(layers)
        times = seconds(encoder, document, repeats)
        apart = (encoder(document, "Longformer") - encoder(document, TORCH)).abs().max().item()
    table = Table("attention", "visible pairs", "time", "full / this", "peak memory", title=f"{tokens} tokens")
    for variant, mask in VARIANTS.items():
        share = 1.0 if mask is None else mask.density(tokens, tokens)
        memory = peak_mib(variant, tokens, layers)
        shown = "" if memory is None else f"{memory:.0f} MiB"
        ratio = times["full attention"] / times[variant]
        table.add_row(variant, f"{100 * share:.1f} %", f"{times[variant]:.2f} s", f"{ratio:.1f}", shown)
    console = Console()
    console.print(table)
    console.print(f"The two Longformer variants differ by {apart:.1e} at most, in activations of size 1 to 10.")
    draw(times, tokens, layers, output)
    console.print(f"The masks and the times: {output}")


if __name__ == "__main__":
    typer.run(main)
