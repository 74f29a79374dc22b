"""The demo's picture: time per batch of each variant, and the speedup over torch's sdpa."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastattn.cli.demo.model import DemoError
from fastattn.cli.demo.timing import Timing

_COLOURS = {"eager": "#b8bfc9", "sdpa": "#7d8ea6", "compile": "#d9a441", "fastattn": "#c8443c"}
_LABELS = {"eager": "eager", "sdpa": "torch sdpa", "compile": "torch.compile", "fastattn": "fastattn"}
_INK = "#2b3140"
_TICKS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)


def draw(timings: list[Timing], title: str, subtitle: str, target: Path) -> None:
    """Writes a PNG (or whatever the ending of `target` says). DemoError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise DemoError("--plot needs matplotlib, which is not installed: pip install 'fastattn[plot]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variants = [v for v in _COLOURS if any(t.median(v) is not None for t in timings)]
    with plt.rc_context({"font.size": 10, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": "#9aa3b2"}):
        figure, (times, ratios) = plt.subplots(1, 2, figsize=(12.5, 5.0), gridspec_kw={"width_ratios": [1.7, 1]})
        figure.suptitle(title, x=0.02, ha="left", size=15, weight="bold")
        figure.text(0.02, 0.9, subtitle, size=9.5, color="#626b7c")
        _draw_times(times, timings, variants)
        _draw_ratios(ratios, timings)
        for axes in (times, ratios):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(colors=_INK, length=0)
            axes.set_axisbelow(True)
            axes.set_xlabel("batch x tokens")
        figure.subplots_adjust(left=0.06, right=0.985, top=0.79, bottom=0.12, wspace=0.14)
        figure.savefig(target, dpi=160)
        plt.close(figure)


def _draw_times(axes: Any, timings: list[Timing], variants: list[str]) -> None:
    width = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        for place, timing in enumerate(timings):
            middle, quartiles = timing.median(variant), timing.quartiles(variant)
            if middle is None or quartiles is None:
                continue
            x = place + (number - (len(variants) - 1) / 2) * width
            label = _LABELS[variant] if place == 0 else None
            axes.bar(x, middle, width * 0.92, color=_COLOURS[variant], label=label)
            spread = [[middle - quartiles[0]], [quartiles[1] - middle]]
            shown = f"{middle:.0f}" if middle >= 9.95 else f"{middle:.1f}"
            axes.text(x, quartiles[1] * 1.04, shown, ha="center", va="bottom", size=7.5)
            axes.errorbar(x, middle, yerr=spread, color=_INK, linewidth=0.8, capsize=1.5)
    highest = max(t.median(v) or 0.0 for t in timings for v in variants)
    axes.set_yscale("log")
    axes.set_ylim(1.0, 3.0 * max(highest, 1.0))
    axes.set_yticks([tick for tick in _TICKS if tick <= 2 * highest], minor=False)
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(axis="y", color="#e3e6ec")
    axes.set_xticks(range(len(timings)), [f"{t.batch}x{t.length}" for t in timings])
    axes.set_title("Time per batch in ms (median, quartiles; lower is better)", loc="left", size=11)
    axes.legend(frameon=False, ncols=len(variants), loc="upper right", fontsize=9)


def _draw_ratios(axes: Any, timings: list[Timing]) -> None:
    ratios = [t.speedup("sdpa") or 0.0 for t in timings]
    bars = axes.bar(range(len(timings)), ratios, 0.62, color=_COLOURS["fastattn"])
    axes.bar_label(bars, [f"{r:.2f}x" for r in ratios], padding=3, size=9.5)
    axes.axhline(1.0, color=_COLOURS["sdpa"], linewidth=1.2, linestyle="--")
    axes.set_ylim(0, 1.15 * max([*ratios, 1.0]))
    axes.set_xticks(range(len(timings)), [f"{t.batch}x{t.length}" for t in timings])
    axes.set_title("Times faster than torch sdpa (dashed)", loc="left", size=11)
