"""Shared fixtures: a seed per test, the backends that the semantic tests run on, and processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # OpenMP, which torch loads, reads it once. A thread that waits leaves its core to the workers beside it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from fastattn import dispatch
from fastattn.functional import direct


def pytest_configure() -> None:
    """Workers side by side, and what they start, compute on a thread each: with more, every parallel region waits for
    one that another worker keeps from running. What is about threads sets their number itself."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Every test draws the same numbers each time, alone or in a run; the seed is printed with a failure."""
    seed = zlib.crc32(request.node.nodeid.encode())
    print(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


# Imports torch once, and forks for each script, which then runs as `python -c` runs it: nothing but torch is loaded,
# and of torch alone an import takes seconds.
_FORKS = """
import json, os, sys, traceback
import torch

for line in sys.stdin:
    script, sys.argv[1:], folder, environment, *files = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    status = 1
    try:
        for number, file in enumerate((os.devnull, *files)):
            os.dup2(os.open(file, os.O_RDWR), number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
        exec(compile(script, "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
"""


class FreshProcess:
    """Runs scripts, each in a process that has imported nothing but torch."""

    def __init__(self, folder: Path) -> None:
        self._files = [folder / "out", folder / "errors"]
        self._server: subprocess.Popen[str] | None = None

    def __call__(
        self, script: str, *arguments: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """What `python -c script arguments` leaves, with `environment` beside this process's."""
        own = {**os.environ, **environment}
        if not hasattr(os, "fork"):
            command = [sys.executable, "-c", script, *arguments]
            return subprocess.run(command, cwd=cwd, env=own, capture_output=True, text=True, check=False)
        if self._server is None:
            command = [sys.executable, "-c", _FORKS]
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for file in self._files:
            file.write_text("")
        assert self._server.stdin is not None and self._server.stdout is not None
        task = [script, arguments, str(cwd or Path.cwd()), own, *map(str, self._files)]
        print(json.dumps(task), file=self._server.stdin, flush=True)
        status = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, *(file.read_text() for file in self._files))

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()


@pytest.fixture(scope="session")
def fresh_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshProcess]:
    process = FreshProcess(tmp_path_factory.mktemp("fresh"))
    yield process
    process.close()


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backends that take CPU tensors; a missing one skips with its reason."""
    reason = dispatch.backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return str(request.param)


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain calls on the CPU, too, pass checks, operators and dispatch (see fastattn.functional.direct)."""
    monkeypatch.setattr(direct, "calls", lambda *args: None)
