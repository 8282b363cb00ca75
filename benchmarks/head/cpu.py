"""Time and memory of log-probabilities from hidden states on a CPU: ours, the peers, the floor.

    python -m benchmarks.bench_cpu [--shapes A B C] [--dtypes bf16 fp32] [--forms forward ...]
        [--entropy no yes] [--providers torch ...] [--budget-minutes 25] [--smoke]

Question: how long does each form take, and how much memory beyond its results, next to the bare
matrix products it needs?

Method. A case is a shape, a dtype, a form, with or without entropy. Each provider runs in a fresh
process, checked against float64 before it is timed, with at least 7 timed calls after a warm-up.
After its memory has been measured a process keeps what it frees (timing.keep_freed_memory), so that
no timed call pays for fresh pages: the floor writes into memory made beforehand, too. With
--freed-memory returned it gives large blocks back, as glibc does by itself.
First the peers alone; then ours, the fastest peer and the floor together, in turn (A B C A B C).
On the shapes after A the peer that was the fastest on A goes straight into its turns.
fp32 products are measured under both settings of torch.set_float32_matmul_precision, "highest"
(torch's default) and "medium" (name@medium); --precisions leaves one out. With --finalists, on the
shapes after A, where A was measured, only so many peers run, the fastest of A, and the fastest that
does not store the (N, V) logits.
Peers without a form of their own for known coefficients have their forward_backward time stand for
it. A peer whose one call takes more than --max-call-s is timed once, and one whose call takes ten
times that before freed memory is kept: fresh pages are part of that time, and its row says so. When
--budget-minutes is over, what has not run is listed as such. --append adds cases to those of an
earlier run.

One row of the CSV is one process; cpu_rows.py has its columns.

Sample output, a row a process:

    A bf16 forward_backward   ours              1.21 s   1.02 x floor      41 MB
"""

import argparse
import csv
import io
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from agro_train import durable
from benchmarks.head.correctness import Errors
from benchmarks.head.cpu_rows import FORM_ORDER, Case, Row, median_s, yes
from benchmarks.head.providers.base import FORM_GEMMS, FORMS
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.head.turns import FLOOR, Job, Measured, find_errors, in_turn
from benchmarks.measure import plots, timing
from benchmarks.measure.rows import column_names, parsed, texts
from benchmarks.measure.shapes import CPU_SHAPES, SMOKE_SHAPE

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
PRECISIONS = ("highest", "medium")  # torch.set_float32_matmul_precision
RESULTS = Path(__file__).parents[1] / "results"
# The peers in the order in which they run; the time budget cuts the end of it.
PEERS = [
    name for name, provider in PROVIDERS.items() if name != "ours" and "cpu" in provider.devices
]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.smoke:
        os.environ["TORCH_COMPILE_DISABLE"] = (
            "1"  # before the first process: compiling takes minutes
        )
    folder = options.out or (Path(tempfile.mkdtemp()) if options.smoke else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options, folder / f"{options.name}.csv")
    if options.append:
        bench.keep_other_cases()
    for name in bench.missing:
        print(f"{name}: {PROVIDERS[name].missing()}")
    try:
        for case in cases(options):
            bench.run(case)
    finally:
        bench.write()
    print(f"wrote {bench.path}")
    for path in plots.plot_cpu(bench.path):
        print(f"wrote {path}")
    wrong = [row for row in bench.rows if row.status.startswith(("wrong", "failed", "died"))]
    for row in wrong:
        print(f"{row.shape} {row.dtype} {row.form} {row.label()}: {row.status}")
    return 1 if any(row.provider == "ours" for row in wrong) else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Log-probabilities from hidden states on a CPU: time and memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=CPU_SHAPES, default=list(CPU_SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORM_ORDER))
    parser.add_argument("--entropy", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--providers", nargs="*", choices=PEERS, default=PEERS, help="peers")
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
    parser.add_argument("--name", default="bench_cpu", help="of the CSV, and start of the plots'")
    parser.add_argument("--append", action="store_true", help="keep the CSV's rows of other cases")
    parser.add_argument(
        "--smoke", action="store_true", help="all of it on a tiny shape, uncompiled"
    )
    options = parser.parse_args(arguments)
    if options.repetitions < 7 and not options.smoke:
        parser.error(f"--repetitions: expected at least 7, got {options.repetitions}")
    if options.smoke:
        options.repetitions = 2
    return options


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Most important first. --smoke keeps those that differ in the code they run."""
    forms = [form for form in FORM_ORDER if form in options.forms]
    if options.smoke:
        yield from (Case(SMOKE_SHAPE, "fp32", form, False) for form in forms)
        yield Case(SMOKE_SHAPE, "bf16", forms[0], forms[0] != "known_coefficients")
        return
    shapes = [CPU_SHAPES[name] for name in options.shapes]
    for entropy in options.entropy:
        for form in forms:
            if entropy == "yes" and form == "known_coefficients":
                continue
            for shape in shapes:
                for dtype in options.dtypes:
                    yield Case(shape, dtype, form, entropy == "yes")


class Bench:
    """The rows so far, and how the next case is measured."""

    def __init__(self, options: argparse.Namespace, path: Path):
        self.options, self.path = options, path
        self.deadline = time.monotonic() + 60.0 * options.budget_minutes
        self.facts = timing.machine_facts() | {
            "threads": str(options.threads),
            "freed_memory": options.freed_memory,
            "started": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        }
        self.missing = [name for name in options.providers if PROVIDERS[name].missing()]
        self.rows: list[Row] = []
        self.earlier: dict[int, dict[str, str]] = {}  # id of a kept row -> facts of its machine
        self.errors: dict[tuple[object, ...], Errors] = {}

    def keep_other_cases(self) -> None:
        """Takes over the rows of the CSV, if there is one, but for the cases to be measured now."""
        measured = {case.key() for case in cases(self.options)}
        for columns in plots.read_csv(self.path) if self.path.exists() else []:
            row = parsed(Row, columns)
            if row.case() not in measured:
                self.rows.append(row)
                self.earlier[id(row)] = {name: columns[name] for name in self.facts}

    # --- A case ---

    def run(self, case: Case) -> None:
        jobs = self.peer_jobs(case)
        expected = self.expected_best(case, jobs)
        alone = [
            self.measure(case, [job])[0]
            for job in jobs
            if job is not expected and self.in_time(job)
        ]
        floor = self.floor_job(case)
        beside = expected or self.best_job(case, self.best_peer(case, alone))
        rows = self.take_turns(case, beside, floor)
        best = self.best_job(case, self.best_peer(case, alone + rows))
        if best is not None and best != beside:  # not the one that was expected
            self.take_turns(case, best, floor)
        self.relate(case)
        self.write()

    def take_turns(self, case: Case, peer: Job | None, floor: Job) -> list[Row]:
        """Ours, a peer and the floor in turn."""
        group = self.jobs(case, "ours", ["highest"]) + ([] if peer is None else [peer]) + [floor]
        return self.measure(case, group) if self.in_time(*group) else []

    def floor_job(self, case: Case) -> Job:
        """The floor with the precision that the best library needs: measured on the first shape."""
        precisions = self.options.precisions if case.dtype == "fp32" else ["highest"]
        if len(precisions) == 1:
            return self.jobs(case, FLOOR, precisions)[0]
        on_first = self.on_first_shape(case)
        floors = [row for row in on_first if row.provider == FLOOR and not row.in_turn_with]
        if case.shape.name == self.first_shape or not floors:
            floors = [
                self.measure(case, [job])[0]
                for job in self.jobs(case, FLOOR, precisions)
                if self.in_time(job)
            ]
        timed = sorted((row for row in floors if row.median_s is not None), key=median_s)
        return self.jobs(case, FLOOR, [timed[0].precision if timed else "highest"])[0]

    def expected_best(self, case: Case, jobs: Sequence[Job]) -> Job | None:
        """On a later shape the fastest of the first one: it need not run alone before its turns."""
        ranking = self.ranking(case)
        for job in jobs:
            if ranking and job.label() == ranking[0].label():
                return job
        return None

    def best_job(self, case: Case, row: Row | None) -> Job | None:
        return None if row is None else self.jobs(case, row.provider, [row.precision])[0]

    def jobs(self, case: Case, provider: str, precisions: Sequence[str]) -> list[Job]:
        dtype, options = DTYPES[case.dtype], self.options
        return [
            Job(provider, case.shape, dtype, case.form, case.with_entropy, precision,
                options.threads, options.smoke, options.freed_memory == "kept")
            for precision in precisions
        ]  # fmt: skip

    def peer_jobs(self, case: Case) -> list[Job]:
        """The peers that run alone, with what they cannot do or need not do left out, and said."""
        jobs = []
        for name in self.options.providers:
            provider = PROVIDERS[name]
            precisions = ["highest"]
            if case.dtype == "fp32" or provider.multiplies_in_fp32:
                first_alone = self.options.smoke and name != self.options.providers[0]
                precisions = self.options.precisions[: 1 if first_alone else None]
            for job in self.jobs(case, name, precisions):
                reason = self.reason_against(case, job)
                if reason is None:
                    jobs.append(job)
                else:
                    self.rows.append(self.row(case, Measured(job, status=reason), []))
        return jobs

    def reason_against(self, case: Case, job: Job) -> str | None:
        """None if the job shall run alone, else why not, for the CSV."""
        provider = PROVIDERS[job.provider]
        missing = provider.missing()
        if missing is not None:
            return missing
        if self.options.smoke and provider.needs_compiler:
            return "not run: --smoke compiles nothing"
        if case.with_entropy and not provider.has_entropy:
            return "cannot: gives no entropy"
        if case.form == "known_coefficients" and not provider.has_known_coefficients:
            if self.best_peer(case, []) is not None:
                return "see forward_backward: it has no form of its own"
        finalists = self.finalists(case)
        if finalists is not None and (job.provider, job.precision) not in finalists:
            return "not run: not among the fastest on the first shape"
        return None

    @property
    def first_shape(self) -> str:
        """Every peer runs on it."""
        return SMOKE_SHAPE.name if self.options.smoke else next(iter(CPU_SHAPES))

    def on_first_shape(self, case: Case) -> list[Row]:
        """What was timed of the same case on the first shape."""
        key = (self.first_shape, *case.key()[1:])
        return [row for row in self.rows if row.case() == key and row.median_s is not None]

    def ranking(self, case: Case) -> list[Row]:
        """On a later shape the peers that were timed on the first one, the fastest first."""
        if case.shape.name == self.first_shape:
            return []
        return sorted(
            (row for row in self.on_first_shape(case) if row.provider in PEERS), key=median_s
        )

    def finalists(self, case: Case) -> list[tuple[str, str]] | None:
        """Who runs on a later shape, with --finalists. None: everybody."""
        rows = self.ranking(case)
        if self.options.finalists is None or not rows:
            return None
        peers = list(dict.fromkeys((row.provider, row.precision) for row in rows))
        without = [(row.provider, row.precision) for row in rows if row.stores_logits == "no"]
        return list(dict.fromkeys(peers[: self.options.finalists] + without[:1]))

    def best_peer(self, case: Case, measured: Sequence[Row]) -> Row | None:
        """The fastest peer of the case, or of forward_backward where that stands for it."""
        rows = [row for row in measured if row.provider in PEERS]
        if case.form == "known_coefficients":
            rows += [
                row
                for row in self.rows
                if row.case() == (case.shape.name, case.dtype, "forward_backward", "no")
                and row.provider in PEERS
            ]
        timed = [row for row in rows if row.median_s is not None]
        return min(timed, key=median_s, default=None)

    def in_time(self, *jobs: Job) -> bool:
        """Whether the time budget is not over; says what does not run otherwise."""
        if time.monotonic() < self.deadline:
            return True
        for job in jobs:
            case = Case(job.shape, _name(job.dtype), job.form, job.with_entropy)
            self.rows.append(self.row(case, Measured(job, status="not run: time budget"), []))
        return False

    # --- Rows ---

    def measure(self, case: Case, jobs: Sequence[Job]) -> list[Row]:
        """One process a job, in turn. The errors come first: they are never measured after."""
        for job in jobs:
            self.find_errors(job)
        limit = float("inf") if len(jobs) > 1 else self.options.max_call_s
        found = in_turn(jobs, self.options.repetitions, max_call_s=limit)
        labels = [job.label() for job in jobs]
        rows = [
            self.row(case, measured, [label for label in labels if label != measured.job.label()])
            for measured in found
        ]
        self.rows += rows
        self.write()
        for row in rows:
            time_s = "" if row.median_s is None else f"{row.median_s:9.4f} s"
            memory = "" if row.peak_mb is None else f"{row.peak_mb:8.0f} MB"
            turn = f"with {row.in_turn_with}" if row.in_turn_with else "alone"
            status = "" if row.status == "ok" else row.status
            print(
                f"{case.label():34} {row.label():24} {time_s}{memory}  {turn} {status}", flush=True
            )
        return rows

    def find_errors(self, job: Job) -> None:
        """Once for each provider, precision and dtype: every form but one shares its code."""
        key = _error_key(job)
        if job.provider == FLOOR or key in self.errors:
            return
        known = key[-1] == "known_coefficients"
        with_entropy = job.with_entropy and not known
        small = replace(job, form=str(key[-1]), with_entropy=with_entropy)
        found = find_errors(small)
        self.errors[key] = found if isinstance(found, Errors) else Errors()

    def row(self, case: Case, measured: Measured, others: Sequence[str]) -> Row:
        job, head = measured.job, case.shape.head
        provider = PROVIDERS.get(job.provider)
        timed = timing.summary(measured.times_s) if measured.times_s else None
        flop = case.shape.gemm_flop() * len(FORM_GEMMS[case.form])
        errors = self.errors.get(_error_key(job), Errors())
        return Row(
            shape=case.shape.name,
            tokens=case.shape.tokens,
            hidden_size=head.hidden_size,
            vocabulary=head.vocabulary,
            dtype=case.dtype,
            form=case.form,
            entropy=yes(case.with_entropy),
            provider=job.provider,
            precision=job.precision,
            setting=measured.setting,
            versions="" if provider is None or provider.missing() else provider.versions(),
            stores_logits=yes(provider is not None and provider.stores_logits),
            instruction_set=measured.instruction_set if job.provider == "ours" else "",
            in_turn_with=" ".join(others),
            status=measured.status,
            n=len(measured.times_s),
            median_s=timed.median_s if timed else None,
            min_s=timed.min_s if timed else None,
            p20_s=timed.p20_s if timed else None,
            p80_s=timed.p80_s if timed else None,
            relative=None,
            gflops=flop / timed.median_s / 1e9 if timed else None,
            peak_mb=_mb(measured.peak_bytes),
            result_mb=_mb(measured.result_bytes),
            kept_mb=_mb(measured.kept_bytes),
            first_call_s=measured.first_call_s,
            logprob_error=errors.logprob_error,
            entropy_error=errors.entropy_error,
            dhidden_error=errors.dhidden_error,
            dweight_error=errors.dweight_error,
        )

    def relate(self, case: Case) -> None:
        """Divides the times of the case by the floor's, of the same turns where there is one."""
        rows = [row for row in self.rows if row.case() == case.key()]
        floors = [row for row in rows if row.provider == FLOOR and row.median_s is not None]
        for row in rows:
            if not floors or row.median_s is None:
                continue
            same = [floor for floor in floors if row.in_turn_with and floor.turns() == row.turns()]
            row.relative = row.median_s / median_s(min(same or floors, key=median_s))

    def write(self) -> None:
        """Whole or not at all: the file may hold the rows of earlier runs."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([*column_names(Row), *self.facts])
        for row in self.rows:
            facts = self.earlier.get(id(row), self.facts)
            writer.writerow([*texts(row), *facts.values()])
        durable.replace(self.path, text.getvalue())


def _error_key(job: Job) -> tuple[object, ...]:
    known = job.form == "known_coefficients"
    own = job.provider in PROVIDERS and PROVIDERS[job.provider].has_known_coefficients
    form = "known_coefficients" if known and own else "forward_backward"
    return job.provider, job.precision, job.dtype, job.with_entropy, form


def _mb(size: int | None) -> float | None:
    return None if size is None else size / 1e6


def _name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


if __name__ == "__main__":
    raise SystemExit(main())
