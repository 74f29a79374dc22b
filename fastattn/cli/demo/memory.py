"""Peak memory of one forward, measured in a process of its own per variant.

`growth_mb`: by how much resident memory rose, at its highest, during one forward pass after a warm-up pass. The
allocator is told to return every freed block above 64 KiB at once, so that this is the memory of live tensors and
scratch space, not of old ones kept for later. `peak_mb`: the highest resident memory of the whole process during that
pass, with torch, the weights and everything else. Both need Linux; elsewhere only the process's maximum is known.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from fastattn.cli.demo.model import full_batch, load_tokenizer, load_variant, passages

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_TIMEOUT_S = 900


def _status_mb(field: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def measure(folder: Path, variant: str, batch: int, length: int) -> dict[str, float | str | None]:
    """Loads the variant, warms it up and measures one forward pass. To be called in a fresh process."""
    model, _ = load_variant(folder, variant)
    inputs = full_batch(load_tokenizer(folder), passages(), batch, length)
    with torch.no_grad():
        inputs.run(model)
        if not _STATUS.exists():
            inputs.run(model)
            import resource  # not on Windows

            unit = 2**20 if sys.platform == "darwin" else 2**10
            return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, "growth_mb": None}
        before = _status_mb("VmRSS")
        _CLEAR.write_text("5")  # sets the high-water mark back to what is resident now
        inputs.run(model)
    peak = _status_mb("VmHWM")
    return {"peak_mb": peak, "growth_mb": peak - before}


def measure_apart(folder: Path, variant: str, batch: int, length: int, threads: int) -> dict[str, float | str | None]:
    """`measure` in a new process; {"error": ...} where that process fails."""
    command = [sys.executable, "-m", "fastattn.cli.demo.memory", str(folder), variant, str(batch), str(length)]
    try:
        done = subprocess.run(
            [*command, str(threads)],
            env={**os.environ, **_ALLOCATOR},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {_TIMEOUT_S} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it failed without a word"])[-1][:200]}
    found: dict[str, float | str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[5]))
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
