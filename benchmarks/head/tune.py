"""Searches the tiles of a head kernel on this GPU; prints a row for agro_kernels/tiles.py.

    python -m benchmarks.head.tune --kernel linear_logprobs_fwd --dtype bf16
        --head llama3-8b qwen3-8b [--smallest-d 2049] [--tokens 2048 8192 32768] [--pointers]
        [--quick] [--workers 16] [--results FOLDER]
    python -m benchmarks.head.tune --smoke      its code, under Triton's interpreter

The heads stand for the range of hidden sizes of one row, the tokens for all batches. A tile is
judged by its times for all of them together, because no row of tiles.py may depend on the number
of tokens: a row that was best for some batches would have to serve the rest too.

Method. Every tile that fits shared memory and registers runs on a small shape first; one whose
errors against float64 are more than 4 times the shipped row's is rejected. The rest is timed on
each head and number of tokens beside the shipped row, in turn, each time after a call that is not
timed: a GPU at its power limit carries the clock of one program into the next. The score is the
geometric mean of the times over the shipped row's. Then group_n and max_splits are varied for the
best tiles.
--pointers leaves out tensor descriptors: for the row of weights that descriptors cannot address.
--quick keeps the tiles of 128 or 256 by 128 or 256, 64 deep, in three or four stages, and varies
nothing: a minute.
Compiling is most of a search, so several processes do it beforehand, into Triton's cache on disk.

The forward pass is timed with the entropy. The backward pass is asked for the bias's gradient
alone: that launches the kernel and none of the library's products, which no tile changes.

All candidates go to tune_KERNEL_ARCHITECTURE_DTYPE.csv. After pasting a row, run
benchmarks.predict.compile_report and commit both files with it.

    0.93  128x256x64 w8 s4 group 16 splits 16 descriptors
    # NVIDIA H100 80GB HBM3, ..., commit 1a2b3c4: 0.93 of the time of the row before
    Row(TileConfig(128, 256, 64, 8, 4, descriptors=True), smallest_d=2049),
"""

import argparse
import csv
import math
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from agro_kernels.tiles import TileConfig, architecture
from benchmarks.head.tune_kernel import KERNELS, describe
from benchmarks.head.tune_search import REPETITIONS, SMOKE, Candidate, search
from benchmarks.measure import timing
from benchmarks.measure.arguments import kernels_device, lacks_gpu
from benchmarks.measure.dtypes import DTYPES
from benchmarks.measure.rows import RESULTS
from benchmarks.measure.shapes import HEADS, Head, Shape

TOKENS = (2048, 8192, 32768)
SMOKE_TOKENS = (5, 33)
WORKERS = min(16, os.cpu_count() or 1)  # each with a weight of its own on the GPU


def main(arguments: list[str] | None = None) -> int:
    """The process's exit status: 2 where there is no GPU, and for wrong arguments."""
    options = parse(arguments)
    next_step = (
        ", and tiles are tuned on the GPU that they are for; run it there, or add --smoke to run "
        "its code on this CPU"
    )
    if lacks_gpu("benchmarks.head.tune", next_step, smoke=options.smoke):
        return 2
    device = kernels_device(smoke=options.smoke)

    heads = heads_of(options)
    tokens = options.tokens or (SMOKE_TOKENS if options.smoke else TOKENS)
    kind = architecture(torch.device(device))
    found = search(
        options.kernel,
        kind,
        [Shape(f"{head.name} N={n}", n, head) for head in heads for n in tokens],
        DTYPES[options.dtype],
        device,
        repetitions=1 if options.smoke else REPETITIONS,
        pointers=options.pointers,
        quick=options.quick,
        workers=options.workers if device == "cuda" else 0,
    )
    for candidate in found:
        result = candidate.status if candidate.score is None else f"{candidate.score:.3f}"
        print(f"{result}  {describe(candidate.tile)}")
    facts = timing.machine_facts(device)
    stem = f"tune_{options.kernel}_{kind}_{options.dtype}"
    path = options.results / f"{stem}{'_pointers' if options.pointers else ''}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(found, facts, path)
    place = f"TILES[{options.kernel!r}][{kind!r}][{DTYPES[options.dtype].itemsize}]"
    smallest_d = options.smallest_d or min(head.hidden_size for head in heads)
    print_best(found, facts, place, smallest_d, path.name)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", choices=KERNELS, default=KERNELS[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--head", nargs="+", choices=HEADS, default=["llama3-8b"])
    parser.add_argument("--smallest-d", type=int, help="of the row; default: the heads' smallest")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--pointers", action="store_true", help="no tensor descriptors")
    parser.add_argument("--quick", action="store_true", help="only the likely tiles")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes that compile")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    options = parser.parse_args(arguments)
    if not options.smoke and len({HEADS[name].softcap is None for name in options.head}) > 1:
        parser.error("--head: expected heads that all have a softcap or none, got both sorts")
    return options


def heads_of(options: argparse.Namespace) -> list[Head]:
    """The heads that the row is for."""
    return [SMOKE.head] if options.smoke else [HEADS[name] for name in options.head]


# --- What is shown and written --------------------------------------------------------------------


def print_best(
    found: Sequence[Candidate], facts: dict[str, str], place: str, smallest_d: int, csv_name: str
) -> None:
    """The row to paste, and the comment that says where it was measured.

    found: the shipped row first. place: where in tiles.py the row goes.
    """
    best = min((c for c in found if c.score is not None), key=lambda c: c.score or math.inf)
    where = f"{facts.get('gpu', facts['cpu'])}, torch {facts['torch']}, triton {facts['triton']}"
    print(f"\ntiles.{place}:")
    print(f"# {where}, commit {facts['commit']};")
    print(f"# {csv_name}:")
    print(f"# {best.score:.3f} of the time of {describe(found[0].tile)}")
    print(row_to_paste(best.tile, smallest_d))


def row_to_paste(tile: TileConfig, smallest_d: int) -> str:
    """The line of tiles.TILES, with what differs from the defaults."""
    values = [str(getattr(tile, name)) for name in
              ("block_n", "block_v", "block_d", "num_warps", "num_stages")]  # fmt: skip
    values += [
        f"{item.name}={getattr(tile, item.name)}"
        for item in fields(TileConfig)
        if item.name in ("group_n", "max_splits", "descriptors")
        and getattr(tile, item.name) != item.default
    ]
    start = "" if smallest_d == 1 else f", smallest_d={smallest_d}"
    return f"Row(TileConfig({', '.join(values)}){start}),"


def write_csv(found: Sequence[Candidate], facts: dict[str, str], path: Path) -> None:
    """A line a candidate: its tile, its result, its median time on each shape, the machine.

    found: the shipped row first.
    """
    shapes = list(found[0].seconds)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [*(item.name for item in fields(TileConfig)), "status", "error", "score"]
            + [f"ms {shape.name}" for shape in shapes]
            + list(facts)
        )
        for candidate in found:
            times = [candidate.seconds.get(shape) for shape in shapes]
            writer.writerow(
                [getattr(candidate.tile, item.name) for item in fields(TileConfig)]
                + [candidate.status, candidate.error, candidate.score]
                + ["" if not t else 1e3 * statistics.median(t) for t in times]
                + list(facts.values())
            )


if __name__ == "__main__":
    sys.exit(main())
