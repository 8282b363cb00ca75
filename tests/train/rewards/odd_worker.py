"""A worker for the tests of the pool, `python -m THIS_MODULE TIMEOUT_S KIND`.

Of the kind `serves` it is a proper one: a job is [what to do] or [what to do, with what]. `checks`
takes the jobs of math-verify's worker, `refuses` does not start. The other kinds speak the pool's
protocol by hand, so that they can break it.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from agro_train.refusal import Refusal
from agro_train.rewards.worker_main import serve


def do(job: list[Any]) -> Any:
    what, *with_what = job
    return JOBS[what](*with_what)


def check(job: dict[str, str]) -> dict[str, Any]:
    """In place of math-verify's: what the completion says is done, and it is right."""
    what = job["completion"]
    if what in JOBS:
        do([what])
    return {"gold": True, "equal": True, "answer": what}


def hang() -> NoReturn:
    while True:
        time.sleep(1000)


def print_much() -> str:
    """By python, by a file descriptor, and by a process of its own."""
    print("ready")
    os.write(1, b'"an answer"\n')
    subprocess.run(["echo", '"another"'], check=True)
    return "printed"


def open_and_keep(path: str, mode: str) -> int:
    """Waits until the pipe `path` is open at its other end, too. Returns the process's id."""
    kept.append(open(path, mode))  # noqa: SIM115  (it stays open)
    return os.getpid()


def keep_in_child(path: str) -> str:
    """Leaves a process behind that has opened the pipe `path` for writing and never ends."""
    subprocess.Popen(["sh", "-c", f"exec sleep 1000 > {path}"])
    return "left a child"


def interrupt_parent() -> str:
    """As ctrl-C would, with an answer that comes when nobody waits for it any more."""
    os.kill(os.getppid(), signal.SIGINT)
    return "late"


def interrupt_itself() -> str:
    os.kill(os.getpid(), signal.SIGINT)
    return "not interrupted"


kept: list[Any] = []
JOBS: dict[str, Callable[..., Any]] = {
    "echo": lambda value: value,
    "die": lambda: os._exit(1),
    "hang": hang,
    "print": print_much,
    "read": lambda: sys.stdin.read(),
    "id": os.getpid,
    "open": open_and_keep,
    "leave child": keep_in_child,
    "interrupt parent": interrupt_parent,
    "interrupt itself": interrupt_itself,
}


def refuse() -> NoReturn:
    raise Refusal("odd: expected\nanother day, got Sunday")


def say(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


def answer_one_job(*, close: bool) -> NoReturn:
    """Gives the first job back, and then neither reads nor ends. close: nor can be written to."""
    say("ready\n")
    job = sys.stdin.readline()
    if close:
        os.close(0)
    say(job)
    hang()


def answer_none() -> NoReturn:
    """Is ready, but cannot be written to."""
    os.close(0)
    say("ready\n")
    hang()


if __name__ == "__main__":
    timeout_s, kind = float(sys.argv[1]), sys.argv[2]
    kinds: dict[str, Callable[[], Any]] = {
        "serves": lambda: serve(lambda: do, timeout_s),
        "checks": lambda: serve(lambda: check, timeout_s),
        "refuses": lambda: serve(refuse, timeout_s),
        "exits": lambda: sys.exit(3),
        "never ready": hang,
        "goes deaf": lambda: answer_one_job(close=False),
        "answers one": lambda: answer_one_job(close=True),
        "answers none": answer_none,
    }
    kinds[kind]()
