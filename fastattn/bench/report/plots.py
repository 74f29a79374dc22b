"""The plots of a run: speed along a sweep, time against density with the ideal line, and times of unlike cases."""

from __future__ import annotations

import importlib.util
import io
import re
from pathlib import Path
from typing import Any

from fastattn.bench.report import text
from fastattn.bench.rows import Result, Row

_INK, _GREY, _GRID = "#2b3140", "#626b7c", "#e3e6ec"
_OURS = ("#c8443c", "#e0884f", "#9c2f6f", "#8a4b3a", "#e2a9a5")
_OTHERS = ("#3f6fae", "#5aa05a", "#8d6bb5", "#c9a227", "#4fa3b5", "#7d8ea6", "#a6794b", "#b8bfc9")
_SLOWEST_SHOWN = 40.0
"""Providers this many times slower than the fastest of a case are left out of bars, which they would flatten."""


def draw_all(result: Result, folder: Path) -> list[Path]:
    """A PNG per group and direction with at least one timed row; [] without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    import matplotlib

    matplotlib.use("Agg")
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in result.rows:
        if row.median_ms is not None:
            groups.setdefault((row.group, row.direction, row.dtype), []).append(row)
    colours = _colours(result.rows)
    pictures = []
    for (group, direction, dtype), rows in groups.items():
        slug = re.sub(r"[^a-z0-9]+", "-", f"{group} {direction} {dtype}".lower()).strip("-")
        target = folder / f"{slug}.png"
        _draw(rows, f"{group}: {text.direction_name(rows[0])}, {dtype}", text.where_line(result), colours, target)
        pictures.append(target)
    return pictures


def _colours(rows: list[Row]) -> dict[str, str]:
    """One colour per provider in all plots of a run; fastattn's are the red ones."""
    found: dict[str, str] = {}
    for ours, palette in ((True, _OURS), (False, _OTHERS)):
        names = dict.fromkeys(row.provider for row in rows if row.ours is ours and row.median_ms is not None)
        found |= {name: palette[number % len(palette)] for number, name in enumerate(names)}
    return found


def _draw(rows: list[Row], title: str, subtitle: str, colours: dict[str, str], target: Path) -> None:
    import matplotlib.pyplot as plt

    sweep = rows[0].axis is not None and len({row.x for row in rows}) > 1
    cases = list(dict.fromkeys(row.case for row in rows))
    height = 4.8 if sweep else 1.6 + 0.24 * sum(1 for row in rows if _shown(row, rows)) + 0.35 * len(cases)
    with plt.rc_context({"font.size": 10, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": "#9aa3b2"}):
        figure, panels = plt.subplots(1, 2, figsize=(12.5, height), gridspec_kw={"width_ratios": [1.35, 1]})
        inch = 1 / height
        figure.text(0.02, 1 - 0.33 * inch, title, size=13.5, weight="bold", va="center")
        figure.text(0.02, 1 - 0.62 * inch, subtitle, size=8.5, color=_GREY, va="center")
        if sweep and rows[0].axis == "density":
            _density(panels[0], rows, colours)
            _share_lines(panels[1], rows, colours)
        elif sweep:
            _speed(panels[0], rows, colours)
            _share_lines(panels[1], rows, colours)
        else:
            _bars(panels, rows, cases, colours)
        for axes in panels:
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(colors=_INK, length=0)
            axes.set_axisbelow(True)
        left = 0.065 if sweep else 0.02 + 0.0072 * max(len(row.provider) for row in rows)
        bottom = (1.05 if sweep else 0.62) * inch
        figure.subplots_adjust(left=left, right=0.985, top=1 - 1.12 * inch, bottom=bottom, wspace=0.13)
        if sweep:
            handles, names = panels[0].get_legend_handles_labels()
            first = sorted(range(len(names)), key=lambda i: not names[i].startswith("fastattn"))
            place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.01, 0.0), "ncols": 6}
            figure.legend([handles[i] for i in first], [names[i] for i in first], **place, frameon=False, fontsize=8.5)
        _save(figure, target)
        plt.close(figure)


def _save(figure: Any, target: Path) -> None:
    """In 128 colours, chosen to cover those of thin lines too: a plot to the eye, and its file a third as large."""
    from PIL import Image

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE).save(target, optimize=True)


def _lines(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each provider along the sweep, fastattn's last so that they lie on top."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row.ours, row.x)):
        found.setdefault(row.provider, []).append(row)
    return found


def _style(row: Row) -> dict[str, Any]:
    """fastattn's kernels stand out; its reference, which no one runs for speed, is dotted."""
    if row.provider == "fastattn reference":
        return {"linewidth": 1.5, "linestyle": ":", "marker": "o", "markersize": 4}
    return {"linewidth": 2.4 if row.ours else 1.5, "marker": "o" if row.ours else "s", "markersize": 5}


def _x_axis(axes: Any, rows: list[Row]) -> None:
    places = sorted({row.x for row in rows})
    density = rows[0].axis == "density"
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{x:.0%}" if density else f"{x:g}" for x in places])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("visible share of blocks" if density else rows[0].axis)
    axes.grid(color=_GRID)


def _speed(axes: Any, rows: list[Row], colours: dict[str, str]) -> None:
    factor, unit = (1e12, "T") if max(row.rate or 0 for row in rows) >= 1e12 else (1e9, "G")
    for name, line in _lines(rows).items():
        rates = [(row.rate or 0) / factor for row in line]
        axes.plot([row.x for row in line], rates, color=colours[name], label=name, **_style(line[0]))
    axes.set_ylim(bottom=0)
    axes.set_title(f"Speed in {unit}{rows[0].work_unit}/s of visible work (higher is better)", loc="left", size=10.5)
    _x_axis(axes, rows)


def _density(axes: Any, rows: list[Row], colours: dict[str, str]) -> None:
    """Times on a double logarithmic scale; per backend of fastattn the line of time in proportion to density."""
    for name, line in _lines(rows).items():
        axes.plot(
            [row.x for row in line], [row.median_ms for row in line], color=colours[name], label=name, **_style(line[0])
        )
    whole = text.best_ours([row for row in rows if row.x == max(row.x for row in rows)])
    if whole is not None and whole.median_ms is not None:
        places = sorted({row.x for row in rows})
        ideal = [whole.median_ms * x / whole.x for x in places]
        axes.plot(places, ideal, color=_INK, linewidth=1.2, linestyle="--", label=f"in proportion ({whole.provider})")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_title("Time per call in ms (lower is better)", loc="left", size=10.5)
    _x_axis(axes, rows)


def _share_lines(axes: Any, rows: list[Row], colours: dict[str, str]) -> None:
    for name, line in _lines(rows).items():
        shares = [100 * (row.share_of_limit or 0) for row in line]
        axes.plot([row.x for row in line], shares, color=colours[name], **_style(line[0]))
    axes.axhline(100, color=_GREY, linewidth=1, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.set_title("Share of the limit measured in this run", loc="left", size=10.5)
    _x_axis(axes, rows)


def _shown(row: Row, rows: list[Row]) -> bool:
    fastest = min(other.median_ms or 0 for other in rows if other.case == row.case)
    return (row.median_ms or 0) <= _SLOWEST_SHOWN * fastest


def _bars(panels: Any, rows: list[Row], cases: list[str], colours: dict[str, str]) -> None:
    """Per case a bar per provider, fastest first: times as multiples of the fastest, and shares of the limit."""
    place, places, names, headings = 0.0, [], [], []
    for case in cases:
        mine = sorted(
            (row for row in rows if row.case == case and _shown(row, rows)), key=lambda row: row.median_ms or 0
        )
        headings.append((place, case))
        for row in mine:
            place += 1
            relative = (row.median_ms or 0) / (mine[0].median_ms or 1)
            share = 100 * (row.share_of_limit or 0)
            for axes, value, shown in (
                (panels[0], relative, f"{text.milliseconds(row.median_ms or 0)} ms"),
                (panels[1], share, f"{share:.0f}%"),
            ):
                axes.barh(place, value, 0.8, color=colours[row.provider])
                axes.annotate(shown, (value, place), (4, 0), textcoords="offset points", va="center", size=8)
            places.append(place)
            names.append(row.provider)
        place += 1.5
    panels[0].set_yticks(places, names, size=8.5)
    panels[1].set_yticks([])
    panels[0].set_title("Time as a multiple of the fastest (lower is better)", loc="left", size=10.5)
    panels[1].set_title("Share of the limit measured in this run", loc="left", size=10.5)
    for axes in panels:
        axes.set_ylim(place - 0.6, -0.7)
        axes.margins(x=0.12)
        axes.grid(axis="x", color=_GRID)
    for at, case in headings:
        panels[0].text(0.0, at + 0.15, case, size=9.5, weight="bold", transform=panels[0].get_yaxis_transform())
    panels[1].xaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    panels[1].axvline(100, color=_GREY, linewidth=1, linestyle=":")
