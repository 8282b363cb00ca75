"""Parts for the tests of the GPU kit, which its processes import: nothing heavy is in here."""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu_kit.supervise import Report


def leaves_a_child(report: Report, folder: Path, answer: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report("child", pid=child.pid, answer=answer, folder=str(folder))


def fails(report: Report, folder: Path) -> None:
    report("before", folder=str(folder))
    print("a line of its output")
    raise RuntimeError("CUDA out of memory")


def hangs(report: Report, folder: Path) -> None:
    time.sleep(600)


def tells_of_triton(report: Report, folder: Path) -> None:
    try:
        import triton  # noqa: F401
    except ImportError:
        report("triton", there=False)
    else:
        report("triton", there=True)
