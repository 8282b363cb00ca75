"""Processes that may be killed: jobs are done side by side, and none takes longer than it may.

The pool is written out here because those of libraries (pebble, loky) kill a worker and leave alone
what it has started, and a user's reward function may start anything. Here each worker leads a
process group, and the whole group is killed.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import agro_train
from agro_train.refusal import Refusal
from agro_train.types import Failure

IDLE_DEATHS = 3  # in one `map`: where more workers end without a job, the next would, too
IMPORT_FOLDER = str(Path(agro_train.__file__).parents[1])  # a worker imports this package from here


class NoResult(Enum):
    """Why a job has no result. The value is what the rollout's failure is called."""

    _value_: Failure
    TIMED_OUT = "timeout"  # its worker was killed
    DIED = "error"  # its worker ended by itself


class CannotStart(Refusal):
    """No worker of the kind can be had; the message says why."""


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float  # of what it is doing: starting, or the job
    started: bool = False
    job: int | None = None
    received: bytes = b""  # the beginning of a line whose end has not come yet

    @property
    def idle(self) -> bool:
        return self.started and self.job is None

    @property
    def input(self) -> int:
        assert self.process.stdin is not None
        return self.process.stdin.fileno()

    @property
    def output(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def kill(self) -> None:
        """Ends the process and all that it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # all of them have ended already: Linux says the one, macOS the other
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class Workers:
    """A pool of processes `python -m module timeout_s [arguments]`, each of which prints the line
    `ready` when it has started, and then answers every line of JSON with one. `worker_main.serve`
    does both.

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
        """
        Args:
            size: processes at most; no more are started than there are jobs.
            timeout_s: for one job.
            start_s: for starting; a worker that has not started by then never will.
            advice: what to do about one that cannot start and does not say why.
        """
        self.command = [sys.executable, "-u", "-m", module, str(timeout_s), *arguments]
        self.module, self.size, self.timeout_s = module, size, timeout_s
        self.start_s, self.advice = start_s, advice
        self._workers: list[_Worker] = []
        self._idle_deaths = 0
        self._in_use = threading.Lock()  # scoring has a thread of its own beside an evaluation's
        self.close = weakref.finalize(self, _kill_all, self._workers)

    def start(self) -> None:
        """Starts a worker now, so that it is known whether it can. Raises CannotStart."""
        if not self._workers:
            self._workers.append(self._new())
        while any(not worker.started for worker in self._workers):
            for worker, line in self._lines():
                self._has_started(worker, line)

    def map(self, jobs: Sequence[Any]) -> list[Any | NoResult]:
        """The jobs' results in their order, or why there is none. Raises CannotStart. A second
        thread waits for the first."""
        with self._in_use:
            if not self.close.alive:
                raise CannotStart(f"{self.module}: expected no job after the end, got one")
            return self._map(jobs)

    def _map(self, jobs: Sequence[Any]) -> list[Any | NoResult]:
        results: list[Any | NoResult] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        self._idle_deaths = 0
        try:
            while waiting or any(worker.job is not None for worker in self._workers):
                self._remove_dead_idle()
                while len(self._workers) < min(self.size, len(jobs)):
                    self._workers.append(self._new())
                self._hand_out(waiting, jobs)
                for worker, line in self._lines():
                    if not worker.started:
                        self._has_started(worker, line)
                        continue
                    assert worker.job is not None, "only workers that do something are asked"
                    results[worker.job] = line if isinstance(line, NoResult) else json.loads(line)
                    worker.job = None
                    if isinstance(line, NoResult):
                        self._remove(worker)
        finally:  # where this is interrupted, the answer of a job must not become the next one's
            for worker in [w for w in self._workers if w.job is not None]:
                self._remove(worker)
        return results

    def _new(self) -> _Worker:
        path = os.pathsep.join([IMPORT_FOLDER, *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # a process group of its own, which is killed as one
        )
        worker = _Worker(process, deadline=time.monotonic() + self.start_s)
        os.set_blocking(worker.input, False)
        return worker

    def _has_started(self, worker: _Worker, line: bytes | NoResult) -> None:
        """Notes that the worker is ready, or removes it and raises CannotStart."""
        if line == b"ready\n":
            worker.started = True
            return
        status = None
        if line is NoResult.DIED:
            try:  # its output ends a moment before the process does
                status = worker.process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                pass
        self._remove(worker)
        if isinstance(line, bytes):
            raise CannotStart(line.decode(errors="replace").strip())
        late = line is NoResult.TIMED_OUT
        how = f"within {self.start_s:g} s" if late else f"(exit status {status})"
        raise CannotStart(
            f"{self.module}: expected its process to start, got none {how}; {self.advice}"
        )

    def _remove_dead_idle(self) -> None:
        for worker in [w for w in self._workers if w.idle]:
            if worker.process.poll() is not None:
                self._died_idle(worker)

    def _died_idle(self, worker: _Worker) -> None:
        """It had no job that could be blamed, so another may be started; but not for ever."""
        self._remove(worker)
        self._idle_deaths += 1
        if self._idle_deaths > IDLE_DEATHS:
            raise CannotStart(
                f"{self.module}: expected its process to wait for work, got {self._idle_deaths} "
                f"that ended by themselves; {self.advice}"
            )

    def _hand_out(self, waiting: deque[int], jobs: Sequence[Any]) -> None:
        for worker in [w for w in self._workers if w.idle]:
            if waiting:
                job = waiting.popleft()
                if not self._give(worker, job, jobs):
                    waiting.appendleft(job)
                    self._died_idle(worker)

    def _give(self, worker: _Worker, job: int, jobs: Sequence[Any]) -> bool:
        """Whether the worker took the job. One that died while idle does not. One that is alive but
        does not read takes it as well, and will be late."""
        left = memoryview(json.dumps(jobs[job]).encode() + b"\n")
        worker.deadline = time.monotonic() + self.timeout_s
        room = select.poll()
        room.register(worker.input, select.POLLOUT)
        worker.job = job  # set now: if this is interrupted, half of the job may be in the pipe
        try:
            while left and (rest := worker.deadline - time.monotonic()) > 0.0:
                if room.poll(1000 * rest):
                    left = left[os.write(worker.input, left) :]
        except BrokenPipeError:
            worker.job = None
            return False
        return True

    def _lines(self) -> list[tuple[_Worker, bytes | NoResult]]:
        """Waits for the next whole line, end or deadline of workers that are doing something; at
        once if none is."""
        doing = [worker for worker in self._workers if not worker.idle]
        if not doing:
            return []
        timeout = max(0.0, min(worker.deadline for worker in doing) - time.monotonic())
        ready = wait([worker.output for worker in doing], timeout)
        lines: list[tuple[_Worker, bytes | NoResult]] = []
        for worker in doing:
            if worker.output in ready:
                part = os.read(worker.output, 1 << 16)
                worker.received += part
                if worker.received.endswith(b"\n"):
                    lines.append((worker, worker.received))
                    worker.received = b""
                elif not part:
                    lines.append((worker, NoResult.DIED))
            elif time.monotonic() >= worker.deadline:
                lines.append((worker, NoResult.TIMED_OUT))
        return lines

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()


def _kill_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
    workers.clear()
