"""`make gpu-check`: measures a machine with a GPU from a checkout, in stages of at most nine minutes each.

    python bench/gpu_check.py [build|verify|sanitize|bench|tune|all] [--seconds S] [--cases N] [--suites "norm ffn"]
                              [--results DIR] [--quick]

For a machine with Python, a C++ compiler and, for a GPU, nvcc, torch and Triton of its own; no network is needed. It
runs in this Python, and everything that it leaves is one small folder, bench/results/<device>-<date>/:
stages.json, verify-<backend>.json, results.json, report.md, plots, tiles.json.

build     compiles the native libraries in place; with FASTATTN_PREBUILT=1 only the pybind11 modules, over libraries
          that were built elsewhere and lie in fastattn/_lib
verify    `fastattn verify` of each GPU backend on every operation that it takes, in a process per core
sanitize  a short list of the same under compute-sanitizer, in a process per two cores
bench     `fastattn bench` of every suite, each in a process of its own, added to what the folder holds of that day;
          --suites, or SUITES in the environment, gives the whole time to some. PEER_WHEELS names a folder of wheels
          that are unpacked beside this Python's packages first
tune      times every choice of the backends' tile tables (not part of `all`)

--seconds is the time of each stage; what it cuts off is said, and the stage's status is "cut short". A stage that
fails says what failed, and the others still run. Without a GPU, build, verify, bench and tune go as far
as a CPU allows: Triton kernels in the interpreter, tiny sizes. Exit code 1 if any stage failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu-check"
STAGE_SECONDS = 520.0
CASES = 2000
OPERATIONS = ("norm", "linear_act", "ffn", "gated_ffn", "attention", "attention_decode", "encoder_layer")
# Runs of verify, one after another: backend, the operations that share its processes, the part of what is then left of
# the stage, and the environment. Nearly every case of Triton's attention compiles kernels, seconds each: it has a run
# of its own, the last.
HOPPER = {"FASTATTN_CUDA_KERNELS": "sm90"}
VERIFY: tuple[tuple[str, set[str], float, dict[str, str]], ...] = (
    ("cuda", set(OPERATIONS), 0.4, {}),
    ("cuda", {"attention"}, 0.25, HOPPER),
    ("triton", set(OPERATIONS) - {"attention"}, 0.45, {}),
    ("triton", {"attention"}, 1.0, {}),
)
VERIFY_END = 15.0  # what the start of Python and the cases that the end finds running take of the stage
VERIFY_PATIENCE = 60.0  # verify itself gives up cases that hang, 30 s after its time: its report is worth that wait
SUITES = ("model", "packed", "decode", "norm", "ffn", "attention")  # attention takes whatever the others leave
SUITE_START = 8.0  # imports, the first CUDA call and the limits
REPORT_SECONDS = 8.0  # the plots, mostly
BENCH_SHARES = {"attention": 0.5, "packed": 0.05, "decode": 0.1, "norm": 0.1, "ffn": 0.12, "model": 0.13}
SANITIZER_TOOLS = ("memcheck", "racecheck")
SANITIZED = {"attention": (642, 652), "attention_decode": (0, 8)}
"""Where the cases begin and end that are sanitized, of operations whose first three do not launch every kind of kernel:
gradients of heads up to 64, 128 and 192, with biases and theirs, dropout and packed; caches in several parts."""


@dataclass
class Outcome:
    """What came of a stage. status: passed, failed, cut short (by its time), or no device (it went as far as a CPU
    allows)."""

    status: str = "passed"
    said: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def say(self, sentence: str) -> None:
        self.said.append(sentence)
        print(f"  {sentence}", flush=True)

    def fail(self, sentence: str) -> None:
        self.status = "failed"
        self.say(f"FAILED {sentence}")

    def cut_short(self, sentence: str) -> None:
        if self.status == "passed":
            self.status = "cut short"
        self.say(f"TIME WAS UP {sentence}")

    def no_device(self, sentence: str) -> None:
        if self.status == "passed":
            self.status = "no device"
        self.say(sentence)


@dataclass
class Check:
    """One invocation: where results go, and what this machine has."""

    results: Path
    gpu: bool
    quick: bool
    environment: dict[str, str]
    seconds: float = STAGE_SECONDS
    cases: int = CASES
    suites: tuple[str, ...] = ()
    deadline: float = 0.0
    log: threading.Lock = field(default_factory=threading.Lock)
    running: set[subprocess.Popen[str]] = field(default_factory=set)

    def left(self) -> float:
        """Seconds that the stage still has, and never none: a command is better killed at once than forgotten."""
        return max(self.deadline - time.monotonic(), 1.0)

    def run(self, command: Sequence[str], seconds: float | None = None, **environment: str) -> tuple[int, str]:
        """Runs a command in the checkout for so many seconds, or what the stage has left: exit code (124 if time was
        up) and output. The processes that it started end with it."""
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **self.environment, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
        except OSError as error:
            return 127, str(error)
        self.running.add(process)
        try:
            left = self.left()  # asked once the command can be found: what ends all of them sets it back first
            output, _ = process.communicate(timeout=left if seconds is None else seconds)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code, output = 124, process.communicate()[0]
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            self.running.discard(process)
        WORK.mkdir(parents=True, exist_ok=True)
        with self.log, (WORK / "log.txt").open("a") as log:
            log.write(f"$ {' '.join(command)}\n{output}\n[{code}]\n")
        return code, output

    def kill(self) -> None:
        """Ends every command that is running, whichever thread waits for it, and with them the stage's time."""
        self.deadline = 0.0
        for process in tuple(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def fastattn(self, *arguments: str, seconds: float | None = None, **environment: str) -> tuple[int, str]:
        return self.run([sys.executable, "-m", "fastattn", *arguments], seconds, **environment)

    @property
    def interpreted(self) -> dict[str, str]:
        """What makes Triton run on this machine."""
        return {} if self.gpu else {"TRITON_INTERPRET": "1"}


def last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


# --- Stages -------------------------------------------------------------------------------------------------


def build(check: Check, outcome: Outcome) -> None:
    """Compiles in place with this Python, then asks the result what it can do."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    prebuilt = os.environ.get("FASTATTN_PREBUILT") == "1"
    cuda = "1" if check.gpu and nvcc and not prebuilt else os.environ.get("FASTATTN_CUDA", "")
    began = time.monotonic()
    wanted = {"FASTATTN_CUDA": cuda} if cuda else {}
    code, output = check.run([sys.executable, "setup.py", "build_ext", "--inplace"], **wanted)
    if code:
        outcome.fail(f"build: setup.py build_ext ended with {code}: {last_line(output)}")
        return
    how = "modules over carried libraries" if prebuilt else f"native code, nvcc {'used' if nvcc else 'not found'}"
    outcome.say(f"built in {time.monotonic() - began:.0f} s: {how}")
    for said in re.findall(r"^fastattn: .*", output, flags=re.MULTILINE):
        outcome.say(said)
    report_backends(check, outcome)


@dataclass
class Backends:
    """What `fastattn info` says in a process of its own. verdicts: "usable" or why not, per backend. refused: the
    operations that a backend refuses wholly, each with the reason."""

    verdicts: dict[str, str]
    refused: dict[str, dict[str, str]]

    def operations(self, backend: str) -> list[str]:
        return [op for op in OPERATIONS if op not in self.refused[backend]]


def ask_backends(check: Check, environment: Mapping[str, str] = MappingProxyType({})) -> Backends | None:
    code, output = check.fastattn("info", "--json", **check.interpreted, **environment)
    if code:
        return None
    found, _ = json.JSONDecoder().raw_decode(output, output.index("{"))  # warnings may stand behind it
    return Backends(found["backends"], found["refused_operations"])


def report_backends(check: Check, outcome: Outcome) -> None:
    backends = ask_backends(check)
    if backends is None:
        outcome.fail("fastattn info does not run")
        return
    for name, verdict in backends.verdicts.items():
        if name == "cuda" and verdict != "usable" and not check.gpu:
            outcome.no_device(f"{name}: {verdict}")
        elif name in ("cuda", "triton") and verdict != "usable" and check.gpu:
            outcome.fail(f"{name} is not usable on this GPU: {verdict}")
        else:
            outcome.say(f"{name}: {verdict}")


def verify(check: Check, outcome: Outcome) -> None:
    """Each GPU backend against the reference; what a backend refuses is counted, not failed."""
    backends = ask_backends(check)
    if backends is None:
        outcome.fail("verify: fastattn info does not run; see STAGE=build")
        return
    if not check.gpu:
        outcome.no_device("torch sees no GPU: Triton kernels run in the interpreter, a few small cases of each")
    reports: dict[str, list[object]] = {}
    for backend in ("cuda", "triton"):
        if backends.verdicts[backend] != "usable":
            (outcome.fail if check.gpu else outcome.no_device)(f"{backend}: {backends.verdicts[backend]}")
            continue
        reports[backend] = []
        for op in OPERATIONS:
            if op in backends.refused[backend]:
                outcome.say(f"{backend} {op}: refused wholly, not run: {backends.refused[backend][op]}")
    for backend, group, share, environment in VERIFY:
        ops = [op for op in backends.operations(backend) if op in group]
        if backend in reports and ops and can_run(check, outcome, backend, environment):
            report = _verify_group(check, outcome, backend, ops, share, environment)
            reports[backend] += [] if report is None else [report]
            (check.results / f"verify-{backend}.json").write_text(json.dumps(reports[backend], indent=1) + "\n")


def can_run(check: Check, outcome: Outcome, backend: str, environment: dict[str, str]) -> bool:
    """Whether a usable backend is so under this environment too; says why not."""
    if not environment:
        return True
    backends = ask_backends(check, environment)
    verdict = backends.verdicts[backend] if backends is not None else "fastattn info does not run"
    if verdict == "usable":
        return True
    names = " ".join(f"{name}={value}" for name, value in environment.items())
    outcome.say(f"{backend}, {names}: not run: {verdict}")
    return False


def _verify_group(
    check: Check, outcome: Outcome, backend: str, ops: Sequence[str], share: float, environment: dict[str, str]
) -> dict[str, object] | None:
    earnest = check.gpu and not check.quick
    seconds = max(share * (check.left() - VERIFY_END), 5.0)
    target = WORK / f"verify-{'-'.join([backend, *environment.values(), *ops])}.json"
    WORK.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    command = ["verify", "--op", ",".join(ops), "--backend", backend, "--cases", str(check.cases if earnest else 2)]
    command += ["--jobs", str(cores() if earnest else 1), "--seconds", f"{seconds:.0f}", "--output", str(target)]
    code, output = check.fastattn(*command, seconds=seconds + VERIFY_PATIENCE, **check.interpreted, **environment)
    if not target.exists():
        outcome.fail(f"verify {backend} {','.join(ops)}: ended with {code}: {last_line(output)}")
        return None
    report: dict[str, object] = {**json.loads(target.read_text()), **environment}
    for op in ops:
        say_verified(outcome, report, op)
    return report


def say_verified(outcome: Outcome, report: dict[str, Any], op: str) -> None:
    """One operation of a report of `fastattn verify` in a sentence."""
    asked, ran, checked = (report[key].get(op, 0) for key in ("asked", "cases", "checked_of"))
    kernels = f" {report[name]}" if (name := "FASTATTN_CUDA_KERNELS") in report else ""
    sentence = f"{report['backend']}{kernels} {op}: {checked} checked, {ran - checked} refused"
    cut = f" of {asked} cases: the time was up after {report['seconds']:.0f} s" if ran < asked else ""
    failures = [failure for failure in report["failures"] if failure["op"] == op]
    if failures:
        outcome.fail(f"{sentence}{cut}, {len(failures)} failed, the first: {failures[0]['repro']}")
    else:
        (outcome.cut_short if cut else outcome.say)(sentence + cut)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sanitize(check: Check, outcome: Outcome) -> None:
    """A few cases of each operation under compute-sanitizer, on the CUDA backend and on Triton's; most of a run is its
    start, so that they run beside each other."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not check.gpu:
        outcome.no_device("torch sees no GPU: compute-sanitizer has nothing to watch")
        return
    if program is None:
        outcome.say("compute-sanitizer is not installed: nothing was sanitized")
        return
    backends = ask_backends(check)
    if backends is None:
        outcome.fail("sanitize: fastattn info does not run; see STAGE=build")
        return
    usable = [name for name in ("cuda", "triton") if backends.verdicts[name] == "usable"]
    groups = [(name, backends.operations(name), {}) for name in usable]
    if "cuda" in usable and can_run(check, outcome, "cuda", HOPPER):
        groups.append(("cuda", ["attention"], HOPPER))
    runs = [(tool, name, op, how) for name, ops, how in groups for op in ops for tool in SANITIZER_TOOLS]

    def watch(run: tuple[str, str, str, dict[str, str]]) -> tuple[int, str]:
        tool, backend, op, environment = run
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "fastattn"]
        if time.monotonic() >= check.deadline:
            return 124, "it was not begun"
        first, end = SANITIZED.get(op, (0, 3))
        cases = ["--first", str(first), "--cases", str(end)]
        return check.run([*command, "verify", "--op", op, "--backend", backend, *cases], **environment)

    pool = ThreadPoolExecutor(max(1, cores() // 2))
    try:
        for (tool, name, op, how), (code, output) in zip(runs, pool.map(watch, runs), strict=True):
            backend = " ".join([name, *how.values()])
            lines = reversed(output.splitlines())
            summary = next((line for line in lines if "ERROR SUMMARY" in line), last_line(output)).lstrip("= ")
            if code == 0:
                outcome.say(f"{tool} {backend} {op}: {summary}")
            elif "Device not supported" in output:
                outcome.say(f"compute-sanitizer refuses this device: {summary}")
                return
            elif code == 124:
                outcome.cut_short(f"{tool} {backend} {op}: {summary}")
            else:
                outcome.fail(f"{tool} {backend} {op}: ended with {code}: {summary}")
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        check.kill()  # the threads of the pool wait for theirs, and the end of the pool for them
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def bench(check: Check, outcome: Outcome) -> None:
    """Every suite in a process of its own, added to one report; on a CPU quick ones, Triton interpreted."""
    arguments = ["--json", str(check.results / "results.json"), "--append"]
    if check.quick or not check.gpu:
        arguments += ["--quick", "--no-compile", "--no-memory"]
    if not check.gpu:
        arguments += ["--device", "cpu"]
        outcome.no_device("torch sees no GPU: a quick run on the CPU, Triton interpreted; its times mean nothing")
    peers = install_peers(check, outcome)
    suites = check.suites or SUITES
    crashed = []
    for number, suite in enumerate(suites):
        budget, limit = suite_seconds(suites[number:], max(check.left() - REPORT_SECONDS, 1.0))
        command = ["bench", suite, *arguments, *(["--budget", f"{budget:.0f}"] if check.gpu else [])]
        code, output = check.fastattn(*command, seconds=limit, **check.interpreted, **peers)
        failures = [line for line in output.splitlines() if line.startswith("FAILED")]
        for failure in failures:
            outcome.fail(f"bench {failure.removeprefix('FAILED ')}")
        if code == 124:
            outcome.cut_short(f"bench {suite}: stopped after {limit:.0f} s: {last_line(output)}")
        elif code and not failures:
            crashed.append(suite)
            outcome.fail(f"bench {suite}: ended with {code}: {last_line(output)}")
        elif not code:
            outcome.say(f"bench {suite}: done")
    say_left_out(check, outcome, [suite for suite in suites if suite not in crashed])
    script = "import sys, pathlib; from fastattn.bench.report import write_report as w\n"
    script += "from fastattn.bench.rows import read_result as r; p = pathlib.Path(sys.argv[1]); w(r(p), p)"
    code, output = check.run([sys.executable, "-c", script, str(check.results)], 60.0)
    if code:
        outcome.fail(f"bench: report.md was not written: {last_line(output)}")


def suite_seconds(suites: Sequence[str], left: float) -> tuple[float, float]:
    """The budget of the first of the suites that remain, and the seconds after which it is stopped. Every suite pays
    its start, the rest is shared; a case that the budget's end finds running has the difference."""
    shared = max(left - SUITE_START * len(suites), 0.25 * left)
    part = BENCH_SHARES[suites[0]] / sum(BENCH_SHARES[name] for name in suites) * shared
    return max(0.85 * part, 1.0), min(1.3 * part + 2 * SUITE_START, left)


def say_left_out(check: Check, outcome: Outcome, suites: Sequence[str]) -> None:
    """Says how many cases of these suites the time did not reach, as results.json has it."""
    try:
        left_out = json.loads((check.results / "results.json").read_text())["left_out"]
    except (OSError, ValueError):
        return
    for suite in suites:
        missing = [name for name in left_out if name.startswith(f"{suite}: ")]
        if missing:
            outcome.cut_short(f"bench {suite}: {len(missing)} cases were left out, the first: {missing[0]}")


def install_peers(check: Check, outcome: Outcome) -> dict[str, str]:
    """Unpacks the wheels in PEER_WHEELS into build/gpu-check/peers, and puts that on the path."""
    folder = os.environ.get("PEER_WHEELS", "")
    if not folder:
        return {}
    wheels = sorted(str(wheel) for wheel in Path(folder).resolve().glob("*.whl"))
    if not wheels:
        outcome.fail(f"PEER_WHEELS={folder}: no wheels there")
        return {}
    target = WORK / "peers"
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    code, output = check.run([*command, *wheels])
    if code:
        outcome.fail(f"PEER_WHEELS={folder}: pip install ended with {code}: {last_line(output)}")
        return {}
    outcome.say(f"peers: {', '.join(Path(wheel).name for wheel in wheels)}")
    path = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH", "")]))
    return {"PYTHONPATH": path}


def tune(check: Check, outcome: Outcome) -> None:
    """Times each choice of every tile table and writes the fastest into tiles.json; changes no table."""
    if not check.gpu:
        outcome.no_device("torch sees no GPU: choices are run in the interpreter; its times mean nothing")
    target = check.results / "tiles.json"
    quick = [] if check.gpu and not check.quick else ["--quick"]
    device = [] if check.gpu else ["--device", "cpu"]
    code, output = check.fastattn("bench", "tune", "--output", str(target), *quick, *device, **check.interpreted)
    if code:
        outcome.fail(f"tune: ended with {code}: {last_line(output)}")
    else:
        outcome.say(last_line(output))


STAGES: dict[str, Callable[[Check, Outcome], None]] = {
    "build": build,
    "verify": verify,
    "sanitize": sanitize,
    "bench": bench,
    "tune": tune,
}
ALL = ("build", "verify", "sanitize", "bench")


# --- The command --------------------------------------------------------------------------------------------


def device() -> tuple[str, bool]:
    """The name that the result folder takes, and whether there is a GPU. Asked in a process of its own: a CUDA context
    of this one would hold memory while others are measured."""
    script = (
        "import torch; from fastattn.environment import device_name as name\n"
        "gpu = torch.cuda.is_available(); print(name('cuda' if gpu else 'cpu')); print(gpu)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"gpu-check needs a Python with torch: {sys.executable} says: {last_line(done.stderr)}")
    name, gpu = done.stdout.splitlines()[-2:]
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "")).strip("-"), gpu == "True"


def run_stage(name: str, check: Check) -> Outcome:
    """Runs one stage; whatever it raises is its failure."""
    print(f"{name}:", flush=True)
    outcome, began = Outcome(), time.monotonic()
    check.deadline = began + check.seconds
    try:
        STAGES[name](check, outcome)
    except Exception as error:
        outcome.fail(f"{name}: {type(error).__name__}: {error}")
    outcome.seconds = round(time.monotonic() - began, 1)
    print(f"{name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages asked for; 1 if any failed."""
    parser = argparse.ArgumentParser(description="Measures a machine with a GPU from a checkout, in stages.")
    parser.add_argument("stage", nargs="?", default="all", choices=[*STAGES, "all"])
    parser.add_argument("--results", type=Path, help="default: bench/results/<device>-<date>")
    parser.add_argument(
        "--seconds", type=float, default=STAGE_SECONDS, help="the time of each stage; default: %(default)s"
    )
    parser.add_argument("--cases", type=int, default=CASES, help="of each operation in verify; default: %(default)s")
    parser.add_argument("--suites", default=os.environ.get("SUITES", ""), help="of bench, such as 'attention norm'")
    parser.add_argument("--quick", action="store_true", help="few cases and tiny sizes on a GPU too")
    given = parser.parse_args(arguments)
    if not given.seconds > 0 or given.cases < 1:
        parser.error(f"--seconds {given.seconds} --cases {given.cases}: pass more than 0 of each")
    suites = tuple(given.suites.split())
    if unknown := [name for name in suites if name not in BENCH_SHARES]:
        parser.error(f"--suites {given.suites}: {unknown[0]} is unknown; pass some of {' '.join(BENCH_SHARES)}")
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"gpu-check needs {' and '.join(missing)} in {sys.executable}")
    name, gpu = device()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    results: Path = (given.results or ROOT / "bench" / "results" / f"{name}-{today}").resolve()
    results.mkdir(parents=True, exist_ok=True)
    environment = {"COLUMNS": "160", "PYTHONUNBUFFERED": "1"}
    check = Check(results, gpu, given.quick, environment, given.seconds, given.cases, suites)
    record = results / "stages.json"
    stages = {}
    with contextlib.suppress(OSError, ValueError):
        stages = json.loads(record.read_text())
    failed = False
    for stage in ALL if given.stage == "all" else (given.stage,):
        outcome = run_stage(stage, check)
        stages[stage] = asdict(outcome)
        record.write_text(json.dumps(stages, indent=1) + "\n")
        failed = failed or outcome.status == "failed"
    print(f"results: {results}")
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends with it
    sys.exit(main())
