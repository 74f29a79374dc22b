"""What a provider is, and how its forward becomes a timed call of each direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastattn.bench.cases.base import Case, OpCase

Run = Callable[[], tuple[Tensor, ...]]

_SHARE_OF_MEMORY = {"cuda": 0.6, "cpu": 0.25}  # on a CPU such a call also takes many seconds


@dataclass(frozen=True)
class Job:
    """One timed call. names: of the tensors it returns. grad: whether autograd records.

    verify: what is called to check the answers, where that is not the timed call itself (a training step whose timed
    form drops at random). keeps_memory: its working memory stays with it between calls, so that one call's peak says
    nothing. note: what a reader should know about how it runs.
    """

    call: Run
    names: tuple[str, ...]
    grad: bool = False
    verify: Run | None = None
    keeps_memory: bool = False
    note: str = ""


@dataclass(frozen=True)
class Inputs:
    """What every provider of a case gets: the same tensors, and the gradients of the outputs."""

    tensors: dict[str, Tensor]
    grads: tuple[Tensor, ...]


class Provider:
    """One implementation. A subclass names itself, the suites it serves, and how it runs a case.

    ours: a backend of fastattn; ratios compare these with the others. compiles: it compiles anew for each shape.
    package: the distribution it comes from, where that is not torch's or ours.
    """

    name: str
    suites: frozenset[str]
    ours = False
    compiles = False
    package = ""

    def unavailable_reason(self, device: str) -> str | None:
        """Why this machine cannot run it at all, or None."""
        return None

    def serves(self, case: Case) -> bool:
        """Whether a case of this kind concerns it at all; if not, it gets no row."""
        return case.suite in self.suites

    def refuses(self, case: Case, direction: str) -> str | None:
        """Why it does not run this case, or None. What shows only when it runs, `prepare` or the call may raise."""
        return None

    def prepare(self, case: OpCase, tensors: Mapping[str, Tensor]) -> Run:
        """The forward as a call without arguments. What a model does once for many layers (masks) is done here."""
        raise NotImplementedError

    def note(self, case: Case) -> str:
        """What a reader should know about how it runs this case."""
        return ""

    def job(self, case: OpCase, direction: str, inputs: Inputs) -> Job:
        """The timed call of an operation: forward, backward through a kept graph, or both."""
        if direction == "forward":
            return Job(self.prepare(case, inputs.tensors), case.outputs, note=self.note(case))
        names = case.leaves()
        tensors = {n: t.detach().requires_grad_(n in names) for n, t in inputs.tensors.items()}
        leaves = [tensors[n] for n in names]
        run = self.prepare(case, tensors)
        shown = tuple(f"d{n}" for n in names)
        if direction == "both":

            def both() -> tuple[Tensor, ...]:
                outs = run()
                return *outs, *torch.autograd.grad(outs, leaves, inputs.grads)

            return Job(both, (*case.outputs, *shown), grad=True, note=self.note(case))
        with torch.enable_grad():
            outs = run()

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(outs, leaves, inputs.grads, retain_graph=True)

        return Job(backward, shown, grad=True, note=self.note(case))


def free_memory(device: str) -> int | None:
    """Bytes that can still be allocated, None where that is not known."""
    if device == "cuda":
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by torch, for what it allocates next
        return int(torch.cuda.mem_get_info()[0]) + held
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    line = next((line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")), "")
    return int(line.split()[1]) * 1024 if line else None


def too_large(wanted: int, what: str, device: str) -> str | None:
    """A sentence where `wanted` bytes are too large a share of the free memory."""
    free = free_memory(device)
    if free is None or wanted <= _SHARE_OF_MEMORY[device] * free:
        return None
    return f"{what} would take {wanted / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
