"""How fast, how large and how right are log-probabilities from hidden states on this GPU?

    python -m benchmarks.bench_linear_logprobs [--head llama3-8b ...] [--tokens 4096 ...]
        [--form forward ...] [--provider ours ...] [--dtype bf16] [--with-entropy]
        [--repetitions 20] [--seconds 10] [--append] [--results FOLDER]
    python -m benchmarks.bench_linear_logprobs --smoke     every line of it, on any machine, small

Method, for each head, number of tokens and form (benchmarks.providers says what a form is):

* Before it is timed, each provider's errors are measured on a small shape against float64, and its
  results on the timed shape are checked (benchmarks.correctness). Who is wrong gets no time.
* Providers take turns of a few calls, in rotating order: a clock that sinks sinks for all. Times
  are the GPU's own events with the L2 cache flushed before each call; median, 20th and 80th
  percentile of n calls: --repetitions, or what fits into --seconds, at least 3. The phase `whole`
  is all of a form, `backward` its backward pass alone.
* tflops counts the products that an exact program cannot avoid, 2 N D V operations each, with none
  computed twice: 1 forward, 3 with both gradients (2 of them in the backward pass), 2 with a frozen
  weight. Ours computes the logits again and does one more than is counted.
* The floor is the bare products through torch.mm: of forward_backward all 4 that a program without
  stored logits computes. The 3 that nobody can avoid are the floor of known_coefficients.
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
import functools
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from agro_kernels import linear_logprobs_with_stats
from agro_train import durable
from benchmarks.head.correctness import Errors, beyond_limits, errors, objection
from benchmarks.head.floor import GemmFloor
from benchmarks.head.gpu_rows import PHASES, Row, algorithmic_gemms
from benchmarks.head.providers.base import FORMS, Inputs, Step, make_inputs
from benchmarks.head.providers.registry import PROVIDERS
from benchmarks.measure import timing
from benchmarks.measure.rows import column_names, parsed, texts
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

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FLOOR_TILE_BYTES = 2 * 2**30  # of the logits that the floor's products read or write
# Compiling these takes longer than all else of a smoke run; --provider asks for them.
COMPILED = ("torch_compile", "checkpointed_loop", "cce_torch_compile")
SMOKE_TOKENS = (37, 64)
CALLS_A_TURN = 5
FEWEST_CALLS = 3  # of a provider that is too slow for --repetitions


@dataclass
class Entrant:
    """A provider, or the floor, on the inputs of one shape, form and dtype."""

    name: str
    status: str = "ok"
    whole: Callable[[], None] | None = None
    step: Step | None = None  # None for the floor
    errors: Errors = field(default_factory=Errors)
    extra_bytes: int | None = None
    setting: str = ""
    call_s: float = 0.0  # a warm call, from which follows how many there is time for
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def release(self) -> None:
        if self.step is not None:
            self.step.release()


# --- One shape, one form --------------------------------------------------------------------------


def enter(
    name: str, form: str, with_entropy: bool, inputs: Inputs, device: str, small: Shape
) -> Entrant:
    """Makes a provider ready: errors, warm-up, choice of its setting, check, peak memory.

    Whatever a provider raises is its status: one that fails must not end the run of the others.
    """
    entrant = Entrant(name)
    absent = PROVIDERS[name].missing()
    if absent is not None:
        entrant.status = absent
        return entrant
    try:
        provider = PROVIDERS[name]()
        against = provider.reason_against(form, with_entropy, inputs)
        if against is not None:
            entrant.status = f"cannot: {against}"
            return entrant
        dtype = inputs.hidden.dtype
        entrant.errors = errors_on(small, name, form, with_entropy, inputs.softcap, dtype, device)
        step = entrant.step = Step(provider, form, inputs, with_entropy=with_entropy)
        entrant.whole = step
        step()
        settings = provider.settings(inputs)
        if settings:
            seconds = []
            for provider.setting in settings:
                step()
                step.release()
                seconds.append(timing.time_call(step, device))
            provider.setting = settings[seconds.index(min(seconds))]
            step()
        entrant.setting = "" if provider.setting is None else str(provider.setting)
        wrong = beyond_limits(entrant.errors, dtype) or objection(step, dtype)
        if wrong is not None:
            entrant.status = wrong
            return entrant
        results = step.results().bytes()
        step.release()
        empty_cache(device)
        entrant.extra_bytes = timing.peak_bytes(step, device) - results
        step.release()
        entrant.call_s = timing.time_call(step, device)
    except torch.OutOfMemoryError:
        entrant.status = "out of memory"
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        entrant.status = f"failed: {type(error).__name__}: {first}"
    finally:
        entrant.release()
        empty_cache(device)
    return entrant


@functools.cache
def errors_on(
    small: Shape,
    name: str,
    form: str,
    with_entropy: bool,
    softcap: float | None,
    dtype: torch.dtype,
    device: str,
) -> Errors:
    """The errors of a provider on the small shape, which is the same one for every timed shape."""
    inputs = make_inputs(small, dtype, device)
    inputs.softcap = softcap
    if form == "known_coefficients":
        inputs.lse = earlier_lse(inputs)
    return errors(Step(PROVIDERS[name](), form, inputs, with_entropy=with_entropy))


def enter_floor(form: str, inputs: Inputs, device: str) -> Entrant:
    entrant = Entrant(GemmFloor.name)
    n, v = inputs.hidden.shape[0], inputs.weight.shape[0]
    most = FLOOR_TILE_BYTES // (n * inputs.hidden.element_size())
    blocks = [block for block in (4096, 16384, v) if block <= max(most, 4096)]
    try:
        floor = GemmFloor(form, inputs, blocks)
        entrant.setting = floor.tune(lambda call: timing.time_call(call, device))
        entrant.whole = floor
        entrant.call_s = timing.time_call(floor, device)
    except torch.OutOfMemoryError:
        entrant.status = "out of memory"
    return entrant


def earlier_lse(inputs: Inputs) -> torch.Tensor:
    """(N,): what known_coefficients takes from the pass that its coefficients came from."""
    with torch.no_grad():
        return linear_logprobs_with_stats(
            inputs.hidden, inputs.weight, inputs.targets, softcap=inputs.softcap
        ).lse


def empty_cache(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def calls_for(entrant: Entrant, repetitions: int, seconds: float) -> int:
    """As many calls as asked for, or as fit into `seconds`, but not fewer than FEWEST_CALLS."""
    fitting = int(seconds / max(entrant.call_s, 1e-9))
    return min(repetitions, max(fitting, FEWEST_CALLS))


def time_in_turn(
    entrants: list[Entrant], form: str, repetitions: int, seconds: float, device: str
) -> None:
    """Fills `seconds` of every entrant whose status is ok, a few calls of each after the other's.

    A turn begins with a call that is not timed: the allocator may have to give back what it keeps
    from the last provider, which stops the GPU.
    """
    for start in range(0, repetitions, CALLS_A_TURN):
        ready = [
            entrant
            for entrant in entrants
            if entrant.status == "ok" and start < calls_for(entrant, repetitions, seconds)
        ]
        first = start // CALLS_A_TURN % max(len(ready), 1)
        for entrant in ready[first:] + ready[:first]:
            last = min(start + CALLS_A_TURN, calls_for(entrant, repetitions, seconds))
            try:
                time_phase(entrant, "whole", device)
                for phase in PHASES[form]:
                    if phase == "backward" and entrant.step is None:
                        continue
                    times = entrant.seconds.setdefault(phase, [])
                    times += [time_phase(entrant, phase, device) for _ in range(start, last)]
            except torch.OutOfMemoryError:  # beside the others' inputs and settings
                entrant.status = "out of memory"
            finally:
                entrant.release()


def time_phase(entrant: Entrant, phase: str, device: str) -> float:
    """Seconds of one call, without what comes before and after it."""
    entrant.release()
    if phase == "backward" and entrant.step is not None:
        entrant.step.forward()
        return timing.time_call(entrant.step.backward, device)
    assert entrant.whole is not None, f"{entrant.name} was not made ready"
    return timing.time_call(entrant.whole, device)


def rows_of(
    entrant: Entrant, form: str, with_entropy: bool, shape: Shape, dtype: torch.dtype
) -> list[Row]:
    """A row for each phase; where there is no time, one that says why."""
    rows = []
    known = PROVIDERS.get(entrant.name)
    for phase in PHASES[form] if entrant.status == "ok" else PHASES[form][:1]:
        seconds = entrant.seconds.get(phase)
        if entrant.status == "ok" and not seconds:
            continue  # the floor has no backward pass
        took = timing.summary(seconds) if seconds and entrant.status == "ok" else None
        gemms = algorithmic_gemms(form, phase)
        rows.append(
            Row(
                head=shape.head.name,
                form=form,
                tokens=shape.tokens,
                phase=phase,
                provider=entrant.name,
                with_entropy=with_entropy,
                dtype=next(name for name in DTYPES if DTYPES[name] == dtype),
                hidden_size=shape.head.hidden_size,
                vocabulary=shape.head.vocabulary,
                status=entrant.status,
                n=0 if took is None else took.n,
                median_ms=None if took is None else 1e3 * took.median_s,
                p20_ms=None if took is None else 1e3 * took.p20_s,
                p80_ms=None if took is None else 1e3 * took.p80_s,
                tflops=None if took is None else gemms * shape.gemm_flop() / took.median_s / 1e12,
                algorithmic_gemms=gemms,
                extra_mb=None if entrant.extra_bytes is None else entrant.extra_bytes / 1e6,
                **asdict(entrant.errors),
                setting=entrant.setting,
                versions="" if known is None or known.missing() else known.versions(),
            )
        )
    return rows


def measure(
    shape: Shape,
    form: str,
    providers: list[str],
    *,
    dtype: torch.dtype,
    with_entropy: bool,
    repetitions: int,
    seconds: float,
    device: str,
    small: Shape = ACCURACY_SHAPE,
) -> list[Row]:
    """The rows of one shape and form.

    Args:
        providers: keys of benchmarks.head.providers.base.PROVIDERS; the floor comes by itself.
        repetitions, seconds: calls of each provider, fewer if they take longer than that.
        small: the shape on which errors are measured, with the timed head's softcap.
    """
    empty_cache(device)
    try:
        inputs = make_inputs(shape, dtype, device)
        if form == "known_coefficients":
            inputs.lse = earlier_lse(inputs)
    except torch.OutOfMemoryError:
        entrants = [Entrant(name, "out of memory: the inputs alone") for name in providers]
    else:
        entrants = [enter_floor(form, inputs, device)]
        entrants += [enter(name, form, with_entropy, inputs, device, small) for name in providers]
        time_in_turn(entrants, form, repetitions, seconds, device)
    return [row for e in entrants for row in rows_of(e, form, with_entropy, shape, dtype)]


# --- The run --------------------------------------------------------------------------------------


def print_row(row: Row) -> None:
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


def plot(rows: list[Row], head: str, form: str, title: str, path: Path) -> None:
    """Time (p20 to p80 shaded) and extra memory against N, a line a provider, the floor dashed."""
    from matplotlib.figure import Figure

    from benchmarks.measure.plots import FORM_TITLES, colour, plot_lines

    chosen = [r for r in rows if (r.head, r.form, r.phase) == (head, form, "whole")]
    times: dict[str, list[tuple[float, float]]] = {}
    memory: dict[str, list[tuple[float, float]]] = {}
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in chosen:
        if row.median_ms is not None:
            times.setdefault(row.provider, []).append((row.tokens, row.median_ms))
        if row.extra_mb is not None and row.extra_mb > 0.0:  # a log axis has no place for less
            memory.setdefault(row.provider, []).append((row.tokens, row.extra_mb))
    for name in times:
        band = [(r.tokens, r.p20_ms, r.p80_ms) for r in chosen if r.provider == name and r.n > 0]
        left.fill_between(*zip(*band, strict=True), color=colour(name), alpha=0.15, linewidth=0)
    lengths = sorted({row.tokens for row in chosen})
    for axes, curves, label in (
        (left, times, "median time, ms"),
        (right, memory, "extra memory, MB"),
    ):
        if not curves:
            axes.set_axis_off()
            continue
        plot_lines(axes, curves, xlabel="tokens N", ylabel=label, title=label)
        axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
        axes.xaxis.minorticks_off()
    full: dict[str, int] = {}
    for row in chosen:
        if row.status.startswith("out of memory"):
            full.setdefault(row.provider, row.tokens)
    notes = [f"{name} from N={tokens}" for name, tokens in full.items()]
    figure.suptitle(f"{head}, {FORM_TITLES[form]}: {title}", fontsize=10)
    if notes:
        figure.supxlabel(f"out of memory: {', '.join(notes)}", fontsize=8)
    figure.savefig(path, dpi=110)


@contextmanager
def each_shape_compiled_apart(providers: list[str]) -> Iterator[None]:
    """Inside, torch.compile makes no program that serves several shapes, and as many as needed."""
    if not set(providers) & set(COMPILED):
        yield  # and spares the import
        return
    import torch._dynamo.config

    with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):
        yield


def shapes_of(heads: list[str], tokens: list[int], smoke: bool) -> list[Shape]:
    table: dict[str, Head] = HEADS
    if smoke:
        table = {shape.head.name: shape.head for shape in (SMOKE_SHAPE, SMOKE_SOFTCAP_SHAPE)}
        heads = list(table)
    return [Shape(f"{name}-{n}", n, table[name]) for name in heads for n in tokens]


def other_rows(
    path: Path, shapes: list[Shape], forms: list[str]
) -> list[tuple[Row, dict[str, str]]]:
    """The rows of the CSV, if there is one, that these shapes and forms do not measure again."""
    if not path.exists():
        return []
    again = {(shape.head.name, shape.tokens, form) for shape in shapes for form in forms}
    from benchmarks.measure.plots import read_csv

    lines = read_csv(path)
    return [(row, line) for line in lines if (row := parsed(Row, line)).case() not in again]


def start_csv(path: Path, kept: list[tuple[Row, dict[str, str]]], facts: list[str]) -> None:
    """The headings and the kept rows, put in the place of the old file in one step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*column_names(Row), *facts])
    for row, line in kept:
        writer.writerow([*texts(row), *(line.get(name, "") for name in facts)])
    durable.replace(path, text.getvalue())


def main(arguments: list[str] | None = None) -> int:
    """The process's exit status: 1 if ours failed or was wrong somewhere, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head", nargs="+", choices=HEADS, default=list(GPU_HEADS))
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--with-entropy", action="store_true", help="entropies and their gradient")
    parser.add_argument("--repetitions", type=int, help="calls of each provider, at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the calls of each")
    parser.add_argument("--append", action="store_true", help="keep the CSV's other rows")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU without a GPU")
    options = parser.parse_args(arguments)
    if not options.smoke and not torch.cuda.is_available():
        print(
            "bench_linear_logprobs: torch finds no GPU here; run it on a machine with one, or add "
            "--smoke to run its code on this CPU",
            file=sys.stderr,
        )
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = options.tokens or list(SMOKE_TOKENS if options.smoke else GPU_TOKENS)
    repetitions = options.repetitions or (3 if options.smoke else 20)
    skipped = COMPILED if options.smoke else ()
    providers = options.provider or [name for name in PROVIDERS if name not in skipped]
    facts = timing.machine_facts(device)
    where = facts.get("gpu", facts["cpu"])
    for name in providers:
        if (absent := PROVIDERS[name].missing()) is not None:
            print(f"{name}: {absent}")
    print_header()

    shapes = shapes_of(options.head, tokens, options.smoke)
    options.results.mkdir(parents=True, exist_ok=True)
    stem = "bench_linear_logprobs" + ("_smoke" if options.smoke else "")
    stem += "" if options.dtype == "bf16" else f"_{options.dtype}"
    stem += "_entropy" if options.with_entropy else ""
    path = options.results / f"{stem}.csv"
    kept = other_rows(path, shapes, options.form) if options.append else []
    start_csv(path, kept, list(facts))
    rows: list[Row] = []
    with path.open("a", newline="") as file, each_shape_compiled_apart(providers):
        writer = csv.writer(file, lineterminator="\n")
        for shape in shapes:
            if set(providers) & set(COMPILED):
                torch.compiler.reset()  # the programs of the last shape
            for form in options.form:
                if options.with_entropy and form == "known_coefficients":
                    continue  # its sum has no entropy
                found = measure(
                    shape,
                    form,
                    providers,
                    dtype=DTYPES[options.dtype],
                    with_entropy=options.with_entropy,
                    repetitions=repetitions,
                    seconds=options.seconds,
                    device=device,
                    small=SMOKE_SHAPE if options.smoke else ACCURACY_SHAPE,
                )
                if device == "cuda":
                    facts |= timing.gpu_facts()  # the clocks after this load
                for row in found:
                    print_row(row)
                    writer.writerow([*texts(row), *facts.values()])
                file.flush()
                rows += found
    title = f"{where}, torch {facts['torch']}, {options.dtype}, commit {facts['commit']}"
    title += " and earlier runs" if kept else ""
    for head in dict.fromkeys(row.head for row in rows):
        for form in dict.fromkeys(row.form for row in rows):
            shown = [row for row, _ in kept] + rows
            plot(shown, head, form, title, options.results / f"{stem}_{head}_{form}.png")
    print(f"written to {options.results}: {path.name} and a plot for each head and form")
    bad = [r for r in rows if r.provider == "ours" and r.status.startswith(("wrong", "failed"))]
    for row in bad:
        print(f"ours, {row.head}, N={row.tokens}, {row.form}: {row.status}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
