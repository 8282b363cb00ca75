"""Processes that may be killed: jobs are done side by side, and none takes longer than it may."""

import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from agro_train.refusal import Refusal
from agro_train.types import Failure

IDLE_DEATHS = 3  # while jobs wait: more, and no process of this kind stays


class Lost(Enum):
    """What became of a job without a result, by the name of the failure it is."""

    _value_: Failure
    LATE = "timeout"  # it took longer than it may; its worker was killed
    DIED = "error"  # its worker ended


class CannotStart(Refusal):
    """No worker of the kind can be had; the message says why."""


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float  # for what it is doing: starting, or the job
    started: bool = False
    job: int | None = None
    read: bytes = b""  # the part of a line that has come


class Workers:
    """A pool of processes `python -m module timeout_s [argument]`, each of which prints the line
    `ready` when it has started and then answers every line of JSON with one.

    A worker that cannot start prints why, or ends. They start with the first jobs, or with
    `start`, and end with this object or this process.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        size: int,
        timeout_s: float,
        start_s: float = 120.0,
        advice: str = "run that module by hand to see why",
    ) -> None:
        """Args: start_s: a worker that has not started by then never will, and `advice` helps."""
        self.command = [sys.executable, "-u", "-m", module, str(timeout_s), *arguments]
        self.module, self.size, self.timeout_s = module, size, timeout_s
        self.start_s, self.advice = start_s, advice
        self._workers: list[_Worker] = []
        self._idle_deaths = 0
        weakref.finalize(self, _end_all, self._workers)

    def start(self) -> None:
        """Starts a worker now, so that it is known whether it can. Raises CannotStart."""
        if not self._workers:
            self._workers.append(self._start())
        while any(not worker.started for worker in self._workers):
            for worker, line in self._lines():
                self._has_started(worker, line)

    def map(self, jobs: Sequence[Any]) -> list[Any | Lost]:
        """The jobs' results in their order, or what became of the job. Raises CannotStart."""
        results: list[Any | Lost] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        self._idle_deaths = 0
        try:
            while waiting or any(worker.job is not None for worker in self._workers):
                for worker in [w for w in self._workers if w.started and w.job is None]:
                    if worker.process.poll() is not None:
                        self._died_idle(worker)
                while len(self._workers) < min(self.size, len(jobs)):
                    self._workers.append(self._start())
                for worker in list(self._workers):
                    if waiting and worker.started and worker.job is None:
                        job = waiting.popleft()
                        if not self._give(worker, job, jobs):
                            waiting.appendleft(job)
                            self._died_idle(worker)
                if not any(w.job is not None or not w.started for w in self._workers):
                    continue  # they all died while idle: others are started
                for worker, line in self._lines():
                    if not worker.started:
                        self._has_started(worker, line)
                        continue
                    assert worker.job is not None, "only workers that do something are asked"
                    results[worker.job] = line if isinstance(line, Lost) else json.loads(line)
                    worker.job = None
                    if isinstance(line, Lost):
                        self._end(worker)
        finally:  # interrupted: an answer that comes later must not be taken for the next job's
            for worker in [w for w in self._workers if w.job is not None]:
                self._end(worker)
        return results

    def _start(self) -> _Worker:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # what it starts is killed with it
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        return _Worker(process, deadline=time.monotonic() + self.start_s)

    def _has_started(self, worker: _Worker, line: bytes | Lost) -> None:
        if line == b"ready\n":
            worker.started = True
            return
        status = None
        if line is Lost.DIED:
            try:  # its output ends a moment before the process does
                status = worker.process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                pass
        self._end(worker)
        if isinstance(line, bytes):
            raise CannotStart(line.decode(errors="replace").strip())
        how = f"within {self.start_s:g} s" if line is Lost.LATE else f"(exit status {status})"
        raise CannotStart(
            f"{self.module}: expected its process to start, got none {how}; {self.advice}"
        )

    def _died_idle(self, worker: _Worker) -> None:
        """No job is lost with it, so that another may be started; but not for ever."""
        self._end(worker)
        self._idle_deaths += 1
        if self._idle_deaths > IDLE_DEATHS:
            raise CannotStart(
                f"{self.module}: expected its process to wait for work, got {self._idle_deaths} "
                f"that ended by themselves; {self.advice}"
            )

    def _give(self, worker: _Worker, job: int, jobs: Sequence[Any]) -> bool:
        """Whether the worker took the job; one that died while idle does not. One that does not
        read it has the job as well, and will be late."""
        assert worker.process.stdin is not None
        pipe = worker.process.stdin.fileno()
        left = memoryview(json.dumps(jobs[job]).encode() + b"\n")
        worker.deadline = time.monotonic() + self.timeout_s
        room = select.poll()
        room.register(pipe, select.POLLOUT)
        worker.job = job  # from now on an interrupt ends it: half a job may be in the pipe
        try:
            while left and (rest := worker.deadline - time.monotonic()) > 0.0:
                if room.poll(1000 * rest):
                    left = left[os.write(pipe, left) :]
        except BrokenPipeError:
            worker.job = None
            return False
        return True

    def _lines(self) -> list[tuple[_Worker, bytes | Lost]]:
        """Waits for the next whole line, end or deadline of workers that are doing something."""
        doing = [w for w in self._workers if w.job is not None or not w.started]
        timeout = max(0.0, min(w.deadline for w in doing) - time.monotonic())
        ready = wait([_output(w) for w in doing], timeout)
        lines: list[tuple[_Worker, bytes | Lost]] = []
        for worker in doing:
            if _output(worker) in ready:
                part = os.read(_output(worker), 1 << 16)
                worker.read += part
                if worker.read.endswith(b"\n"):
                    lines.append((worker, worker.read))
                    worker.read = b""
                elif not part:
                    lines.append((worker, Lost.DIED))
            elif time.monotonic() >= worker.deadline:
                lines.append((worker, Lost.LATE))
        return lines

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        _kill(worker)


def _output(worker: _Worker) -> int:
    assert worker.process.stdout is not None
    return worker.process.stdout.fileno()


def _kill(worker: _Worker) -> None:
    try:
        os.killpg(worker.process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # it had ended and left nobody: Linux says the one, macOS the other
    worker.process.wait()
    for pipe in (worker.process.stdin, worker.process.stdout):
        assert pipe is not None
        pipe.close()


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        _kill(worker)
    workers.clear()
