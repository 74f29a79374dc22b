"""`make gpu-check`: measures a machine with a GPU from a checkout, in stages of at most nine minutes each.

    python bench/gpu_check.py [build|verify|sanitize|bench|tune|all] [--results DIR] [--quick]

For a machine with Python, a C++ compiler and, for a GPU, nvcc, torch and Triton of its own; no network is needed. It
runs in this Python, and everything that it leaves is one small folder, bench/results/<device>-<date>/:
stages.json, verify-<backend>.json, results.json, report.md, plots, tiles.json.

build     compiles the native libraries in place; with FASTATTN_PREBUILT=1 only the pybind11 modules, over libraries
          that were built elsewhere and lie in fastattn/_lib
verify    `fastattn verify` of each GPU backend on every operation
sanitize  a short list of the same under compute-sanitizer
bench     `fastattn bench` of every suite, each in a process of its own, added to what the folder holds of that day;
          SUITES="attention norm" gives those the whole time. PEER_WHEELS names a folder of wheels that are unpacked
          beside this Python's packages first
tune      times every choice of the backends' tile tables (not part of `all`)

A stage that fails says what failed, and the others still run. Without a GPU, build, verify, bench and tune go as far
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
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu-check"
STAGE_SECONDS = 520.0
OPERATIONS = ("attention", "attention_decode", "norm", "linear_act", "ffn", "gated_ffn")
SUITES = ("attention", "packed", "decode", "norm", "ffn", "model")
BENCH_SHARES = {"attention": 0.5, "packed": 0.05, "decode": 0.1, "norm": 0.1, "ffn": 0.12, "model": 0.13}
SANITIZER_TOOLS = ("memcheck", "racecheck")


@dataclass
class Outcome:
    """What came of a stage. status: passed, failed, or no device (it went as far as a CPU allows)."""

    status: str = "passed"
    said: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def say(self, sentence: str) -> None:
        self.said.append(sentence)
        print(f"  {sentence}", flush=True)

    def fail(self, sentence: str) -> None:
        self.status = "failed"
        self.say(f"FAILED {sentence}")

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
    deadline: float = 0.0

    def left(self) -> float:
        return max(self.deadline - time.monotonic(), 1.0)

    def run(self, command: Sequence[str], seconds: float | None = None, **environment: str) -> tuple[int, str]:
        """Runs a command in the checkout within the stage's time: exit code (124 if time was up) and output."""
        limit = min(self.left(), seconds or STAGE_SECONDS)
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **self.environment, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            output = error.stdout or ""
            return 124, output if isinstance(output, str) else output.decode(errors="replace")
        except OSError as error:
            return 127, str(error)
        WORK.mkdir(parents=True, exist_ok=True)
        with (WORK / "log.txt").open("a") as log:
            log.write(f"$ {' '.join(command)}\n{done.stdout}\n")
        return done.returncode, done.stdout

    def fastattn(self, *arguments: str, seconds: float | None = None, **environment: str) -> tuple[int, str]:
        return self.run([sys.executable, "-m", "fastattn.cli", *arguments], seconds, **environment)

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


def usable_backends(check: Check) -> dict[str, str] | None:
    """Each backend with "usable" or why not, as `fastattn info` says in a process of its own."""
    code, output = check.fastattn("info", "--json", **check.interpreted)
    if code:
        return None
    found: dict[str, str] = json.loads(output[output.index("{") :])["backends"]
    return found


def report_backends(check: Check, outcome: Outcome) -> None:
    backends = usable_backends(check)
    if backends is None:
        outcome.fail("fastattn info does not run")
        return
    for name, verdict in backends.items():
        if name == "cuda" and verdict != "usable" and not check.gpu:
            outcome.no_device(f"{name}: {verdict}")
        elif name in ("cuda", "triton") and verdict != "usable" and check.gpu:
            outcome.fail(f"{name} is not usable on this GPU: {verdict}")
        else:
            outcome.say(f"{name}: {verdict}")


def verify(check: Check, outcome: Outcome) -> None:
    """Each GPU backend against the reference; what a backend refuses is counted, not failed."""
    backends = usable_backends(check)
    if backends is None:
        outcome.fail("verify: fastattn info does not run; see STAGE=build")
        return
    if not check.gpu:
        outcome.no_device("torch sees no GPU: Triton kernels run in the interpreter, a few small cases of each")
    for backend in ("cuda", "triton"):
        if backends[backend] != "usable":
            (outcome.fail if check.gpu else outcome.no_device)(f"{backend}: {backends[backend]}")
            continue
        target = check.results / f"verify-{backend}.json"
        reports = [report for op in OPERATIONS if (report := _verify_one(check, outcome, backend, op)) is not None]
        target.write_text(json.dumps(reports, indent=1) + "\n")


def _verify_one(check: Check, outcome: Outcome, backend: str, op: str) -> dict[str, object] | None:
    cases = str(150 if check.gpu and not check.quick else 2)
    target = WORK / f"verify-{backend}-{op}.json"
    WORK.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    command = ["verify", "--op", op, "--backend", backend, "--cases", cases, "--output", str(target)]
    code, output = check.fastattn(*command, seconds=check.left() / 2, **check.interpreted)
    if not target.exists():
        outcome.fail(f"verify {backend} {op}: ended with {code}: {last_line(output)}")
        return None
    report: dict[str, object] = json.loads(target.read_text())
    sentence = f"{backend} {op}: {report['checked']} checked, {report['refused']} refused"
    if code:
        outcome.fail(f"{sentence}, {len(report['failures'])} failed: fastattn {' '.join(command[:7])}")  # type: ignore[arg-type]
    else:
        outcome.say(sentence)
    return report


def sanitize(check: Check, outcome: Outcome) -> None:
    """A few cases of each operation under compute-sanitizer, on the CUDA backend and on Triton's."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not check.gpu:
        outcome.no_device("torch sees no GPU: compute-sanitizer has nothing to watch")
        return
    if program is None:
        outcome.say("compute-sanitizer is not installed: nothing was sanitized")
        return
    backends = usable_backends(check) or {}
    usable = [name for name in ("cuda", "triton") if backends.get(name) == "usable"]
    runs = [(backend, op, tool) for backend in usable for op in OPERATIONS for tool in SANITIZER_TOOLS]
    for number, (backend, op, tool) in enumerate(runs):
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "fastattn.cli"]
        command += ["verify", "--op", op, "--backend", backend, "--cases", "3"]
        code, output = check.run(command, check.left() / (len(runs) - number) * 2)
        summary = next((line for line in reversed(output.splitlines()) if "ERROR SUMMARY" in line), last_line(output))
        if code == 0:
            outcome.say(f"{tool} {backend} {op}: {summary.lstrip('= ')}")
        elif "Device not supported" in output:
            outcome.say(f"compute-sanitizer refuses this device: {summary.lstrip('= ')}")
            return
        else:
            outcome.fail(f"{tool} {backend} {op}: ended with {code}: {summary.lstrip('= ')}")


def bench(check: Check, outcome: Outcome) -> None:
    """Every suite in a process of its own, added to one report; on a CPU quick ones, Triton interpreted."""
    arguments = ["--report", str(check.results), "--append"]
    if check.quick or not check.gpu:
        arguments += ["--quick", "--no-compile", "--no-memory"]
    if not check.gpu:
        arguments += ["--device", "cpu"]
        outcome.no_device("torch sees no GPU: a quick run on the CPU, Triton interpreted; its times mean nothing")
    peers = install_peers(check, outcome)
    suites = os.environ.get("SUITES", "").split() or SUITES
    for suite in suites:
        seconds = BENCH_SHARES[suite] / sum(BENCH_SHARES[name] for name in suites) * STAGE_SECONDS
        budget = [] if not check.gpu else ["--budget", f"{0.8 * seconds:.0f}"]
        command = ["bench", suite, *arguments, *budget]
        code, output = check.fastattn(*command, seconds=1.3 * seconds, **check.interpreted, **peers)
        failures = [line for line in output.splitlines() if line.startswith("FAILED")]
        for failure in failures:
            outcome.fail(f"bench {failure.removeprefix('FAILED ')}")
        if code and not failures:
            outcome.fail(f"bench {suite}: ended with {code}: {last_line(output)}")
        elif not code:
            outcome.say(f"bench {suite}: done")


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
    check.deadline = began + STAGE_SECONDS
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
    parser.add_argument("--quick", action="store_true", help="few cases and tiny sizes on a GPU too")
    given = parser.parse_args(arguments)
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"gpu-check needs {' and '.join(missing)} in {sys.executable}")
    name, gpu = device()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    results: Path = (given.results or ROOT / "bench" / "results" / f"{name}-{today}").resolve()
    results.mkdir(parents=True, exist_ok=True)
    check = Check(results, gpu, given.quick, {"COLUMNS": "160", "PYTHONUNBUFFERED": "1"})
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
    sys.exit(main())
