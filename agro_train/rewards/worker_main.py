"""The loop of a worker process: jobs in, results out, a line of JSON each.

`workers.Workers` starts these processes and is the other end of their pipes.
"""

import json
import os
import signal
from collections.abc import Callable
from typing import Any, TextIO

from agro_train.refusal import Refusal


def serve(start: Callable[[], Callable[[Any], Any]], timeout_s: float) -> None:
    """Answers each job with what `start()`, called once, makes of it, until there are no more.

    Prints the line `ready` when `start` has returned. If it raises Refusal, prints that in one line
    instead, and returns. `start` and the jobs may print and read what they like: their output goes
    to stderr, and their input is empty.

    Args:
        timeout_s: what a job may take.
    """
    # Ctrl-C, and a scheduler's SIGTERM to all processes of a job, are for the parent: its end ends
    # this. Not SIG_IGN, which what a reward function starts would inherit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    jobs, results = _private_pipes()
    try:
        handle = start()
    except Refusal as error:
        _print(results, " ".join(str(error).split()))
        return
    _print(results, "ready")
    for line in jobs:
        # The parent kills a worker that takes too long. This alarm is for a worker whose parent was
        # killed itself; it comes late, so that it never ends a worker that the parent still times.
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 10)
        answer = handle(json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _print(results, json.dumps(answer))


def _private_pipes() -> tuple[TextIO, TextIO]:
    """The pipes of jobs and results, under file descriptors that only this module knows."""
    jobs = os.fdopen(os.dup(0))
    results = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return jobs, results


def _print(results: TextIO, line: str) -> None:
    results.write(line + "\n")
    results.flush()
