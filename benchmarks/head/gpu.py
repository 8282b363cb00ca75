"""How fast, how large and how right are log-probabilities from hidden states on this GPU?

    python -m benchmarks.head.gpu [--head llama3-8b ...] [--tokens 4096 ...]
        [--form forward ...] [--provider ours ...] [--dtype bf16] [--with-entropy]
        [--repetitions 20] [--seconds 10] [--append] [--results FOLDER]
    python -m benchmarks.head.gpu --smoke      all of its code on a tiny shape, on any machine

Method, for each head, number of tokens and form (benchmarks.head.providers.base lists the forms):

* Before it is timed, each provider's errors are measured on a small shape against float64, and its
  results on the timed shape are checked (benchmarks.head.correctness). A wrong one is not timed.
* Providers take turns of a few calls, in rotating order: a clock that sinks sinks for all. Times
  are the GPU's own events with the L2 cache flushed before each call; median, 20th and 80th
  percentile of n calls: --repetitions, or what fits into --seconds, at least 3. The phase `whole`
  is all of a form, `backward` its backward pass alone.
* tflops counts the products that an exact program cannot avoid, 2 N D V operations each, with none
  computed twice: 1 forward, 3 with both gradients (2 of them in the backward pass), 2 with a frozen
  weight. Ours recomputes the logits, which is one more product than is counted.
* The floor, a matmul lower bound, is the products alone through torch.mm: of forward_backward all 4
  of a program that does not store the logits. For the 3 that no program can avoid see the floor of
  known_coefficients.
* extra_mb (1e6 bytes) is the allocator's peak beyond the inputs and the results.
* A provider that runs out of memory, cannot do a form or is not installed has a row that says so.
* torch.compile specialises to every shape (no dynamic ones); its compilation is not timed.

Inputs are random, logits of standard deviation 5, half the targets likely: data with less entropy
draws less power and clocks higher. Rows are written as soon as they are measured; --append keeps
those of other heads, tokens and forms.

    head    form     N   phase  provider     ms    p20    p80  TFLOP/s  extra MB  logp err ...
    smoke   forward  37  whole  ours      0.480  0.441  3.290      0.0       0.2   2.4e-06 ...
"""

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from agro_train import durable
from benchmarks.head.gpu_measure import measure
from benchmarks.head.gpu_plots import plot
from benchmarks.head.gpu_rows import Row
from benchmarks.head.providers.base import FORMS
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure import timing
from benchmarks.measure.arguments import lacks_gpu
from benchmarks.measure.dtypes import DTYPES
from benchmarks.measure.rows import RESULTS, column_names, parsed, read_csv, texts
from benchmarks.measure.shapes import (
    ACCURACY_SHAPE,
    GPU_HEADS,
    GPU_TOKENS,
    HEADS,
    SMOKE_SHAPE,
    SMOKE_SOFTCAP_SHAPE,
    Head,
    Shape,
)

# Compiling these takes longer than all else of a smoke run; --provider asks for them.
COMPILED = ("torch_compile", "checkpointed_loop", "cce_torch_compile")
SMOKE_TOKENS = (37, 64)

KeptRow = tuple[Row, dict[str, str]]
"""A row of an earlier run, and its line of the CSV with the facts of its machine."""


@dataclass(frozen=True)
class Run:
    """What is measured and where it is written: the command line with its defaults filled in."""

    shapes: list[Shape]
    forms: list[str]
    providers: list[str]
    dtype: str
    with_entropy: bool
    repetitions: int
    seconds: float
    device: str
    small: Shape  # on which errors are measured
    folder: Path
    stem: str  # of the CSV and the plots


def main(arguments: list[str] | None = None) -> int:
    """The process's exit status: 1 if ours failed or was wrong somewhere, 2 without a GPU."""
    options = parse(arguments)
    next_step = "; run it on a machine with one, or add --smoke to run its code on this CPU"
    if lacks_gpu("benchmarks.head.gpu", next_step, smoke=options.smoke):
        return 2
    run = run_of(options)
    facts = timing.machine_facts(run.device)
    for name in run.providers:
        if (absent := PROVIDERS[name].missing()) is not None:
            print(f"{name}: {absent}")
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / f"{run.stem}.csv"
    kept = other_rows(path, run) if options.append else []
    start_csv(path, kept, list(facts))
    print_header()
    rows = measure_all(run, facts, path)
    draw(run, [row for row, _ in kept], rows, facts)
    print(f"written to {run.folder}: {path.name} and a plot for each head and form")
    return say_wrong(rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--head", nargs="+", choices=HEADS, default=list(GPU_HEADS))
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--with-entropy", action="store_true", help="entropies and their gradient")
    parser.add_argument("--repetitions", type=int, help="calls of each provider, at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the calls of each")
    parser.add_argument("--append", action="store_true", help="keep the CSV's other rows")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU without a GPU")
    return parser.parse_args(arguments)


def run_of(options: argparse.Namespace) -> Run:
    """Fills in the defaults, which are smaller with --smoke."""
    smoke = options.smoke
    left_out = COMPILED if smoke else ()
    stem = "bench_linear_logprobs" + ("_smoke" if smoke else "")
    stem += "" if options.dtype == "bf16" else f"_{options.dtype}"
    stem += "_entropy" if options.with_entropy else ""
    tokens = options.tokens or list(SMOKE_TOKENS if smoke else GPU_TOKENS)
    return Run(
        shapes=shapes_of(options.head, tokens, smoke),
        forms=options.form,
        providers=options.provider or [name for name in PROVIDERS if name not in left_out],
        dtype=options.dtype,
        with_entropy=options.with_entropy,
        repetitions=options.repetitions or (3 if smoke else 20),
        seconds=options.seconds,
        device="cuda" if torch.cuda.is_available() else "cpu",
        small=SMOKE_SHAPE if smoke else ACCURACY_SHAPE,
        folder=options.results,
        stem=stem,
    )


def shapes_of(heads: list[str], tokens: list[int], smoke: bool) -> list[Shape]:
    """Every head with every number of tokens; with --smoke the heads are tiny ones."""
    table: dict[str, Head] = HEADS
    if smoke:
        table = {shape.head.name: shape.head for shape in (SMOKE_SHAPE, SMOKE_SOFTCAP_SHAPE)}
        heads = list(table)
    return [Shape(f"{name}-{n}", n, table[name]) for name in heads for n in tokens]


# --- Measuring ------------------------------------------------------------------------------------


def measure_all(run: Run, facts: dict[str, str], path: Path) -> list[Row]:
    """All rows, printed and added to the CSV as soon as they are there.

    facts: of the machine; on a GPU the clocks in them are brought up to date after each case.
    """
    rows: list[Row] = []
    with path.open("a", newline="") as file, each_shape_compiled_apart(run.providers):
        writer = csv.writer(file, lineterminator="\n")
        for shape in run.shapes:
            if set(run.providers) & set(COMPILED):
                torch.compiler.reset()  # the programs of the last shape
            for form in run.forms:
                if run.with_entropy and form == "known_coefficients":
                    continue  # its sum has no entropy
                found = measure(
                    shape,
                    form,
                    run.providers,
                    dtype=DTYPES[run.dtype],
                    with_entropy=run.with_entropy,
                    repetitions=run.repetitions,
                    seconds=run.seconds,
                    device=run.device,
                    small=run.small,
                )
                if run.device == "cuda":
                    facts |= timing.gpu_facts()  # the clocks after this load
                for row in found:
                    print_row(row)
                    writer.writerow([*texts(row), *facts.values()])
                file.flush()
                rows += found
    return rows


@contextmanager
def each_shape_compiled_apart(providers: list[str]) -> Iterator[None]:
    """Inside, torch.compile makes no program that serves several shapes, and as many as needed."""
    if not set(providers) & set(COMPILED):
        yield  # without the import, which takes seconds
        return
    import torch._dynamo.config

    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):
        yield


# --- The CSV --------------------------------------------------------------------------------------


def other_rows(path: Path, run: Run) -> list[KeptRow]:
    """The rows of the CSV, if there is one, that this run does not measure again."""
    if not path.exists():
        return []
    again = {(shape.head.name, shape.tokens, form) for shape in run.shapes for form in run.forms}
    lines = read_csv(path)
    return [(row, line) for line in lines if (row := parsed(Row, line)).case() not in again]


def start_csv(path: Path, kept: list[KeptRow], facts: list[str]) -> None:
    """Replaces the file, in one step, by the headings and the kept rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*column_names(Row), *facts])
    for row, line in kept:
        writer.writerow([*texts(row), *(line.get(name, "") for name in facts)])
    durable.replace(path, text.getvalue())


# --- What is shown --------------------------------------------------------------------------------


def print_row(row: Row) -> None:
    """A line of the table, or why there are no numbers in it."""
    cells = [f"{row.head:<14}{row.form:<19}{row.tokens:<8}{row.phase:<9}{row.provider:<18}"]
    if row.median_ms is None:
        cells.append(row.status)
    else:
        cells.append(f"{row.median_ms:10.3f}{row.p20_ms:10.3f}{row.p80_ms:10.3f}{row.tflops:9.1f}")
        cells.append(" " * 12 if row.extra_mb is None else f"{row.extra_mb:12.1f}")
        found = (row.logprob_error, row.entropy_error, row.dhidden_error, row.dweight_error)
        cells += [" " * 10 if error is None else f"{error:10.1e}" for error in found]
    print("".join(cells).rstrip(), flush=True)


def print_header() -> None:
    print(
        f"{'head':<14}{'form':<19}{'N':<8}{'phase':<9}{'provider':<18}"
        f"{'ms':>10}{'p20':>10}{'p80':>10}{'TFLOP/s':>9}{'extra MB':>12}"
        f"{'logp err':>10}{'ent err':>10}{'dH err':>10}{'dW err':>10}"
    )


def draw(run: Run, kept: list[Row], rows: list[Row], facts: dict[str, str]) -> None:
    """A plot for each head and form that was measured now, rows of earlier runs included."""
    where = facts.get("gpu", facts["cpu"])
    title = f"{where}, torch {facts['torch']}, {run.dtype}, commit {facts['commit']}"
    title += " and earlier runs" if kept else ""
    for head in dict.fromkeys(row.head for row in rows):
        for form in dict.fromkeys(row.form for row in rows):
            path = run.folder / f"{run.stem}_{head}_{form}.png"
            plot(kept + rows, head, form, title, path)


def say_wrong(rows: list[Row]) -> int:
    """Prints where ours failed or was wrong; 1 if it was anywhere, else 0."""
    bad = [r for r in rows if r.provider == "ours" and r.status.startswith(("wrong", "failed"))]
    for row in bad:
        print(f"ours, {row.head}, N={row.tokens}, {row.form}: {row.status}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
