"""What bench_cpu measures, a case, and what it writes, a row of its CSV.

One row of the CSV is one process. Columns:

    status           ok, that it was slow and timed once, or why there is no time
    n                timed calls; median_s, min_s, p20_s, p80_s are theirs
    in_turn_with     the providers that this process took turns with; empty: it ran alone
    relative         median over that of the floor in the same turns; alone: over the case's fastest
                     floor
    gflops           2 N D V times the products of the form (forward 1, forward_backward 4,
                     frozen_weight 3, known_coefficients 3) over the median, whoever does more
    peak_mb          most memory during a warm call beyond inputs and results (1 MB is 1e6 bytes)
    result_mb        logprobs, entropy, dhidden, dweight
    kept_mb          still held after the results are gone: caches, compiled code
    first_call_s     of a fresh process: compilation included
    freed_memory     kept or returned, see bench_cpu.py
    *_error          against float64 on a small shape with logits of standard deviation 5: largest
                     difference of logprobs and entropy (nats), relative norm of those of gradients
"""

from dataclasses import dataclass

from benchmarks.measure.shapes import Shape

# What matters most first: a time budget cuts the end of it.
FORM_ORDER = ("forward_backward", "forward", "known_coefficients", "frozen_weight")


@dataclass(frozen=True)
class Case:
    """What the rows of one bar chart have in common."""

    shape: Shape
    dtype: str
    form: str
    with_entropy: bool

    def label(self) -> str:
        entropy = "+entropy" if self.with_entropy else ""
        return f"{self.shape.name} {self.dtype} {self.form}{entropy}"

    def key(self) -> tuple[str, str, str, str]:
        """What a row of this case says in Row.case."""
        return self.shape.name, self.dtype, self.form, yes(self.with_entropy)


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
        return self.provider if self.precision == "highest" else f"{self.provider}@{self.precision}"

    def turns(self) -> set[str]:
        """The labels of those that took turns, its own included."""
        return {self.label(), *self.in_turn_with.split()}

    def case(self) -> tuple[str, str, str, str]:
        """The rows with the same answer are one case."""
        return self.shape, self.dtype, self.form, self.entropy


def median_s(row: Row) -> float:
    """To sort by: what was not timed comes last."""
    return float("inf") if row.median_s is None else row.median_s


def yes(value: bool) -> str:
    return "yes" if value else "no"
