"""Numbers and lines as every report shows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastattn.bench.limits import Limits
from fastattn.bench.rows import Result, Row

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def milliseconds(ms: float) -> str:
    """Three significant digits."""
    return f"{ms:.0f}" if ms >= 99.5 else f"{ms:.1f}" if ms >= 9.95 else f"{ms:.2f}" if ms >= 0.995 else f"{ms:.3f}"


def time_text(row: Row) -> str:
    """ "12.3 (12.1-12.6)": the median and the quartiles in ms."""
    if row.median_ms is None or row.iqr_ms is None:
        return ""
    low, high = row.iqr_ms
    return f"{milliseconds(row.median_ms)} ({milliseconds(low)}-{milliseconds(high)})"


def scaled(value: float, unit: str) -> str:
    """ "153 GFLOP/s"."""
    for factor, prefix in _PREFIXES:
        if value >= factor:
            number = value / factor
            return f"{number:.0f} {prefix}{unit}" if number >= 99.5 else f"{number:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def rate_text(row: Row) -> str:
    return "" if row.rate is None else scaled(row.rate, f"{row.work_unit}/s")


def ratio_text(row: Row) -> str:
    return "" if row.ratio is None else f"{row.ratio:.2f}"


def share_text(row: Row) -> str:
    return "" if row.share_of_limit is None else f"{100 * row.share_of_limit:.0f}%"


def memory_text(row: Row) -> str:
    return "" if row.peak_memory is None else f"{row.peak_memory / 2**20:.1f}"


DIRECTION_NAMES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}


def direction_name(row: Row) -> str:
    """A model's "both" is a training step."""
    return "training step" if row.suite == "model" and row.direction == "both" else DIRECTION_NAMES[row.direction]


def by_question(rows: Iterable[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """The rows of each (suite, case, direction, dtype), in order."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault(row.question, []).append(row)
    return found


def best_ours(rows: Iterable[Row]) -> Row | None:
    """The fastest backend of fastattn among rows of one question."""
    timed = [row for row in rows if row.ours and row.median_ms is not None]
    return min(timed, key=lambda row: row.median_ms or 0.0) if timed else None


def best_other(rows: Iterable[Row]) -> Row | None:
    """The fastest provider that is not fastattn's."""
    timed = [row for row in rows if not row.ours and row.median_ms is not None]
    return min(timed, key=lambda row: row.median_ms or 0.0) if timed else None


def where_line(result: Result) -> str:
    """One line: device, threads, versions, date."""
    found: dict[str, Any] = result.environment
    parts = [str(found["device"])]
    if found.get("cuda"):
        parts.append(f"driver {found.get('driver')}, CUDA {found['cuda']}, triton {found.get('triton')}")
    else:
        parts.append(f"{found['threads']} threads, {found['instruction_set'] or 'no native library'}")
    commit = f" ({found['commit']})" if found.get("commit") else ""
    peers = [f"{name} {version}" for name, version in found.get("peers", {}).items()]
    parts += [f"torch {found['torch']}", *peers, f"fastattn {found['fastattn']}{commit}", result.date]
    return ", ".join(parts)


def limits_line(limits: Limits) -> str:
    """One line: what the machine was measured to do at most."""
    parts = [f"matrix product {dtype} {scaled(rate, 'FLOP/s')}" for dtype, rate in limits.product.items()]
    if limits.fma is not None:
        parts.append(f"float32 FMA loop {scaled(limits.fma, 'FLOP/s')}")
    parts.append(f"copy {scaled(limits.copy, 'B/s')}, read plus written")
    if limits.empty_ms is not None:
        parts.append(f"graph of an empty kernel {1e3 * limits.empty_ms:.1f} us")
    return "; ".join([*parts, *limits.notes])
