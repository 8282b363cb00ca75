"""Which processes the CPU benchmark runs, decided from its options and the rows it has so far.

Nothing here starts a process or reads a clock: a plan is asked for the next processes, and asked
again when their rows are there.

    while jobs := Plan(options, case, rows).next_jobs():
        rows += measure(jobs)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.head.cpu_rows import Case, CaseKey, Row, median_s
from benchmarks.head.job import FLOOR, FLOOR_KEPT, Job
from benchmarks.head.providers.base import gemms_of
from benchmarks.head.providers.ours import KEEPING
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure.dtypes import DTYPES
from benchmarks.measure.shapes import CPU_SHAPES, SMOKE_SHAPE

PRECISIONS = ("highest", "medium")  # torch.set_float32_matmul_precision
# What matters most first: a time budget cuts the end of it.
FORM_ORDER = ("forward_backward", "forward", "known_coefficients", "frozen_weight")
# In the order in which they run.
PEERS = [
    name
    for name, provider in PROVIDERS.items()
    if name not in ("ours", *KEEPING) and "cpu" in provider.devices
]
OUT_OF_TIME = "not run: time budget"  # the status of a process that --budget-minutes left out


@dataclass(frozen=True)
class Options:
    """The command line of benchmarks.head.cpu, whose --help explains each."""

    shapes: Sequence[str]
    dtypes: Sequence[str]
    forms: Sequence[str]
    entropy: Sequence[str]  # of "no", "yes"
    providers: Sequence[str]  # peers
    keeping: Sequence[str]  # of KEEPING
    finalists: int | None
    precisions: Sequence[str]
    repetitions: int
    max_call_s: float
    budget_minutes: float
    threads: int
    freed_memory: str  # "kept" or "returned"
    out: Path | None
    name: str
    append: bool
    smoke: bool

    @property
    def first_shape(self) -> str:
        """Every peer runs on it; later shapes may leave out the slower ones."""
        return SMOKE_SHAPE.name if self.smoke else next(iter(CPU_SHAPES))


def cases(options: Options) -> Iterator[Case]:
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


def job_of(options: Options, case: Case, provider: str, precision: str = "highest") -> Job:
    """The process that measures a provider on a case."""
    return Job(
        provider,
        case.shape,
        DTYPES[case.dtype],
        case.form,
        case.with_entropy,
        precision,
        options.threads,
        options.smoke,
        options.freed_memory == "kept",
    )


@dataclass(frozen=True)
class Plan:
    """What runs of one case: the peers alone, then ours, the fastest peer and the floor in turn.

    rows: all rows so far, in the order in which they were measured. Those of this case say what has
    run; those of the first shape say which peer is expected to be the fastest.
    """

    options: Options
    case: Case
    rows: Sequence[Row]

    def next_jobs(self) -> list[Job]:
        """The processes to run next: one alone, or several in turn. Empty: the case is done."""
        of_case = self._rows_of(self.case.key())
        seen = {row.label() for row in of_case}
        expected = self.expected_fastest()
        alone = [job for job in self._running_peers() if job != expected] + self._floors_alone()
        for job in alone:
            if job.label() not in seen:
                return [job]
        ours = [row for row in of_case if row.provider == "ours"]
        if len(ours) > 1 or any(row.status == OUT_OF_TIME for row in ours):
            return []
        row = self.fastest_peer()
        fastest = None if row is None else self._job(row.provider, row.precision)
        if not ours:
            peer = expected or fastest
        elif fastest is not None and fastest.label() not in ours[0].turns():
            peer = fastest  # it was faster than the expected one, and has not taken turns with ours
        else:
            return []
        return [
            self._job("ours"),
            *(self._job(name) for name in self.keeping()),
            *([] if peer is None else [peer]),
            self._job(FLOOR, self.floor_precision()),
            *([self._job(FLOOR_KEPT, self.floor_precision())] if self.keeping() else []),
        ]

    def keeping(self) -> Sequence[str]:
        """Those that keep logits, where the form would make them twice."""
        form = self.case.form
        return self.options.keeping if gemms_of(form, kept=True) != gemms_of(form) else []

    # --- Peers ---

    def peers(self) -> Iterator[tuple[Job, str | None]]:
        """Each peer at each precision, and why it does not run: None if it does."""
        for name in self.options.providers:
            provider = PROVIDERS[name]
            precisions: Sequence[str] = ["highest"]
            if self.case.dtype == "fp32" or provider.multiplies_in_fp32:
                once = self.options.smoke and name != self.options.providers[0]
                precisions = self.options.precisions[: 1 if once else None]
            for precision in precisions:
                yield self._job(name, precision), self._reason_against(name, precision)

    def expected_fastest(self) -> Job | None:
        """On a later shape the fastest of the first one: it need not run alone before its turns."""
        ranking = self._ranking()
        fastest = ranking[0].label() if ranking else None
        return next((job for job in self._running_peers() if job.label() == fastest), None)

    def fastest_peer(self) -> Row | None:
        """The fastest peer of the case, or of forward_backward where that stands for it."""
        peers = [row for row in self._rows_of(self.case.key()) if row.provider in PEERS]
        timed = [row for row in [*peers, *self._stand_ins()] if row.median_s is not None]
        return min(timed, key=median_s, default=None)

    def finalists(self) -> list[tuple[str, str]] | None:
        """(provider, precision) of the peers that run on a later shape; None: all of them.

        With --finalists the fastest of the first shape, and the fastest that stores no logits.
        """
        ranking = self._ranking()
        if self.options.finalists is None or not ranking:
            return None
        peers = list(dict.fromkeys((row.provider, row.precision) for row in ranking))
        lean = [(row.provider, row.precision) for row in ranking if row.stores_logits == "no"]
        return list(dict.fromkeys(peers[: self.options.finalists] + lean[:1]))

    def _running_peers(self) -> list[Job]:
        return [job for job, reason in self.peers() if reason is None]

    def _reason_against(self, name: str, precision: str) -> str | None:
        provider = PROVIDERS[name]
        missing = provider.missing()
        if missing is not None:
            return missing
        if self.options.smoke and provider.needs_compiler:
            return "not run: --smoke compiles nothing"
        if self.case.with_entropy and not provider.has_entropy:
            return "cannot: gives no entropy"
        stood_for = any(row.median_s is not None for row in self._stand_ins())
        if stood_for and not provider.has_known_coefficients:
            return "see forward_backward: it has no form of its own"
        finalists = self.finalists()
        if finalists is not None and (name, precision) not in finalists:
            return "not run: not among the fastest on the first shape"
        return None

    def _stand_ins(self) -> list[Row]:
        """The peers' forward_backward, with which known coefficients are compared."""
        if self.case.form != "known_coefficients":
            return []
        rows = self._rows_of((self.case.shape.name, self.case.dtype, "forward_backward", "no"))
        return [row for row in rows if row.provider in PEERS]

    def _ranking(self) -> list[Row]:
        """On a later shape the peers that were timed on the first one, the fastest first."""
        if self._is_first_shape():
            return []
        rows = [row for row in self._timed_on_first_shape() if row.provider in PEERS]
        return sorted(rows, key=median_s)

    # --- The floor ---

    def floor_precision(self) -> str:
        """That of the fastest floor: the precision that the library is the fastest under."""
        precisions = self._floor_precisions()
        if len(precisions) == 1:
            return precisions[0]
        here = [row for row in self._rows_of(self.case.key()) if _is_floor_alone(row)]
        timed = [row for row in here or self._first_floors() if row.median_s is not None]
        return min(timed, key=median_s).precision if timed else "highest"

    def _floors_alone(self) -> list[Job]:
        """Where two precisions are in question the first shape decides for all of them."""
        precisions = self._floor_precisions()
        decided = not self._is_first_shape() and self._first_floors()
        if len(precisions) == 1 or decided:
            return []
        return [self._job(FLOOR, precision) for precision in precisions]

    def _floor_precisions(self) -> Sequence[str]:
        return self.options.precisions if self.case.dtype == "fp32" else ["highest"]

    def _first_floors(self) -> list[Row]:
        return [row for row in self._timed_on_first_shape() if _is_floor_alone(row)]

    # --- Rows and jobs ---

    def _is_first_shape(self) -> bool:
        return self.case.shape.name == self.options.first_shape

    def _timed_on_first_shape(self) -> list[Row]:
        rows = self._rows_of((self.options.first_shape, *self.case.key()[1:]))
        return [row for row in rows if row.median_s is not None]

    def _rows_of(self, key: CaseKey) -> list[Row]:
        return [row for row in self.rows if row.case() == key]

    def _job(self, provider: str, precision: str = "highest") -> Job:
        return job_of(self.options, self.case, provider, precision)


def _is_floor_alone(row: Row) -> bool:
    return row.provider == FLOOR and not row.in_turn_with
