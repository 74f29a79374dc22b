"""Peak memory of a training step of attention follows the length, not its square: nothing of Sq x Skv is made."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastattn import dispatch

# The high-water mark of a fresh process, before and after the step at a length; a first step at another one has loaded
# and allocated whatever does not depend on it.
STEP = """
import resource, sys
import torch, fastattn
from fastattn.biases import ALiBi, T5Bias
from fastattn.masks import SlidingWindow

kind, length = sys.argv[1], int(sys.argv[2])
heads = 4

def step(n):
    q, k, v = (torch.randn(1, heads, n, 32, requires_grad=True) for _ in range(3))
    if kind == "T5":
        options = {"bias": T5Bias(torch.randn(32, heads, requires_grad=True)), "scale": 1.0}
    elif kind == "ALiBi":
        options = {"bias": ALiBi(torch.rand(heads, requires_grad=True))}
    else:
        options = {"mask": SlidingWindow(256, 0)}
    fastattn.attention(q, k, v, **options, backend="cpu").sum().backward()

step(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(length)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(dispatch.backends()["cpu"] is not None, reason="the CPU backend is not built")
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
@pytest.mark.parametrize("kind, length", [("T5", 4096), ("ALiBi", 4096), ("window", 16384)])
def test_peak_memory_of_forward_and_backward(kind, length):
    run = subprocess.run([sys.executable, "-c", STEP, kind, str(length)], capture_output=True, text=True, check=True)
    grown = float(run.stdout)
    tensor = 4 * length * 32 * 4 / 2**20  # MiB of q; alive at the peak are it, k, v, out, and the gradient of each
    square = 4 * length * length * 4 / 2**20  # one matrix of scores of all heads in float32
    print(f"{kind} at {length}: {grown:.0f} MiB; a tensor has {tensor:.0f}, a matrix of scores {square:.0f}")
    assert grown < 10 * tensor + 24 < square / 2
