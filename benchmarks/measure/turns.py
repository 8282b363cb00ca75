"""Fresh processes that take turns: each measures one thing, one call after the other's.

Whatever is measured runs in a process of its own, so that none inherits another's memory, threads
or compiled code. Processes to be compared are alive together and are called in turn, A B A B, so
that what disturbs the machine for a while disturbs both; while one works, the others sleep.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Slow to import, and needed by most processes: done once, in the server that they are forked from.
PRELOAD = ("torch._inductor.compile_fx", "matplotlib.figure")
PAUSE_S = 0.02  # between two turns, for the threads of the last one to go to sleep


class Turn:
    """One process, running target(connection, *arguments), and the pipe to it.

    Args:
        log: the file that takes the process's output.
        target: a function of a module, which the process imports by name.
        arguments: are pickled.
    """

    def __init__(self, log: Path, target: Callable[..., None], *arguments: Any):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([target.__module__, *PRELOAD])
        self.log = log
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(
            target=_main, args=(target, theirs, arguments, str(log))
        )
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        """What the process sends; a sentence if it died."""
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            return f"died: exit status {self.process.exitcode}, see its output above"

    def send(self, message: str) -> None:
        """Asks for the next call."""
        self.connection.send(message)

    def close(self) -> None:
        """Ends the process and waits for it."""
        self.connection.close()  # ends the process's loop
        self.process.join()


def rounds(
    turns: Sequence[Turn], count: int, goes_on: Callable[[int], bool]
) -> Iterator[tuple[int, Any]]:
    """(number of a process, its answer): one call of each after the other's, `count` times.

    A process is left out as soon as goes_on(its number) is false.
    """
    for _ in range(count):
        for index, turn in enumerate(turns):
            if goes_on(index):
                time.sleep(PAUSE_S)
                turn.send("call")
                yield index, turn.receive()


def tail(log: Path) -> str:
    """The last 20 lines of a process's output."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-20:])


def _main(
    target: Callable[..., None], connection: Connection, arguments: tuple[Any, ...], log: str
) -> None:
    """What the process runs. Its output goes to a file, which is shown if it dies."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    target(connection, *arguments)
