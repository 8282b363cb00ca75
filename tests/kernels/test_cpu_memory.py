"""The memory of a backward pass on the native CPU kernels, beyond its results.

In a process of its own: what a test before it freed would be used again unseen.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from agro_kernels._cpu import native

ROOT = Path(__file__).parents[2]
N, D, V = 2048, 256, 24576
PROGRAM = f"""
import sys, torch
from agro_kernels._cpu import linear_logprobs as cpu
from agro_kernels.backward import Backward
from agro_kernels.head import Head, Upstream
from benchmarks.measure.timing import peak_bytes

head = Head.of(torch.randn({N}, {D}), torch.randn({V}, {D}), torch.zeros({N}, dtype=torch.long))
lse, ones = torch.full(({N},), 50.0), torch.ones({N})
asked = [bool(int(one)) for one in sys.argv[2]] + [False]
results = []
torch.set_num_threads(int(sys.argv[1]))

def backward():
    upstream = Upstream(ones, None, None, lse, None)
    results[:] = cpu.linear_logprobs_bwd(Backward(upstream, head, asked))

peak = peak_bytes(backward)
print(peak - sum(4 * result.numel() for result in results))
"""


def backward_bytes(threads: int, asked: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(threads), asked],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(native.load() is None, reason="needs the native library")
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("asked", ["11", "10"], ids=["both", "hidden"])
def test_memory_stays_below_the_logits_for_any_number_of_threads(asked: str) -> None:
    logits = N * V * 4
    few, many = backward_bytes(4, asked), backward_bytes(64, asked)
    assert few < logits / 4
    assert many < 0.7 * logits
