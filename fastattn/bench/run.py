"""Runs cases: every provider is verified, then all are timed together, then their memory is measured."""

from __future__ import annotations

import datetime
import gc
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from fastattn.bench.cases.base import Case, OpCase, dtype_name
from fastattn.bench.cases.grid import SHARES
from fastattn.bench.cases.model import ModelCase
from fastattn.bench.limits import Limits, measure_limits
from fastattn.bench.memory import peak_memory
from fastattn.bench.providers import PROVIDERS
from fastattn.bench.providers.base import Inputs, Job, Provider
from fastattn.bench.providers.torch_eager import Sdpa
from fastattn.bench.rows import Result, Row, with_ratios
from fastattn.bench.timing import OUT_OF_MEMORY, QUICK, Effort, Timing, own_stream, said, time_jobs
from fastattn.bench.truth import Expected
from fastattn.dispatch import BackendWarning
from fastattn.environment import device_environment, version_of
from fastattn.errors import NotSupported
from fastattn.parity.bound import ParityRow

Step = Callable[[str], object]
_KEPT = "peak memory is not known: it keeps its working memory between calls"


@dataclass(frozen=True)
class Options:
    """directions: a subset of those that the cases have; empty takes all of theirs. memory: measure peak memory.
    compiled: whether providers join that compile anew for every shape; None: on the cases that say so. only: providers
    by name, or None for all. budget: seconds after which no further case is begun; each suite has its share of
    them."""

    device: str = "cpu"
    directions: tuple[str, ...] = ()
    memory: bool = True
    compiled: bool | None = None
    quick: bool = False
    only: frozenset[str] | None = None
    effort: Effort = field(default_factory=Effort)
    budget: float | None = None


def questions(cases: Iterable[Case], options: Options) -> list[tuple[Case, str]]:
    """The (case, direction) pairs of a run, in order. A direction that is asked for and that a case lacks is skipped
    for a case that has only others (a decode case has no backward)."""
    pairs = []
    for case in cases:
        wanted = case.directions
        if options.directions:
            trained = "both" in case.directions
            wanted = tuple(d for d in options.directions if d in case.directions or (trained and d == "backward"))
        pairs += [(case, direction) for direction in wanted]
    return pairs


def run_bench(
    cases: Sequence[Case],
    options: Options,
    step: Step = lambda _: None,
    keep: Callable[[Result], object] = lambda _: None,
) -> Result:
    """Runs the cases and returns all rows. `step` is told before each (case, direction) what comes next; `keep` gets
    the result so far after each, for a run that may be killed: the rest are its left_out.

    A result that breaks the parity rule, or one of our backends that fails other than by refusing, is a failure of the
    run; so is an error of the truths themselves. A peer that fails is a row with its reason. The limits are measured
    before and after all cases, for a shared machine is not the same all the time; the better of both counts.
    """
    began = time.perf_counter()
    if options.quick:
        options = replace(options, effort=QUICK)
    with warnings.catch_warnings(), own_stream(options.device):
        warnings.simplefilter("ignore", BackendWarning)
        warnings.filterwarnings("ignore", module="torch")
        step("measuring the limits")
        dtypes = list(dict.fromkeys(case.dtype for case in cases))
        before = measure_limits(options.device, dtypes, quick=options.quick)
        asked = questions(cases, options)
        found = _Found(options, began)
        try:
            deadlines = _deadlines(cases, options.budget)
            for number, (case, direction) in enumerate(asked, 1):
                if time.perf_counter() - began > deadlines[case.suite]:
                    found.left_out.append(_name(case, direction))
                    continue
                step(_name(case, direction))
                Sdpa.any()  # SDPA providers of the question before left it one backend; models choose for themselves
                found.add(_Question(case, direction, options))
                keep(found.result(before, asked[number:]))
        finally:
            Sdpa.any()
        limits = before.best(measure_limits(options.device, dtypes, quick=options.quick))
    return found.result(limits)


def _name(case: Case, direction: str) -> str:
    return f"{case.suite}: {case.name}, {direction}"


class _Found:
    """What a run has found so far."""

    def __init__(self, options: Options, began: float) -> None:
        self.options, self.began = options, began
        self.environment = device_environment(options.device)
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self.left_out: list[str] = []

    def add(self, question: _Question) -> None:
        rows, failures = question.answer()
        self.rows += rows
        self.failures += failures

    def result(self, limits: Limits, ahead: Sequence[tuple[Case, str]] = ()) -> Result:
        """All of it as the result of a run that ends here, without the questions that lie ahead."""
        return Result(
            rows=[row.against(limits) for row in self.rows],
            limits=limits,
            environment={**self.environment, "peers": _peers(self.rows)},
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            seconds=time.perf_counter() - self.began,
            quick=self.options.quick,
            failures=list(self.failures),
            left_out=[*self.left_out, *(_name(*question) for question in ahead)],
        )


def _deadlines(cases: Sequence[Case], budget: float | None) -> dict[str, float]:
    """The second of the run after which no further case of a suite is begun."""
    shares = {case.suite: SHARES[case.suite] for case in cases}
    spent = accumulate(share / sum(shares.values()) for share in shares.values())
    return {suite: math.inf if budget is None else budget * part for suite, part in zip(shares, spent, strict=True)}


def _peers(rows: list[Row]) -> dict[str, str]:
    """The versions of the packages, beside torch, of those that were timed."""
    timed = {row.provider for row in rows if row.median_ms is not None}
    packages = {provider.package for provider in PROVIDERS if provider.name in timed and provider.package}
    return {package: version_of(package) or "unknown" for package in sorted(packages)}


class _Question:
    """One case in one direction, asked of every provider."""

    def __init__(self, case: Case, direction: str, options: Options) -> None:
        self.case, self.direction, self.options = case, direction, options
        self.rows: dict[str, Row] = {}
        self.failures: list[str] = []

    def answer(self) -> tuple[list[Row], list[str]]:
        torch._dynamo.reset()
        providers = [p for p in PROVIDERS if self._chosen(p)]
        ready = [p for p in providers if self._admit(p)]
        jobs: dict[str, Job] = {}
        if ready:
            inputs, expected = inputs_and_truth(self.case, self.direction)
            for provider in ready:
                job = self._verified(provider, inputs, expected)
                if job is not None:
                    jobs[provider.name] = job
        failed: dict[str, str] = {}
        timings = time_jobs(jobs, self.options.device, self.options.effort, failed)
        for name, reason in failed.items():
            self.rows[name] = replace(self.rows[name], reason=reason)
            if self.rows[name].ours and reason != OUT_OF_MEMORY:
                self._fail(name, reason)
            del jobs[name]
        for name, timing in timings.items():
            self.rows[name] = self._timed(self.rows[name], jobs[name], timing)
        if self.options.memory:
            for name, job in jobs.items():
                self.rows[name] = self._measured(self.rows[name], job)
        jobs.clear()
        if not self.options.quick:  # what a failed provider's traceback still holds may be large
            gc.collect()
            if self.options.device == "cuda":
                torch.cuda.empty_cache()
        return with_ratios([self.rows[p.name] for p in providers]), self.failures

    def _chosen(self, provider: Provider) -> bool:
        return provider.serves(self.case) and (self.options.only is None or provider.name in self.options.only)

    def _admit(self, provider: Provider) -> bool:
        """Enters a row for the provider; False, with the reason in it, where it does not take part."""
        reason = provider.unavailable_reason(self.options.device) or provider.refuses(self.case, self.direction)
        joins = self.direction in self.case.compiled if self.options.compiled is None else self.options.compiled
        if reason is None and provider.compiles and not joins:
            reason = "left out: it compiles for seconds for every shape; --compile lets it join every case"
        self.rows[provider.name] = self._row(provider, reason)
        return reason is None

    def _row(self, provider: Provider, reason: str | None) -> Row:
        case, work = self.case, self.case.work(self.direction)
        return Row(
            suite=case.suite,
            case=case.name,
            group=case.group,
            axis=case.axis,
            x=case.x,
            direction=self.direction,
            dtype=dtype_name(case.dtype),
            device=case.device,
            provider=provider.name,
            ours=provider.ours,
            parameters=case.parameters(),
            flops=work.flops,
            bytes=work.bytes,
            work=work.amount,
            work_unit=work.counted,
            reason=reason,
        )

    def _verified(self, provider: Provider, inputs: Inputs, expected: list[Expected]) -> Job | None:
        """The provider's job once its results obey the parity rule; else None, with the reason in its row."""
        name, checked = provider.name, check_provider(provider, self.case, self.direction, inputs, expected)
        self.rows[name] = replace(
            self.rows[name],
            verified=checked.verified,
            worst=checked.worst if math.isfinite(checked.worst or 0.0) else None,
            reason=checked.reason,
            note=checked.job.note if checked.job is not None else "",
        )
        if checked.fails:
            self._fail(name, checked.reason or "")
        return checked.job

    def _fail(self, provider: str, reason: str) -> None:
        case = self.case
        self.failures.append(
            f"{case.suite}: {case.name}, {self.direction}, {dtype_name(case.dtype)}, {provider}: {reason}"
        )

    def _measured(self, row: Row, job: Job) -> Row:
        why = _KEPT if job.keeps_memory else ""
        try:
            if not why:
                return replace(row, peak_memory=peak_memory(job.call, self.options.device, grad=job.grad))
        except Exception as error:  # it answered and was timed before: one figure is missing, not the run
            why = f"peak memory unknown: {said(error)}"
            if row.ours and not isinstance(error, torch.OutOfMemoryError):
                self._fail(row.provider, why)
        return replace(row, note="; ".join(filter(None, [row.note, why])))

    def _timed(self, row: Row, job: Job, timing: Timing) -> Row:
        return replace(
            row,
            median_ms=timing.median,
            iqr_ms=timing.quartiles,
            samples=len(timing.samples),
            rate=row.work / (timing.median / 1e3),
            note="; ".join(filter(None, [job.note, timing.note])),
        )


@dataclass(frozen=True)
class Checked:
    """What came of checking a provider: its job, or the reason why it has none, and whether that fails the run."""

    job: Job | None = None
    verified: bool | None = None
    worst: float | None = None
    reason: str | None = None
    fails: bool = False


def inputs_and_truth(case: Case, direction: str) -> tuple[Inputs, list[Expected]]:
    """The tensors that every provider gets, and what their results are held to."""
    backward = direction != "forward"
    if isinstance(case, ModelCase):
        return Inputs({}, ()), case.expected(backward=backward)
    assert isinstance(case, OpCase)
    tensors = case.tensors()
    grads = case.output_gradients(tensors)
    return Inputs(tensors, grads), case.expected(tensors, grads, backward=backward)


def check_provider(provider: Provider, case: Case, direction: str, inputs: Inputs, expected: list[Expected]) -> Checked:
    """Prepares a provider's job, runs it once, and holds what it returns to the parity rule."""
    try:
        with torch.set_grad_enabled(direction != "forward"):
            job = provider.job(case, direction, inputs)  # type: ignore[arg-type]
            found = dict(zip(job.names, (job.verify or job.call)(), strict=True))
    except NotSupported as refusal:
        why = "; ".join(dict.fromkeys(w for reasons in refusal.reasons.values() for w in reasons))
        return Checked(reason=why or str(refusal))
    except torch.OutOfMemoryError:
        return Checked(reason=OUT_OF_MEMORY)
    except Exception as error:  # a compiler or another project's kernel may raise anything
        return Checked(reason=said(error), fails=provider.ours)
    # backward alone returns gradients and no outputs
    judged = [one.check(found) for one in expected if direction != "backward" or one.name.startswith("d")]
    worst = max((row.worst_ratio for row in judged), default=0.0)
    failed = [row for row in judged if not row.passed]
    if failed:
        return Checked(verified=False, worst=worst, reason=_mismatch(failed), fails=True)
    return Checked(job, verified=True, worst=worst)


def _mismatch(failed: list[ParityRow]) -> str:
    return "breaks the parity rule: " + "; ".join(str(row) for row in failed)
