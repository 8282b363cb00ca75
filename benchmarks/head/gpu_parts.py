"""Where does the head's time go on this GPU, and which choices make it shorter?

    python -m benchmarks.head.gpu_parts [--head llama3-8b llama3-1b] [--tokens 4096 16384]
        [--part forward ...] [--minutes 10] [--results FOLDER]
    python -m benchmarks.head.gpu_parts --smoke    its code, under Triton's interpreter, seconds

One command for one run of ten minutes. It writes into a folder named after the GPU, each row as
soon as it is measured, so that a run which is cut short leaves what it has:

* parts_activity.csv: each kernel and each bare product in a loop of its own, two seconds, with the
  clock and the power of those seconds. flop_per_clock is what a clock achieves: where a kernel's is
  that of the product alone, only the clock makes it slower.
* parts_turns.csv: for each part the shipped way and others, a few calls each in turn, and the
  part's products alone (the matmul lower bound) in the same turns. over_floor is the ratio to
  those; read it and not the milliseconds, since a GPU at its power limit changes its clock from
  minute to minute. difference is the largest from the results of the part's first choice, over
  the largest of those: the same work, in another order of sums.

Parts: forward (flattening, splits of the vocabulary, groups of rows), gradients (columns of a
chunk, the weight's gradient by way of fp32), keeping (none to all of the logits), known (the
target's logit by a kernel or by torch), graphs (launches one by one or in a CUDA graph), sums (the
summed cross-entropy beside the peers; one that is not installed has a row that says so).

The inputs are those of benchmarks.head.gpu. What does not fit into --minutes is left out, heads and
tokens that are named last first, and said at the end.
"""

import argparse
import csv
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import timing
from benchmarks.measure.arguments import kernels_device, lacks_gpu
from benchmarks.measure.clocks import Clocks
from benchmarks.measure.rows import RESULTS, column_names, error_text, texts
from benchmarks.measure.shapes import HEADS, Head, Shape

DEFAULT_HEADS, DEFAULT_TOKENS = ("llama3-8b", "llama3-1b"), (4096, 16384)
# Two chunks of columns under the interpreter, whose tiles are 16 x 32, and nothing divides.
SMOKE = Shape("smoke", 5, Head("smoke", 40, 75))
LOOP_S, CALLS_A_TURN, TURNS = 2.0, 3, 5
PART_NAMES = ("forward", "gradients", "keeping", "known", "graphs", "sums")


@dataclass(frozen=True)
class Activity:
    """A line of parts_activity.csv."""

    head: str
    tokens: int
    what: str
    status: str
    calls: int = 0
    ms: float | None = None  # of a call
    tflops: float | None = None
    sm_clock_mhz: float | None = None
    power_w: float | None = None
    flop_per_clock: float | None = None


@dataclass(frozen=True)
class Turns:
    """A line of parts_turns.csv. The floor is of the same turns."""

    part: str
    head: str
    tokens: int
    choice: str
    status: str
    n: int = 0
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    floor_ms: float | None = None
    over_floor: float | None = None
    difference: float | None = None
    sm_clock_mhz: float | None = None
    power_w: float | None = None


@dataclass
class Run:
    """How long and how often things are measured, and where it is written."""

    device: str
    loop_s: float
    turns: int
    calls: int
    ends: float  # by time.perf_counter
    clocks: Clocks
    facts: dict[str, str]

    def over(self) -> bool:
        return time.perf_counter() > self.ends


def main(arguments: list[str] | None = None) -> int:
    """The process's exit status: 2 where there is no GPU."""
    options = parse(arguments)
    next_step = "; run it on a machine with one, or add --smoke to run its code on this CPU"
    if lacks_gpu("benchmarks.head.gpu_parts", next_step, smoke=options.smoke):
        return 2
    device = kernels_device(smoke=options.smoke)
    facts = timing.machine_facts(device)
    folder = options.results / folder_name(facts)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = [Shape(f"{name}-{n}", n, HEADS[name]) for name in options.head for n in options.tokens]
    ends = time.perf_counter() + 60.0 * options.minutes
    with Clocks(device) as clocks:
        run = Run(
            device,
            loop_s=0.0 if options.smoke else LOOP_S,
            turns=1 if options.smoke else TURNS,
            calls=1 if options.smoke else CALLS_A_TURN,
            ends=ends,
            clocks=clocks,
            facts=facts,
        )
        left_out = measure([SMOKE] if options.smoke else shapes, options.part, run, folder)
    for what in left_out:
        print(f"left out, as {options.minutes} minutes are over: {what}")
    print(f"written to {folder}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--head", nargs="+", choices=HEADS, default=list(DEFAULT_HEADS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(DEFAULT_TOKENS))
    parser.add_argument("--part", nargs="+", choices=PART_NAMES, default=list(PART_NAMES))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="a tiny shape, on a CPU")
    return parser.parse_args(arguments)


def folder_name(facts: dict[str, str]) -> str:
    """Such as "parts_nvidia_h200"."""
    name = re.sub(r"[^a-z0-9]+", "_", facts.get("gpu", "cpu").lower()).strip("_")
    return f"parts_{name}"


def measure(shapes: list[Shape], parts: list[str], run: Run, folder: Path) -> list[str]:
    """Writes both files; returns what there was no time for."""
    # After the environment says whether Triton interprets.
    from benchmarks.head.gpu_choices import PARTS, activity
    from benchmarks.head.providers.base import make_inputs

    left_out = []
    with (
        table(folder / "parts_activity.csv", Activity, run) as write_activity,
        table(folder / "parts_turns.csv", Turns, run) as write_turns,
    ):
        for shape in shapes:
            if run.over():
                left_out.append(shape.name)
                continue
            inputs = make_inputs(shape, torch.bfloat16, run.device)
            if shape == shapes[0]:
                for row in loops(shape, activity(inputs), inputs, run):
                    write_activity(row)
            for part in parts:
                if run.over():
                    left_out.append(f"{shape.name}, {part}")
                    continue
                form, choices = PARTS[part]
                for turns_row in in_turns(part, form, shape, choices, inputs, run):
                    write_turns(turns_row)
    return left_out


@contextmanager
def table(path: Path, kind: Any, run: Run) -> Iterator[Callable[[Any], None]]:
    """A new CSV file, to which the function adds a row, with the facts of the machine, at once."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*column_names(kind), *run.facts])

        def write(row: Any) -> None:
            if run.device == "cuda":
                run.facts |= timing.gpu_facts()  # the clocks of now
            writer.writerow([*texts(row), *run.facts.values()])
            file.flush()
            print("  ".join(text for text in texts(row) if text), flush=True)

        yield write


def loops(
    shape: Shape, calls: dict[str, Callable[[], Any]], inputs: Any, run: Run
) -> Iterator[Activity]:
    """Each call over and over for run.loop_s; its operations are 2 N D and the chunk's columns."""
    from benchmarks.head.gpu_choices import chunk_columns

    columns = min(inputs.weight.shape[0], chunk_columns(inputs))
    flop = 2.0 * shape.tokens * shape.head.hidden_size * columns
    for what, call in calls.items():
        try:
            call()
            wait(run.device)
            start, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - start < run.loop_s:
                call()
                count += 1
                if count % CALLS_A_TURN == 0:
                    wait(run.device)  # else the host would be seconds ahead
            wait(run.device)
            end = time.perf_counter()
        except Exception as error:
            status = f"failed: {error_text(error)}"
            yield Activity(shape.head.name, shape.tokens, what, status)
            continue
        seconds = (end - start) / count
        clock, power = run.clocks.between([(start, end)])
        yield Activity(
            shape.head.name,
            shape.tokens,
            what,
            "ok",
            count,
            1e3 * seconds,
            flop / seconds / 1e12,
            clock,
            power,
            None if clock is None else flop / seconds / (1e6 * clock),
        )


def in_turns(
    part: str,
    form: str,
    shape: Shape,
    choices: Callable[[Any], Any],
    inputs: Any,
    run: Run,
) -> Iterator[Turns]:
    """The choices of a part and its floor, run.calls calls each in turn; a row for each choice.

    Whatever a choice raises is its status: one that fails must not end the run of the others.
    """
    from benchmarks.head.floor import GemmFloor

    status: dict[str, str] = {}
    seconds: dict[str, list[float]] = {}
    spans: dict[str, list[tuple[float, float]]] = {}
    differences: dict[str, float | None] = {}
    ready = {}
    first: Any = None
    for choice in choices(inputs):
        status[choice.name] = choice.reason_against or "ok"
        if choice.reason_against is not None:
            continue
        try:
            with choice.inside():
                results = [None if x is None else x.detach().clone() for x in choice.call()]
        except Exception as error:
            status[choice.name] = f"failed: {error_text(error)}"
            continue
        first = first or results
        differences[choice.name] = difference(results, first)
        ready[choice.name] = choice
    floor = GemmFloor(form, inputs)
    floor.tune(lambda call: timing.time_call(call, run.device))
    floor_s: list[float] = []
    for turn in range(run.turns):
        floor()
        floor_s += timing.time_calls(floor, run.calls, run.device)
        names = list(ready)
        for name in names[turn % max(len(names), 1) :] + names[: turn % max(len(names), 1)]:
            start = time.perf_counter()
            with ready[name].inside():
                ready[name].call()  # not timed: the allocator may give back what others had
                times = timing.time_calls(ready[name].call, run.calls, run.device)
            seconds.setdefault(name, []).extend(times)
            spans.setdefault(name, []).append((start, time.perf_counter()))
    floor_ms = 1e3 * timing.summary(floor_s).median_s
    for name, says in status.items():
        row = (part, shape.head.name, shape.tokens, name)
        if name not in ready:
            yield Turns(*row, says)
            continue
        took = timing.summary(seconds[name])
        yield Turns(
            *row,
            says,
            took.n,
            1e3 * took.median_s,
            1e3 * took.p20_s,
            1e3 * took.p80_s,
            floor_ms,
            1e3 * took.median_s / floor_ms,
            differences[name],
            *run.clocks.between(spans[name]),
        )


def difference(results: list[Any], first: list[Any]) -> float | None:
    """The largest of any result from the same of `first`, over the largest number of that."""
    found = [
        float((ours.double() - other.double()).abs().max() / other.double().abs().max())
        for ours, other in zip(results, first, strict=True)
        if ours is not None and other is not None and ours.numel() > 0
    ]
    return max(found, default=None)


def wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
