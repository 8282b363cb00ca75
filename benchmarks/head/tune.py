"""Searches the tiles of a head kernel on this GPU; prints a row for agro_kernels/tiles.py.

    python -m benchmarks.tune_linear_logprobs --kernel linear_logprobs_fwd --dtype bf16
        --head llama3-8b qwen3-8b [--smallest-d 2049] [--tokens 2048 8192 32768] [--pointers]
        [--quick] [--workers 16] [--results FOLDER]
    python -m benchmarks.tune_linear_logprobs --smoke      its code, under Triton's interpreter

The heads stand for the range of hidden sizes of one row, the tokens for all batches. A tile is
judged by its times for all of them together, because tiles.py lets nothing depend on the number
of tokens: a row that was best for some of them would have to serve the rest too.

Method. Every tile that shared memory and registers have room for runs on a small shape first; one
whose errors against float64 are more than 4 times the shipped row's is out. The rest is timed on
each head and number of tokens beside the shipped row, in turn, each time after a call that is not
timed: a GPU at its power limit carries the clock of one program into the next. The score is the
geometric mean of the times over the shipped row's. Then group_n and max_splits are varied for the
best tiles.
--pointers leaves tensor descriptors out: for the row that serves a weight they cannot stand for.
--quick keeps the tiles of 128 or 256 by 128 or 256, 64 deep, in three or four stages, and varies
nothing: a minute.
Compiling is most of a search, so several processes do it beforehand, into Triton's cache on disk.

The forward pass is timed with the entropy. The backward pass is asked for the bias's gradient
alone: that launches the kernel and none of the library's products, which no tile changes.

All candidates go to tune_linear_logprobs_KERNEL_ARCHITECTURE_DTYPE.csv. After pasting a row, run
benchmarks.compile_report and commit both files with it.

    0.93  128x256x64 w8 s4 group 16 splits 16 descriptors
    # NVIDIA H100 80GB HBM3, ..., commit 1a2b3c4: 0.93 of the time of the row before
    Row(TileConfig(128, 256, 64, 8, 4, descriptors=True), smallest_d=2049),
"""

import argparse
import csv
import itertools
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agro_kernels import reference
from agro_kernels import tiles as configs
from agro_kernels.head import Head as OpHead
from agro_kernels.head import Upstream
from agro_kernels.tiles import TileConfig
from benchmarks.head.providers.base import Inputs, make_inputs
from benchmarks.measure import timing
from benchmarks.measure.shapes import HEADS, Head, Shape

KERNELS = ("linear_logprobs_fwd", "linear_logprobs_bwd")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = (2048, 8192, 32768)
# Architectures on which Triton fetches through tensor descriptors (TMA).
WITH_DESCRIPTORS = ("sm90", "sm100", "interpreter")
# Elements of the fp32 accumulator that one thread may hold, of its 255 registers. AMD's have 512.
MOST_ACCUMULATORS = {"gfx942": 256, "gfx950": 256}
MOST_ACCUMULATORS_ELSEWHERE = 128
REPETITIONS = 10
REFINED = 3  # of the best tiles, for which group_n and max_splits are varied
WORKERS = min(16, os.cpu_count() or 1)  # each with a weight of its own on the GPU
COMPILED_TOKENS = 64  # of the call that compiles: the code does not depend on their number
ERROR_SLACK = 4.0  # between two orders of a sum, the largest of many errors varies by about two
# The errors are measured on these; no size is a multiple of a tile's.
SMALL = Shape("small", 257, Head("small", 0, 1031))  # with the hidden size that is tuned for
SMOKE = Shape("smoke", 20, Head("smoke", 24, 70))  # interpreted, a tile takes milliseconds


@dataclass
class Candidate:
    """A tile, how wrong it is and how long it takes: status "ok", or why it is out."""

    tile: TileConfig
    status: str = "ok"
    error: float | None = None  # largest difference from float64
    seconds: dict[Shape, list[float]] = field(default_factory=dict)
    score: float | None = None  # over the shipped row's time; below 1.0 is faster


# --- Which tiles ----------------------------------------------------------------------------------


def candidates(
    architecture: str,
    itemsize: int,
    hidden_size: int,
    pointers: bool = False,
    quick: bool = False,
) -> list[TileConfig]:
    """The tiles that fit the architecture, group_n and max_splits left at their defaults."""
    if architecture == "interpreter":
        grid = itertools.product((16,), (16, 32), (16,), (1,), (1,))
    elif quick:
        grid = itertools.product((128, 256), (128, 256), (64,), (4, 8), (3, 4))
    else:
        grid = itertools.product(
            (64, 128, 256), (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5)
        )
    most = MOST_ACCUMULATORS.get(architecture, MOST_ACCUMULATORS_ELSEWHERE)
    limit = configs.SHARED_BYTES.get(architecture, configs.SHARED_BYTES["other"])
    lanes = 64 if architecture.startswith("gfx") else 32
    found = []
    for sizes in grid:
        for descriptors in (False, True):
            tile = TileConfig(*sizes, descriptors=descriptors)
            accumulators = tile.block_n * tile.block_v // (tile.num_warps * lanes)
            describable = architecture in WITH_DESCRIPTORS and hidden_size * itemsize % 16 == 0
            describable = describable and not pointers
            if (
                tile.shared_bytes(itemsize) <= limit
                and accumulators <= most
                and (describable or not descriptors)
            ):
                found.append(tile)
    return found


def variations(kernel: str, architecture: str, tile: TileConfig) -> list[TileConfig]:
    """The tile in other orders over the vocabulary; only the forward pass splits it."""
    groups, splits = (
        ((2,), (2,)) if architecture == "interpreter" else ((4, 8, 16, 32), (8, 16, 32))
    )
    if kernel != "linear_logprobs_fwd":
        splits = (tile.max_splits,)
    varied = [replace(tile, group_n=g, max_splits=parts) for g in groups for parts in splits]
    return [other for other in varied if other != tile]


@contextmanager
def instead_of_shipped(kernel: str, tile: TileConfig) -> Iterator[None]:
    """Inside, the launches of a kernel get this tile, whatever tiles.py has for them."""
    select = configs.select

    def chosen(name: str, *arguments: Any, **options: Any) -> TileConfig:
        if name == kernel:
            return tile
        return select(name, *arguments, **options)

    setattr(configs, "select", chosen)  # noqa: B010  (an assignment would be checked as a mistake)
    try:
        yield
    finally:
        setattr(configs, "select", select)  # noqa: B010


# --- Compiling ------------------------------------------------------------------------------------


def compile_ahead(
    kernel: str,
    tiles: Sequence[TileConfig],
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    workers: int,
) -> None:
    """Leaves the code of all tiles in Triton's cache on disk, a process for several at a time."""
    heads = {shape.head: replace(shape, tokens=COMPILED_TOKENS) for shape in shapes}
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tiles)), mp_context=spawned) as pool:
        futures = [
            pool.submit(compile_one, kernel, tile, list(heads.values()), dtype) for tile in tiles
        ]
    for tile, future in zip(tiles, futures, strict=True):
        if (error := future.exception()) is not None:
            print(f"{describe(tile)}: not compiled ahead, its process ended: {error}")


def compile_one(kernel: str, tile: TileConfig, shapes: Sequence[Shape], dtype: torch.dtype) -> None:
    """A tile that is refused here is refused again, and then reported, where it is checked."""
    for shape in shapes:
        with refusals_of(Candidate(tile)), instead_of_shipped(kernel, tile):
            call_of(kernel, make_inputs(shape, dtype, "cuda"))()
            torch.cuda.synchronize()


# --- One kernel -----------------------------------------------------------------------------------


def call_of(kernel: str, inputs: Inputs) -> Callable[[], Tensor]:
    """Launches the kernel on these inputs and returns what is to be compared."""
    # Not on import: a smoke run tells Triton first that its kernels are to be interpreted.
    from agro_kernels._triton import linear_logprobs

    head = OpHead.of(inputs.hidden, inputs.weight, inputs.targets, softcap=inputs.softcap)
    if kernel == "linear_logprobs_fwd":
        return lambda: torch.stack(linear_logprobs.linear_logprobs_fwd(head, with_entropy=True))
    _, lse, _ = linear_logprobs.linear_logprobs_fwd(head, with_entropy=False)
    upstream = Upstream(inputs.coefficients, None, None, lse, None)
    only_bias = [False, False, True]
    return lambda: linear_logprobs.linear_logprobs_bwd(upstream, head, only_bias)[2]


def truth_of(kernel: str, inputs: Inputs) -> Tensor:
    """What `call_of` returns, in float64."""
    bias = torch.zeros(
        inputs.weight.shape[0], dtype=torch.float64, device=inputs.weight.device
    ).requires_grad_()
    logprobs, entropy, lse = reference.linear_logprobs_with_stats(
        inputs.hidden.double(),
        inputs.weight.double(),
        inputs.targets,
        bias=bias,
        softcap=inputs.softcap,
    )
    if kernel == "linear_logprobs_fwd":
        return torch.stack([logprobs, lse, entropy]).detach()
    (dbias,) = torch.autograd.grad((logprobs * inputs.coefficients.double()).sum(), bias)
    return dbias


def error_of(kernel: str, tile: TileConfig, inputs: Inputs, truth: Tensor) -> float:
    """The largest error of a tile, NaN counted as infinite."""
    with instead_of_shipped(kernel, tile):
        result = call_of(kernel, inputs)().double()
    return float((result - truth).abs().nan_to_num(nan=torch.inf).max())


def check(kernel: str, candidate: Candidate, inputs: Inputs, truth: Tensor, allowed: float) -> None:
    """Puts out a candidate that cannot run or is less exact than it may be."""
    with refusals_of(candidate):
        candidate.error = error_of(kernel, candidate.tile, inputs, truth)
        if candidate.error > allowed:
            candidate.status = f"wrong: error {candidate.error:.1e} > {allowed:.1e}"


@contextmanager
def refusals_of(candidate: Candidate) -> Iterator[None]:
    """What is raised inside becomes the candidate's status.

    A compiler's reasons to refuse a tile are of many types; none of them may end the search.
    """
    try:
        yield
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:200]
        candidate.status = f"refused: {type(error).__name__}: {first}"


def time_all(
    kernel: str,
    shipped: Candidate,
    found: Sequence[Candidate],
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: str,
    repetitions: int,
) -> None:
    """Fills seconds and score of the candidates that are ok, in turn with the shipped row."""
    shipped.seconds = {}
    for shape in shapes:
        inputs = make_inputs(shape, dtype, device)
        call = call_of(kernel, inputs)
        for repetition in range(repetitions):
            running = [shipped, *(candidate for candidate in found if candidate.status == "ok")]
            first = repetition * len(running) // repetitions
            for candidate in running[first:] + running[:first]:
                refusals = nullcontext() if candidate is shipped else refusals_of(candidate)
                with refusals, instead_of_shipped(kernel, candidate.tile):
                    call()  # compiles, and brings the clock to where this tile leaves it
                    seconds = timing.time_call(call, device)
                    candidate.seconds.setdefault(shape, []).append(seconds)
        del inputs, call
    for candidate in [shipped, *found]:
        if candidate.status == "ok":
            candidate.score = score_of(candidate, shipped, shapes)


def score_of(candidate: Candidate, shipped: Candidate, shapes: Sequence[Shape]) -> float:
    """Geometric mean over the shapes of the median time over the shipped row's."""
    ratios = [
        statistics.median(candidate.seconds[shape]) / statistics.median(shipped.seconds[shape])
        for shape in shapes
    ]
    return math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))


def search(
    kernel: str,
    architecture: str,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    device: str,
    repetitions: int = REPETITIONS,
    pointers: bool = False,
    quick: bool = False,
    workers: int = 0,
) -> list[Candidate]:
    """All candidates, the shipped row first, then the fastest first, then those that are out.

    The shapes' heads have to agree on the softcap: a row serves calls with one or without. With
    workers that many processes compile.
    """
    itemsize = dtype.itemsize
    smallest = min(shapes, key=lambda shape: shape.head.hidden_size).head
    shipped = Candidate(
        configs.select(
            kernel,
            architecture,
            itemsize,
            smallest.hidden_size,
            aligned=not pointers,
            softcap=smallest.softcap is not None,
        )
    )
    head = replace(SMALL.head, hidden_size=smallest.hidden_size, softcap=smallest.softcap)
    small_shape = SMOKE if architecture == "interpreter" else replace(SMALL, head=head)
    small = make_inputs(small_shape, dtype, device)
    truth = truth_of(kernel, small)
    shipped.error = error_of(kernel, shipped.tile, small, truth)
    eps = torch.finfo(torch.float32).eps
    allowed = ERROR_SLACK * shipped.error + float(truth.abs().max()) * eps

    def try_all(tiles: Sequence[TileConfig]) -> list[Candidate]:
        new = [Candidate(tile) for tile in tiles if tile != shipped.tile]
        if workers > 0 and new:
            todo = [candidate.tile for candidate in new]
            compile_ahead(kernel, todo, [small_shape, *shapes], dtype, workers)
        for candidate in new:
            check(kernel, candidate, small, truth, allowed)
        time_all(kernel, shipped, new, shapes, dtype, device, repetitions)
        return new

    def fastest(found: Sequence[Candidate]) -> list[Candidate]:
        return sorted(found, key=lambda candidate: (candidate.score is None, candidate.score or 0))

    found = try_all(candidates(architecture, itemsize, smallest.hidden_size, pointers, quick))
    if quick:
        return [shipped, *fastest(found)]
    best = [c for c in fastest([shipped, *found]) if c.status == "ok"][:REFINED]
    known = {candidate.tile for candidate in found}
    varied = dict.fromkeys(v for c in best for v in variations(kernel, architecture, c.tile))
    found += try_all([tile for tile in varied if tile not in known])
    return [shipped, *fastest(found)]


# --- The run --------------------------------------------------------------------------------------


def describe(tile: TileConfig) -> str:
    text = f"{tile.block_n}x{tile.block_v}x{tile.block_d} w{tile.num_warps} s{tile.num_stages}"
    text += f" group {tile.group_n} splits {tile.max_splits}"
    return text + (" descriptors" if tile.descriptors else "")


def row_to_paste(tile: TileConfig, smallest_d: int) -> str:
    """The line of configs.TILES, with what differs from the defaults."""
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


def main(arguments: list[str] | None = None) -> int:
    """The process's exit status: 2 where there is no GPU, and for wrong arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=KERNELS, default=KERNELS[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--head", nargs="+", choices=HEADS, default=["llama3-8b"])
    parser.add_argument("--smallest-d", type=int, help="of the row; default: the heads' smallest")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--pointers", action="store_true", help="no tensor descriptors")
    parser.add_argument("--quick", action="store_true", help="only the likely tiles")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes that compile")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    options = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    if not options.smoke and not has_gpu:
        print(
            "tune_linear_logprobs: torch finds no GPU here, and tiles are tuned on the GPU that "
            "they are for; run it there, or add --smoke to run its code on this CPU",
            file=sys.stderr,
        )
        return 2
    device = "cuda" if has_gpu and not options.smoke else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from agro_kernels._triton.launch import architecture

    heads = [SMOKE.head] if options.smoke else [HEADS[name] for name in options.head]
    if len({head.softcap is None for head in heads}) > 1:
        parser.error("--head: expected heads that all have a softcap or none, got both sorts")
    tokens = options.tokens or ([5, 33] if options.smoke else TOKENS)
    shapes = [Shape(f"{head.name} N={n}", n, head) for head in heads for n in tokens]
    kind = architecture(torch.device(device))
    repetitions = 1 if options.smoke else REPETITIONS
    dtype = DTYPES[options.dtype]
    found = search(
        options.kernel,
        kind,
        shapes,
        dtype,
        device,
        repetitions,
        options.pointers,
        options.quick,
        workers=options.workers if device == "cuda" else 0,
    )
    for candidate in found:
        result = candidate.status if candidate.score is None else f"{candidate.score:.3f}"
        print(f"{result}  {describe(candidate.tile)}")
    facts = timing.machine_facts(device)
    options.results.mkdir(parents=True, exist_ok=True)
    stem = f"tune_{options.kernel}_{kind}_{options.dtype}"
    path = options.results / f"{stem}{'_pointers' if options.pointers else ''}.csv"
    write_csv(found, facts, path)
    best = min((c for c in found if c.score is not None), key=lambda c: c.score or math.inf)
    where = f"{facts.get('gpu', facts['cpu'])}, torch {facts['torch']}, triton {facts['triton']}"
    print(f"\nconfigs.TILES[{options.kernel!r}][{kind!r}][{dtype.itemsize}]:")
    print(f"# {where}, commit {facts['commit']};")
    print(f"# {path.name}:")
    print(f"# {best.score:.3f} of the time of {describe(found[0].tile)}")
    smallest_d = options.smallest_d or min(head.hidden_size for head in heads)
    print(row_to_paste(best.tile, smallest_d))
    return 0


if __name__ == "__main__":
    sys.exit(main())
