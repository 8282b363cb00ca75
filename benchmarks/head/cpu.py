"""Time and memory of log-probabilities from hidden states on a CPU: ours, the peers, the floor.

    python -m benchmarks.head.cpu [--shapes A B C] [--dtypes bf16 fp32] [--forms forward ...]
        [--entropy no yes] [--providers torch ...] [--keeping ours_keeping_all ...]
        [--budget-minutes 25] [--smoke]

Question: how long does each form take, and how much memory does it need beyond its results, next to
the matmul lower bound: the matrix products that it cannot do without (the "floor")?

Method. A case is a shape, a dtype, a form, with or without entropy. Each provider runs in a fresh
process, checked against float64 before it is timed, with at least 7 timed calls after a warm-up.
After its peak memory has been measured a process keeps the memory that it frees
(timing.keep_freed_memory), so that no timed call pays for fresh pages; the floor, too, writes into
memory allocated beforehand. With --freed-memory returned the process returns large blocks to the
system, as glibc does by default.
First each peer runs alone; then ours, the fastest peer and the floor take turns (A B C A B C).
On the shapes after A the peer that was the fastest on A goes straight into its turns.
With --keeping, ours with room for a share of the logits (keep_logits_bytes) takes its turns with
these, and so does floor_kept, the products that are left where all logits are kept.
fp32 products are measured under both settings of torch.set_float32_matmul_precision, "highest"
(torch's default) and "medium" (name@medium); --precisions leaves one out. With --finalists, on the
shapes after A, where A was measured, only so many peers run, the fastest of A, and the fastest that
does not store the (N, V) logits.
A peer that has no form of its own for known coefficients is represented by its forward_backward. A
peer whose call takes more than --max-call-s is timed once. One whose call takes ten times that is
not called again once freed memory is kept: its time includes fresh pages, and its row says so.
After --budget-minutes nothing more is started, and the rows say what was left out. --append keeps
the rows of an earlier run and adds those of other cases.

One row of the CSV is one process; cpu_rows.py has its columns, cpu_plan.py what runs when.

Sample output, a row a process:

    A bf16 forward_backward    ours        1.2100 s      41 MB  with torch_compile floor
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.head.correctness import Errors
from benchmarks.head.cpu_plan import (
    FORM_ORDER,
    OUT_OF_TIME,
    PEERS,
    PRECISIONS,
    Options,
    Plan,
    cases,
)
from benchmarks.head.cpu_rows import Case, Row, Table, case_of, relate, row_of
from benchmarks.head.job import FLOORS, Job, Measured, find_errors, in_turn
from benchmarks.head.providers.base import FORMS
from benchmarks.head.providers.ours import KEEPING
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure import timing
from benchmarks.measure.dtypes import DTYPES
from benchmarks.measure.rows import RESULTS
from benchmarks.measure.shapes import CPU_SHAPES


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 if ours failed or was wrong somewhere."""
    options = parse(arguments)
    if options.smoke:
        # Before the first process: compiling takes minutes.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    folder = options.out or (Path(tempfile.mkdtemp()) if options.smoke else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    table = Table(folder / f"{options.name}.csv", facts_of(options))
    if options.append:
        table.keep_other_cases({case.key() for case in cases(options)})
    say_missing(options.providers)
    runner = Runner(options, table)
    try:
        for case in cases(options):
            runner.run(case)
    finally:
        table.write()
    print(f"wrote {table.path}")
    return say_wrong(table.rows)


def parse(arguments: Sequence[str] | None) -> Options:
    """The command line, or the process ends with what is wrong with it."""
    parser = argparse.ArgumentParser(
        description="Log-probabilities from hidden states on a CPU: time and memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=CPU_SHAPES, default=list(CPU_SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORM_ORDER))
    parser.add_argument("--entropy", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--providers", nargs="*", choices=PEERS, default=PEERS, help="peers")
    parser.add_argument(
        "--keeping", nargs="*", choices=KEEPING, default=[], help="ours with room for logits"
    )
    parser.add_argument("--finalists", type=int, help="peers after shape A, by default all")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of fp32"
    )
    parser.add_argument("--repetitions", type=int, default=7, help="timed calls, at least 7")
    parser.add_argument("--max-call-s", type=float, default=10.0, help="slower peers: timed once")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--freed-memory", choices=["kept", "returned"], default="kept", help="see the method"
    )
    parser.add_argument("--out", type=Path, help="folder of the results", default=None)
    parser.add_argument("--name", default="bench_cpu", help="of the CSV")
    parser.add_argument("--append", action="store_true", help="keep the CSV's rows of other cases")
    parser.add_argument(
        "--smoke", action="store_true", help="all of it on a tiny shape, uncompiled"
    )
    options = Options(**vars(parser.parse_args(arguments)))
    if options.smoke:
        return replace(options, repetitions=2)
    if options.repetitions < 7:
        parser.error(f"--repetitions: expected at least 7, got {options.repetitions}")
    return options


def facts_of(options: Options) -> dict[str, str]:
    """The columns that are the same in every row of a run."""
    return timing.machine_facts() | {
        "threads": str(options.threads),
        "freed_memory": options.freed_memory,
        "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
    }


class Runner:
    """Measures what the plan asks for, until the time budget is over."""

    def __init__(self, options: Options, table: Table):
        self.options, self.table = options, table
        self.deadline = time.monotonic() + 60.0 * options.budget_minutes
        self.errors: dict[tuple[object, ...], Errors] = {}

    def run(self, case: Case) -> None:
        """All rows of a case: the processes that ran, and why others did not."""
        left_out = [
            Measured(job, status=reason)
            for job, reason in Plan(self.options, case, self.table.rows).peers()
            if reason is not None
        ]
        self.table.new += [self._row(measured) for measured in left_out]
        while jobs := Plan(self.options, case, self.table.rows).next_jobs():
            if time.monotonic() < self.deadline:
                self._measure(jobs)
            else:
                late = [Measured(job, status=OUT_OF_TIME) for job in jobs]
                self.table.new += [self._row(measured) for measured in late]
        relate(self.table.rows, case)
        self.table.write()

    def _measure(self, jobs: Sequence[Job]) -> None:
        """One process a job, in turn; before them the errors of each provider."""
        for job in jobs:
            self._find_errors(job)
        limit = float("inf") if len(jobs) > 1 else self.options.max_call_s
        labels = [job.label() for job in jobs]
        for measured in in_turn(jobs, self.options.repetitions, max_call_s=limit):
            others = [label for label in labels if label != measured.job.label()]
            row = self._row(measured, others)
            self.table.new.append(row)
            print(describe(row, case_of(measured.job)), flush=True)
        self.table.write()

    def _find_errors(self, job: Job) -> None:
        """Once for each provider, precision, dtype and entropy: most forms share their code."""
        key = _error_key(job)
        if job.provider in FLOORS or key in self.errors:
            return
        form = _error_form(job)
        with_entropy = job.with_entropy and form != "known_coefficients"
        found = find_errors(replace(job, form=form, with_entropy=with_entropy))
        self.errors[key] = found if isinstance(found, Errors) else Errors()

    def _row(self, measured: Measured, others: Sequence[str] = ()) -> Row:
        return row_of(measured, others, self.errors.get(_error_key(measured.job)))


def _error_key(job: Job) -> tuple[object, ...]:
    return job.provider, job.precision, job.dtype, job.with_entropy, _error_form(job)


def _error_form(job: Job) -> str:
    """The form whose errors stand for those of the job's."""
    known = job.form == "known_coefficients"
    own = job.provider in PROVIDERS and PROVIDERS[job.provider].has_known_coefficients
    return "known_coefficients" if known and own else "forward_backward"


def say_missing(providers: Sequence[str]) -> None:
    """Prints which peers are not installed."""
    for name in providers:
        missing = PROVIDERS[name].missing()
        if missing is not None:
            print(f"{name}: {missing}")


def say_wrong(rows: Sequence[Row]) -> int:
    """Prints what failed or was wrong; 1 if ours is among them, else 0."""
    wrong = [row for row in rows if row.status.startswith(("wrong", "failed", "died"))]
    for row in wrong:
        print(f"{row.shape} {row.dtype} {row.form} {row.label()}: {row.status}")
    return 1 if any(row.provider == "ours" for row in wrong) else 0


def describe(row: Row, case: Case) -> str:
    """The line that is printed when a process has been measured."""
    time_s = "" if row.median_s is None else f"{row.median_s:9.4f} s"
    memory = "" if row.peak_mb is None else f"{row.peak_mb:8.0f} MB"
    turn = f"with {row.in_turn_with}" if row.in_turn_with else "alone"
    status = "" if row.status == "ok" else row.status
    return f"{case.label():34} {row.label():24} {time_s}{memory}  {turn} {status}"


if __name__ == "__main__":
    raise SystemExit(main())
