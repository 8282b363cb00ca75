"""`agro` on one rank of a launch, and then: no thread of the process group may be left.

A thread that is still there when the interpreter ends can abort the process, once in many runs.
Torch's caches keep a sharded model's process group as long as the process, so only runs with
fsdp=false on their command line are asked.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from agro_train.cli import main


def names_of_threads() -> list[str]:
    return [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]


def check_threads(arguments: Sequence[str]) -> None:
    left = [name for name in names_of_threads() if "gloo" in name]
    if "fsdp=false" in arguments:
        assert not left, f"threads of the process group at the end of the run: {left}"


if __name__ == "__main__":
    status = main(sys.argv[1:])
    check_threads(sys.argv)
    raise SystemExit(status)
