"""Reports as text: a line for each group of modules that differ only by number."""

from __future__ import annotations

import re
from collections.abc import Sequence


def aligned(columns: Sequence[str], lines: Sequence[Sequence[str]], right: str) -> list[str]:
    """The columns' names, a rule and the lines, as wide as they need to be; the column `right` is set to the right."""
    table = [columns, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    at = columns.index(right)
    text = [
        "  ".join(
            cell.rjust(w) if i == at else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return text


def without_numbers(path: str) -> str:
    """What paths of one group have in common: layer.3.norm -> layer.#.norm"""
    return re.sub(r"\d+", "#", path)


def merged(paths: list[str]) -> str:
    """layer.0.norm, layer.1.norm, layer.2.norm -> layer.{0-2}.norm"""
    if len(paths) == 1:
        return paths[0] or "(the model)"
    numbers = [re.findall(r"\d+", path) for path in paths]
    ranges = iter([_ranges(sorted({int(n) for n in column})) for column in zip(*numbers, strict=True)])
    return re.sub(r"\d+", lambda _: next(ranges), paths[0])


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> {0-2,5}; [3] -> 3"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return text if text.isdigit() else "{" + text + "}"
