"""The search for a tile: which are tried, whether they are right, and how long they take."""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from agro_kernels import tiles
from agro_kernels.tiles import TileConfig
from benchmarks.head.providers.base import Inputs, make_inputs
from benchmarks.head.tune_compile import compile_ahead
from benchmarks.head.tune_kernel import call_of, error_of, instead_of_shipped, truth_of
from benchmarks.measure import timing
from benchmarks.measure.rows import error_text
from benchmarks.measure.shapes import Head, Shape

# Architectures on which Triton fetches through tensor descriptors (TMA).
WITH_DESCRIPTORS = ("sm90", "sm100", "interpreter")
# Elements of the fp32 accumulator that one thread may hold, of its 255 registers. AMD's have 512.
MOST_ACCUMULATORS = {"gfx942": 256, "gfx950": 256}
MOST_ACCUMULATORS_ELSEWHERE = 128
REPETITIONS = 10
REFINED = 3  # of the best tiles, for which group_n and max_splits are varied
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

    Args:
        shapes: what the tiles are timed on. Their heads have to agree on the softcap: a row serves
            calls with one or without.
        repetitions: timed calls of each tile on each shape.
        pointers: leaves out tensor descriptors.
        quick: only the likely tiles, and no variations of the best.
        workers: processes that compile beforehand; 0: each tile is compiled by its first call.
    """
    itemsize = dtype.itemsize
    smallest = min(shapes, key=lambda shape: shape.head.hidden_size).head
    shipped = Candidate(
        tiles.select(
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

    def try_all(wanted: Sequence[TileConfig]) -> list[Candidate]:
        new = [Candidate(tile) for tile in wanted if tile != shipped.tile]
        if workers > 0 and new:
            to_compile = [candidate.tile for candidate in new]
            compile_ahead(kernel, to_compile, [small_shape, *shapes], dtype, workers)
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
    limit = tiles.SHARED_BYTES.get(architecture, tiles.SHARED_BYTES["other"])
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
    """The tile in other orders over the vocabulary, and with one loop in place of two or the other
    way round; only the forward pass has these choices and splits the vocabulary."""
    groups, splits = (
        ((2,), (2,)) if architecture == "interpreter" else ((4, 8, 16, 32), (16, 32, 64, 128))
    )
    if kernel != "linear_logprobs_fwd":
        splits = (tile.max_splits,)
    varied = [replace(tile, group_n=g, max_splits=parts) for g in groups for parts in splits]
    if kernel == "linear_logprobs_fwd":
        varied.append(replace(tile, flatten=not tile.flatten))
    return [other for other in varied if other != tile]


# --- One candidate --------------------------------------------------------------------------------


def check(kernel: str, candidate: Candidate, inputs: Inputs, truth: Tensor, allowed: float) -> None:
    """Runs a candidate once; its status says if it cannot run or is less exact than allowed."""
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
        candidate.status = f"refused: {error_text(error)}"


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
