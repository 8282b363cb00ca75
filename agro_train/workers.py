"""Processes that may be killed: jobs are done side by side, and none takes longer than it may."""

import json
import os
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

START_S = 120.0  # a worker that has not started by then never will


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float  # for what it is doing: starting, or the job
    started: bool = False
    job: int | None = None
    read: bytes = b""  # the part of a line that has come


class Workers:
    """A pool of processes `python -m module timeout_s`, each of which prints a line when it has
    started and then answers every line of JSON with one.

    They start with the first jobs and end with this object or this process.
    """

    def __init__(self, module: str, *, size: int, timeout_s: float) -> None:
        self.module, self.size, self.timeout_s = module, size, timeout_s
        self._workers: list[_Worker] = []
        weakref.finalize(self, _end_all, self._workers)

    def map(self, jobs: Sequence[Any]) -> list[Any | None]:
        """The jobs' results in their order. None: the worker took longer than `timeout_s` and was
        killed, or it died of the job.
        """
        results: list[Any | None] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        try:
            while waiting or any(worker.job is not None for worker in self._workers):
                for worker in [w for w in self._workers if w.started and w.job is None]:
                    if worker.process.poll() is not None:  # died while idle, with no job to lose
                        self._end(worker)
                while len(self._workers) < min(self.size, len(jobs)):
                    self._workers.append(self._start())
                for worker in list(self._workers):
                    if waiting and worker.started and worker.job is None:
                        job = waiting.popleft()
                        if not self._give(worker, job, jobs):
                            waiting.appendleft(job)
                            self._end(worker)
                if not any(w.job is not None or not w.started for w in self._workers):
                    continue  # they all died while idle: others are started
                for worker, line in self._lines():
                    if line is None:
                        self._end(worker)
                    elif worker.job is None:
                        worker.started = True
                        continue
                    else:
                        results[worker.job] = json.loads(line)
                    worker.job = None
        finally:  # interrupted: an answer that comes later must not be taken for the next job's
            for worker in [w for w in self._workers if w.job is not None]:
                self._end(worker)
        return results

    def _start(self) -> _Worker:
        package = str(Path(__file__).parents[1])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.Popen(
            [sys.executable, "-m", self.module, str(self.timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        return _Worker(process, deadline=time.monotonic() + START_S)

    def _give(self, worker: _Worker, job: int, jobs: Sequence[Any]) -> bool:
        """Whether the worker took the job; one that died while idle does not."""
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.write(json.dumps(jobs[job]).encode() + b"\n")
            worker.process.stdin.flush()
        except BrokenPipeError:
            return False
        worker.job = job
        worker.deadline = time.monotonic() + self.timeout_s
        return True

    def _lines(self) -> list[tuple[_Worker, bytes | None]]:
        """Waits for the next whole line, end or deadline of workers that are doing something."""
        doing = [w for w in self._workers if w.job is not None or not w.started]
        timeout = max(0.0, min(w.deadline for w in doing) - time.monotonic())
        ready = wait([_output(w) for w in doing], timeout)
        lines: list[tuple[_Worker, bytes | None]] = []
        for worker in doing:
            if _output(worker) in ready:
                part = os.read(_output(worker), 1 << 16)
                worker.read += part
                if worker.read.endswith(b"\n"):
                    lines.append((worker, worker.read))
                    worker.read = b""
                elif not part:
                    lines.append((worker, None))
            elif time.monotonic() >= worker.deadline:
                lines.append((worker, None))
        return lines

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        status = None
        if not worker.started:
            try:  # its output ends a moment before the process does
                status = worker.process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                pass
        _kill(worker)
        if not worker.started:
            how = f"within {START_S:g} s" if status is None else f"(exit status {status})"
            raise ValueError(
                f"{self.module}: expected its process to start, got none {how}; install what it "
                "needs: pip install math-verify"
            )


def _output(worker: _Worker) -> int:
    assert worker.process.stdout is not None
    return worker.process.stdout.fileno()


def _kill(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.wait()
    for pipe in (worker.process.stdin, worker.process.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except BrokenPipeError:
            pass  # a job that the dead worker never read


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        _kill(worker)
    workers.clear()
