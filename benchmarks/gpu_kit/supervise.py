"""A part in a process of its own, with a time limit; what it reports survives it."""

import json
import multiprocessing
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

LAST_LINES = 12
# Slow to import, and needed by most parts: done once, by the server that dry parts are forked from.
PRELOAD = [
    "benchmarks.gpu_kit.checks",
    "benchmarks.gpu_kit.agro_steps",
    "agro_train.commands.train",
    "agro_train.watch.report",
    "transformers.models.llama.modeling_llama",
]


@dataclass(frozen=True)
class Outcome:
    """How a part ended, and what it reported until then."""

    status: Literal["ok", "failed", "timeout"]
    detail: str  # one line; empty: nothing to say
    seconds: float
    reports: list[dict[str, Any]]
    last_lines: list[str]  # of its output


class Report:
    """Adds a line to a file for each thing that a part has found out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, kind: str, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")


def run_part(
    name: str,
    function: str,
    arguments: Mapping[str, Any],
    folder: Path,
    limit_s: float,
    *,
    fork: bool,
    without_triton: bool = False,
) -> Outcome:
    """Calls `function` (module:function) with a Report, a folder of its own and the arguments, in a
    process that is ended with all that it has started: when it is done, or after `limit_s`.

    Args:
        fork: from a server that has the libraries imported, which takes a part seconds less. Not
            on a GPU: a library that asks for CUDA while it is imported breaks it for each child.
        without_triton: `import triton` fails in the process, so that torch's kernels serve.
    """
    scratch, log, reports = (folder / kind / name for kind in ("scratch", "logs", "reports"))
    for path in (scratch, log.parent, reports.parent):
        path.mkdir(parents=True, exist_ok=True)
    log, reports = log.with_suffix(".log"), reports.with_suffix(".jsonl")
    context: Any = multiprocessing.get_context("forkserver" if fork else "spawn")
    if fork:
        context.set_forkserver_preload(PRELOAD)
    process: BaseProcess = context.Process(
        target=_enter,
        args=(function, reports, scratch, dict(arguments), log, without_triton),
    )
    began = time.monotonic()
    process.start()
    try:
        process.join(limit_s)
        in_time = process.exitcode is not None
    finally:
        _end(process)
    seconds = time.monotonic() - began
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    last = [line for line in lines if line.strip()][-LAST_LINES:]
    found = _read(reports)
    if not in_time:
        return Outcome("timeout", f"ended after its {limit_s:.0f} s", seconds, found, last)
    if process.exitcode:
        said = last[-1] if last else f"exit status {process.exitcode}, no output"
        if process.exitcode < 0:
            said = f"killed by {signal.Signals(-process.exitcode).name}; {said}"
        return Outcome("failed", said[:400], seconds, found, last)
    return Outcome("ok", "", seconds, found, last)


def _enter(
    function: str,
    reports: Path,
    scratch: Path,
    arguments: dict[str, Any],
    log: Path,
    without_triton: bool,
) -> None:
    """What the process runs: a group of its own, whose output goes to a file."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if without_triton:
        sys.modules["triton"] = None  # type: ignore[assignment]
    pkgutil.resolve_name(function)(Report(reports), scratch, **arguments)


def _end(process: BaseProcess) -> None:
    """Ends the process and its group, workers that it has left behind among them."""
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # nothing is left, or it has not come to its first line
        process.kill()
    process.join()


def _read(reports: Path) -> list[dict[str, Any]]:
    """A line that was cut off in the middle is left out."""
    lines = reports.read_text(encoding="utf-8").split("\n")[:-1] if reports.exists() else []
    return [json.loads(line) for line in lines]
