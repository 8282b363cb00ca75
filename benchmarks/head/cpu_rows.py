"""The rows of the CPU benchmark: one a process, and the CSV file that they make.

Columns:

    status           ok, that it was slow and timed once, or why there is no time
    n                timed calls; median_s, min_s, p20_s, p80_s are theirs
    in_turn_with     the providers that this process took turns with; empty: it ran alone
    relative         median over that of the floor in the same turns; alone: over the case's fastest
                     floor. The provider floor_kept is the form's products with the logits made once
    gflops           2 N D V times the products of the form (forward 1, forward_backward 4,
                     frozen_weight 3, known_coefficients 3) over the median, also where a provider
                     computes another number of products
    peak_mb          most memory during a warm call beyond inputs and results (1 MB is 1e6 bytes)
    result_mb        logprobs, entropy, dhidden, dweight
    kept_mb          still held after the results are gone: caches, compiled code
    first_call_s     of a fresh process: compilation included
    freed_memory     kept or returned, see cpu.py
    *_error          against float64 on a small shape with logits of standard deviation 5: largest
                     difference of logprobs and entropy (nats), relative norm of those of gradients
"""

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from agro_train import durable
from benchmarks.head.correctness import Errors
from benchmarks.head.job import FLOOR, Job, Measured, label_of
from benchmarks.head.providers.base import FORM_GEMMS
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure import timing
from benchmarks.measure.dtypes import name_of
from benchmarks.measure.rows import column_names, parsed, read_csv, texts
from benchmarks.measure.shapes import Shape

CaseKey = tuple[str, str, str, str]
"""Shape, dtype, form and "yes" or "no" for the entropy."""


@dataclass(frozen=True)
class Case:
    """What is compared: the rows of one bar chart have the same case."""

    shape: Shape
    dtype: str
    form: str
    with_entropy: bool

    def label(self) -> str:
        entropy = "+entropy" if self.with_entropy else ""
        return f"{self.shape.name} {self.dtype} {self.form}{entropy}"

    def key(self) -> CaseKey:
        """What a row of this case says in Row.case."""
        return self.shape.name, self.dtype, self.form, yes(self.with_entropy)


def case_of(job: Job) -> Case:
    """The case that a process measures."""
    return Case(job.shape, name_of(job.dtype), job.form, job.with_entropy)


@dataclass
class Row:
    """One line of the CSV, see the top of this file; the facts of the machine follow."""

    shape: str
    tokens: int
    hidden_size: int
    vocabulary: int
    dtype: str
    form: str
    entropy: str
    provider: str
    precision: str
    setting: str
    versions: str
    stores_logits: str
    instruction_set: str
    in_turn_with: str
    status: str
    n: int
    median_s: float | None
    min_s: float | None
    p20_s: float | None
    p80_s: float | None
    relative: float | None
    gflops: float | None
    peak_mb: float | None
    result_mb: float | None
    kept_mb: float | None
    first_call_s: float | None
    logprob_error: float | None
    entropy_error: float | None
    dhidden_error: float | None
    dweight_error: float | None

    def label(self) -> str:
        """Such as "torch@medium"."""
        return label_of(self.provider, self.precision)

    def turns(self) -> set[str]:
        """The labels of the processes that took turns, its own included."""
        return {self.label(), *self.in_turn_with.split()}

    def case(self) -> CaseKey:
        """Rows with the same answer are of one case, see Case.key."""
        return self.shape, self.dtype, self.form, self.entropy


def row_of(measured: Measured, others: Sequence[str] = (), errors: Errors | None = None) -> Row:
    """The row of one process.

    Args:
        others: labels of the processes that it took turns with.
        errors: None where they were not measured.
    """
    job = measured.job
    case, head = case_of(job), job.shape.head
    provider = PROVIDERS.get(job.provider)
    timed = timing.summary(measured.times_s) if measured.times_s else None
    flop = job.shape.gemm_flop() * len(FORM_GEMMS[job.form])
    errors = errors or Errors()
    return Row(
        shape=job.shape.name,
        tokens=job.shape.tokens,
        hidden_size=head.hidden_size,
        vocabulary=head.vocabulary,
        dtype=case.dtype,
        form=job.form,
        entropy=yes(job.with_entropy),
        provider=job.provider,
        precision=job.precision,
        setting=measured.setting,
        versions="" if provider is None or provider.missing() else provider.versions(),
        stores_logits=yes(provider is not None and provider.stores_logits),
        instruction_set=measured.instruction_set if job.provider.startswith("ours") else "",
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


def relate(rows: Sequence[Row], case: Case) -> None:
    """Divides the times of the case by the floor's, of the same turns where there is one."""
    rows = [row for row in rows if row.case() == case.key()]
    floors = [row for row in rows if row.provider == FLOOR and row.median_s is not None]
    for row in rows:
        if not floors or row.median_s is None:
            continue
        same = [floor for floor in floors if row.in_turn_with and floor.turns() == row.turns()]
        row.relative = row.median_s / median_s(min(same or floors, key=median_s))


class Table:
    """The CSV file of a run. Rows of earlier runs keep the facts of the machine they ran on."""

    def __init__(self, path: Path, facts: dict[str, str]):
        self.path, self.facts = path, facts
        self.kept: list[tuple[Row, dict[str, str]]] = []  # of earlier runs, with their facts
        self.new: list[Row] = []

    @property
    def rows(self) -> list[Row]:
        return [row for row, _ in self.kept] + self.new

    def keep_other_cases(self, measured_now: Collection[CaseKey]) -> None:
        """Takes over the rows of the file, if there is one, but for the cases measured now."""
        for columns in read_csv(self.path) if self.path.exists() else []:
            row = parsed(Row, columns)
            if row.case() not in measured_now:
                self.kept.append((row, {name: columns[name] for name in self.facts}))

    def write(self) -> None:
        """Replaces the file in one step: it may hold the rows of earlier runs."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow([*column_names(Row), *self.facts])
        for row, facts in [*self.kept, *((row, self.facts) for row in self.new)]:
            writer.writerow([*texts(row), *facts.values()])
        durable.replace(self.path, text.getvalue())


def median_s(row: Row) -> float:
    """To sort by: what was not timed comes last."""
    return float("inf") if row.median_s is None else row.median_s


def yes(value: bool) -> str:
    """As the CSV writes it."""
    return "yes" if value else "no"


def _mb(size: int | None) -> float | None:
    return None if size is None else size / 1e6
