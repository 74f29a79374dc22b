"""What a plan or a swap says about a model, and how a swap is counted and undone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from fastattn.errors import NotSupported
from fastattn.nn.counting import Tally, start, stop
from fastattn.swap.table import aligned, merged, without_numbers

if TYPE_CHECKING:
    from rich.table import Table

_REMEDY = "Pass strict=False to swap the rest, or turn the part off (attention, norms, ffns, linears)."
_COLUMNS = ("path", "class", "action", "kernel", "calls", "reason")


class NotSwapped(NotSupported):
    """swap(strict=True): modules, among what was asked, would run original code. `reasons`: path -> sentences."""

    def __init__(self, op: str, problem: object, reasons: dict[str, list[str]], remedy: str = _REMEDY) -> None:
        super().__init__(op, problem, reasons, remedy)
        lines = [f"  {path}: {'; '.join(why)}" for path, why in self.reasons.items()]
        self.args = (
            f"strict: {len(lines)} modules of {problem} would run original code; nothing was swapped.\n"
            + "\n".join(lines)
            + f"\n{remedy}",
        )


@dataclass
class Row:
    """One module. `calls` and `fallbacks` are those of the last counting; calls is None where none was counted."""

    path: str
    class_name: str
    action: str
    """"swapped" ("swap" in a plan), "fused" (its work is done by the swapped module that holds it), or "left"."""
    kernel: str = ""
    reason: str = ""
    calls: int | None = None
    fallbacks: dict[str, int] = field(default_factory=dict)
    choices: dict[str, int] = field(default_factory=dict)
    """How often torch's own kernel ran because it is as fast, by reason; in the last counting."""
    asked: bool = True
    """False where the caller turned the parts of this module off, or where it was swapped before."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "class": self.class_name,
            "action": self.action,
            "kernel": self.kernel,
            "reason": self.reason,
            "calls": self.calls,
            "fallbacks": dict(self.fallbacks),
            "choices": dict(self.choices),
        }


@dataclass
class SwapReport:
    """The rows of a plan or of a swap; printed, a table where layers that differ only by number share a line."""

    model_name: str
    rows: list[Row]
    applied: bool
    swapped_modules: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    """Path -> module, of the rows whose action is "swapped"."""
    _model: nn.Module | None = field(default=None, repr=False)
    _undo: Callable[[], None] | None = field(default=None, repr=False)

    def undo(self) -> None:
        """Gives every module its class and config back; the outputs are then bitwise the original ones.

        Raises RuntimeError, with nothing undone, where a module's class or config is no longer the one that swap set
        (sharding and parametrisation assign classes too: take those off first), for a plan, and when called twice.
        """
        if self._undo is None:
            raise RuntimeError("undo: nothing to undo; this report comes from plan(), or was undone before")
        self._undo()
        self._undo = None
        self.applied = False

    @contextmanager
    def counting(self) -> Iterator[SwapReport]:
        """Counts, in the with block, the eager calls of swapped modules and what they left to original code.

        Each block starts from 0. Calls from any thread count. Compiled modules are not counted: a counter in a compiled
        forward would recompile it.
        """
        tallies = {id(module): Tally() for module in self.swapped_modules.values()}
        start(tallies)
        try:
            yield self
        finally:
            stop(tallies)
            self._take(tallies)

    def _take(self, tallies: dict[int, Tally]) -> None:
        compiled = self._compiled_paths()
        for row in self.rows:
            if row.path in self.swapped_modules:
                tally = tallies[id(self.swapped_modules[row.path])]
                in_a_graph = any(f"{row.path}.".startswith(holder) for holder in compiled)
                row.calls = None if tally.calls == 0 and in_a_graph else tally.calls
                row.fallbacks, row.choices = dict(tally.fallbacks), dict(tally.choices)

    def _compiled_paths(self) -> list[str]:
        """Paths, each with a dot behind it, of what was compiled by module.compile() or torch.compile(module)."""
        modules = [] if self._model is None else self._model.named_modules()
        return [
            f"{path}." if path else ""
            for path, module in modules
            if module._compiled_call_impl is not None or "_orig_mod" in module._modules
        ]

    @property
    def all_called(self) -> bool:
        """Every swapped module ran in the last counting, and none of them had to run original code (`fallbacks`)."""
        swapped = [row for row in self.rows if row.action == "swapped"]
        return bool(swapped) and all(row.calls and not row.fallbacks for row in swapped)

    def to_json(self, indent: int | None = 2) -> str:
        """The whole report as JSON: model, applied, and one object per row."""
        content = {"model": self.model_name, "applied": self.applied, "rows": [row.to_dict() for row in self.rows]}
        return json.dumps(content, indent=indent)

    def __str__(self) -> str:
        return "\n".join([self._headline(), *aligned(_COLUMNS, _table(self.rows), "calls"), *self._footnotes()])

    def __rich__(self) -> Table:
        """The same table for a rich console, with nothing in it taken for markup."""
        from rich.table import Table
        from rich.text import Text

        caption = Text("\n".join(self._footnotes()), style="table.caption")
        table = Table(title=Text(self._headline(), style="table.title"), caption=caption or None)
        for column in _COLUMNS:
            table.add_column(column, justify="right" if column == "calls" else "left")
        for line in _table(self.rows):
            table.add_row(*map(Text, line))
        return table

    def _headline(self) -> str:
        count = Counter(row.action for row in self.rows)
        is_plan = not self.applied and not self.swapped_modules
        what = "plan for" if is_plan else "swap of" if self.applied else "swap, undone, of"
        verb = "to swap" if is_plan else "swapped"
        return (
            f"fastattn {what} {self.model_name}: {count['swap'] + count['swapped']} modules {verb}, "
            f"{count['fused']} fused into them, {count['left']} left alone"
        )

    def _footnotes(self) -> list[str]:
        notes = []
        if any(row.action == "swapped" and row.calls == 0 for row in self.rows):
            notes.append("0 calls: the module was not reached, or ran compiled (compiled modules are not counted).")
        if any(row.fallbacks or row.choices for row in self.rows):
            notes.append("n x a reason: how often, while counting, it made a swapped module run original code.")
        return notes


def _table(rows: list[Row]) -> list[tuple[str, ...]]:
    """One line per group of rows that differ only in the numbers of their path."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        counted = [*row.fallbacks.items(), *row.choices.items()]
        reason = "; ".join(filter(None, [row.reason, *(f"{n} x {why}" for why, n in counted)]))
        calls = "" if row.action != "swapped" else "-" if row.calls is None else str(row.calls)
        key = (without_numbers(row.path), row.class_name, row.action, row.kernel, calls, reason)
        groups.setdefault(key, []).append(row)
    lines: list[tuple[str, ...]] = []
    for (_, class_name, action, kernel, calls, reason), same in groups.items():
        each = f"{calls} each" if len(same) > 1 and calls not in ("", "-") else calls
        lines.append((merged([row.path for row in same]), class_name, action, kernel, each, reason))
    return lines
