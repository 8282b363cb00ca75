"""Ctrl-C and SIGTERM, as a preempted job gets it: work is finished or dropped whole, and one
sentence says how to go on. A second signal ends the process at once.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Some launchers send a process the same signal twice in a row: once to it, once to its group.
SAME_S = 0.3


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end; the text is what its user is told."""

    def __init__(self, number: int, text: str = "") -> None:
        self.number = number
        super().__init__(text or f"interrupted by {self.name}")

    @property
    def name(self) -> str:
        """SIGINT or SIGTERM."""
        return signal.Signals(self.number).name

    @property
    def status(self) -> int:
        """The exit status by which shells and schedulers know it: 130 or 143."""
        return 128 + self.number


class Interrupts:
    """While its block runs, a first signal raises Interrupted, or is noted where it has to wait; a
    second one ends the process at once, as if there were no block.

    A signal that is ignored when the block begins, as of a job in the background of a script, stays
    so. One that has not been entered notes nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None  # the number of the first signal
        self._at = 0.0
        self._raises = True
        self._before: dict[int, Any] = {}
        self._process = 0  # that has entered it

    def __enter__(self) -> "Interrupts":
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """In this block a first signal does nothing but set `received`."""
        with self._raising(False):
            yield

    @contextmanager
    def raised(self) -> Iterator[None]:
        """In this block, inside one of `noted`, it raises Interrupted, also one that came before:
        what the block does can be dropped."""
        with self._raising(True):
            if self.received is not None:
                raise Interrupted(self.received)
            yield

    @contextmanager
    def _raising(self, raises: bool) -> Iterator[None]:
        before, self._raises = self._raises, raises
        try:
            yield
        finally:
            self._raises = before

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork, as of multiprocessing: it ends as it would have
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
            return
        if self.received is not None:
            if time.monotonic() - self._at > SAME_S:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.received, self._at = number, time.monotonic()
        if self._raises:
            raise Interrupted(number)
        # Not print: the signal may have come in the middle of one.
        name = signal.Signals(number).name
        text = f"\n{name}: the step in hand is finished and saved; once more ends it at once\n"
        os.write(2, text.encode())
