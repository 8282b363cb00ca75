"""Tile sizes of the Triton kernels, a table per GPU architecture. Nothing is tuned at run time.

Provenance. Triton 3.8 compiled every row for its architecture, and `python -m
benchmarks.predict.compile_report` inspected the code (benchmarks/results/compile_report.csv): no
combination of options spills a register but two: the flattened forward pass with the entropy, 16
bytes a thread, and with entropy and softcap, 8. What flattening and whole waves gain has not been
timed. Tiles of sm90 were timed on an H200 for
bf16, D 2048 and 4,096 or 16,384 tokens (tune_linear_logprobs_*_sm90_bf16.csv there). The backward
row was the fastest. Forward, several tiles of 128 x 256 were equally fast within 3 %; the row is
the one that larger D have too. The rows of D 4096 ran in a benchmark there
(bench_linear_logprobs.csv). No other row has been timed.

A row decides the order in which a logit and a sum over the vocabulary are added up (block_v,
block_d, max_splits). The row of a call depends on the architecture, the dtype, the hidden size, the
layout of the weight and on whether there is a softcap or a rounding, never on the number of tokens
nor on what is kept of the logits. So the result of a token does not depend on the batch it is in.
"""

import functools
import sys
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class TileConfig:
    """One tile of (block_n tokens, block_v vocabulary entries), summed over D in steps of block_d.

    group_n row blocks pass over the vocabulary together, for the L2 cache; results do not depend on
    it. The forward pass cuts the vocabulary into at most max_splits parts, a program each:
    `split_vocabulary` says into how many.

    descriptors: the operands are fetched through tensor descriptors (TMA), which takes hidden
    states and a weight whose rows begin at multiples of 16 bytes.

    flatten: the forward pass runs over a split's tiles and over D in one loop, so that a tile's
    first operands are fetched during the softmax of the tile before.
    """

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group_n: int = 16
    max_splits: int = 128
    descriptors: bool = False
    flatten: bool = False

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory, in bytes, of the operands in flight, of itemsize bytes an element."""
        return (self.block_n + self.block_v) * self.block_d * itemsize * self.num_stages


@dataclass(frozen=True)
class Row:
    """A tile and the calls that it is for."""

    tile: TileConfig
    smallest_d: int = 1  # hidden sizes from here on
    aligned: bool = False  # True: only for operands whose rows begin at multiples of 16 bytes
    with_softcap: bool = True  # False: not for calls with a softcap
    with_rounding: bool = True  # False: not for calls that round their logits

    def serves(self, hidden_size: int, *, aligned: bool, softcap: bool, rounds: bool) -> bool:
        return (
            hidden_size >= self.smallest_d
            and (aligned or not (self.aligned or self.tile.descriptors))
            and (self.with_softcap or not softcap)
            and (self.with_rounding or not rounds)
        )


# Shared memory one program may use, in bytes. "other" is what every other GPU has at least.
SHARED_BYTES = {
    "sm80": 163 * 1024,
    "sm90": 227 * 1024,
    "sm100": 227 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
    "other": 64 * 1024,
}

# fp32 operands are multiplied on the ordinary fp32 units, in full precision: there the accumulator
# and both operands are in registers, and the same row serves every architecture.
FP32 = (Row(TileConfig(128, 64, 32, 8, 2)),)


def with_fp32(*rows: Row) -> dict[int, tuple[Row, ...]]:
    """Those of 16-bit operands and, beside them, those of fp32 ones."""
    return {2: rows, 4: FP32}


# Triton's interpreter, which runs the kernels on CPU tensors in the tests.
INTERPRETER = (
    Row(TileConfig(16, 32, 32, 1, 1, group_n=2, max_splits=2, descriptors=True)),
    Row(TileConfig(16, 32, 32, 1, 1, group_n=2, max_splits=2)),
)

# kernel -> architecture -> bytes of an operand's element -> rows; a call gets the first that serves
# it. Where D is large, a tile of 128 x 256 is faster: it loads a quarter less for each product.
# Where D is small, two smaller programs share a multiprocessor, and the exponentials of one overlap
# with the matrix products of the other. With four warps a thread has twice the registers of eight.
# With a softcap that is still too few, as the logits are kept beside their gradient. Operands that
# are not aligned pass through registers on their way to shared memory: hence the smaller last rows.
WIDE_FWD, WIDE_BWD = 2048, 2049  # hidden sizes from here on are large
WIDE = TileConfig(128, 256, 64, 8, 4, descriptors=True)
TILES: dict[str, dict[str, dict[int, tuple[Row, ...]]]] = {
    "linear_logprobs_fwd": {
        "sm80": with_fp32(
            Row(TileConfig(128, 128, 64, 8, 3), aligned=True),
            Row(TileConfig(128, 128, 32, 8, 3)),
        ),
        "sm90": with_fp32(
            Row(replace(WIDE, flatten=True), smallest_d=WIDE_FWD),
            Row(TileConfig(128, 128, 64, 4, 3, descriptors=True), with_softcap=False),
            Row(TileConfig(128, 128, 64, 8, 4, descriptors=True)),
            Row(TileConfig(128, 128, 64, 8, 3)),
        ),
        "sm100": with_fp32(
            Row(TileConfig(128, 128, 64, 4, 3, descriptors=True)),
            Row(TileConfig(128, 128, 32, 8, 3)),
        ),
        "gfx942": with_fp32(Row(TileConfig(128, 128, 64, 8, 2))),
        "gfx950": with_fp32(
            Row(TileConfig(128, 256, 64, 8, 2), aligned=True),
            Row(TileConfig(128, 128, 64, 8, 2)),
        ),
        "other": with_fp32(Row(TileConfig(128, 128, 32, 8, 3))),
        "interpreter": {2: INTERPRETER, 4: INTERPRETER},
    },
    "linear_logprobs_bwd": {
        "sm80": with_fp32(Row(TileConfig(128, 128, 64, 8, 3))),
        "sm90": with_fp32(
            # Where it rounds, Triton 3.6's ptxas serialises this one's products.
            Row(WIDE, smallest_d=WIDE_BWD, with_softcap=False, with_rounding=False),
            Row(TileConfig(128, 128, 64, 4, 3, descriptors=True), with_softcap=False),
            Row(TileConfig(128, 128, 64, 8, 3, descriptors=True)),
            Row(TileConfig(128, 128, 64, 8, 3)),
        ),
        "sm100": with_fp32(
            Row(WIDE, smallest_d=WIDE_BWD, with_softcap=False),
            Row(TileConfig(128, 128, 64, 8, 3, descriptors=True)),
            Row(TileConfig(128, 128, 64, 8, 3)),
        ),
        "gfx942": with_fp32(Row(TileConfig(128, 128, 64, 8, 2))),
        "gfx950": with_fp32(Row(TileConfig(128, 128, 64, 8, 2))),
        "other": with_fp32(Row(TileConfig(128, 128, 32, 8, 3))),
        "interpreter": {2: INTERPRETER, 4: INTERPRETER},
    },
}


# Hidden sizes from which on the forward kernel can keep logits, where it cannot of all: with four
# warps there are too few registers to store a tile, too.
KEEPS_FROM = {"sm90": WIDE_FWD, "sm100": sys.maxsize}
# What it also needs the vocabulary to be a multiple of: a last tile's mask takes registers.
KEEPS_WHOLE = {"sm90": 256}


def keeps_logits(architecture: str, hidden_size: int, vocabulary: int, *, softcap: bool) -> bool:
    """Whether the forward kernel for a GPU may be asked to keep logits of 16-bit inputs."""
    large = hidden_size >= KEEPS_FROM.get(architecture, 1)
    return large and vocabulary % KEEPS_WHOLE.get(architecture, 1) == 0 and not softcap


def architecture(device: torch.device) -> str:
    """The device's name in these tables; CPU tensors are for Triton's interpreter."""
    if device.type == "cpu":
        return "interpreter"
    if not torch.cuda.is_available():  # of tensors that have a shape only
        return "other"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def select(
    kernel: str,
    architecture: str,
    itemsize: int,
    hidden_size: int,
    *,
    aligned: bool = True,
    softcap: bool = False,
    rounds: bool = False,
) -> TileConfig:
    """The tile of a kernel; an architecture without rows of its own gets those of "other".

    kernel: a key of TILES. architecture: "sm90", "gfx942", ... or "interpreter". itemsize: bytes of
    an operand's element, 2 or 4. aligned: rows of hidden states and weight begin at multiples of 16
    bytes. softcap: the call has one. rounds: it rounds its logits.
    """
    rows = TILES[kernel].get(architecture, TILES[kernel]["other"])[itemsize]
    return next(
        row.tile
        for row in rows
        if row.serves(hidden_size, aligned=aligned, softcap=softcap, rounds=rounds)
    )


# --- Whole waves ----------------------------------------------------------------------------------
#
# A GPU runs so many programs at once, a wave. Where the last wave has a few programs only, most of
# the GPU is idle for as long as one program takes.

# Multiprocessors of the GPU that most machines of an architecture have: A100, H100 and H200, B200,
# MI300X, MI355X. Not asked of the GPU at hand: results would depend on it.
MULTIPROCESSORS = {"sm80": 108, "sm90": 132, "sm100": 148, "gfx942": 304, "gfx950": 256}
SPLITS_ELSEWHERE = 16  # enough for a thousand tokens on any GPU

# What it costs to begin a program of the forward pass, in operations that its multiprocessor could
# have done: 2048 clocks of a Hopper. From a model of its pipeline, not measured.
START_FLOP = 2**23
# Row blocks, 1024 to 16384 tokens, over which a choice that must not depend on them is made.
ROW_BLOCKS = (8, 16, 32, 64, 128)


def programs_at_once(architecture: str, itemsize: int, config: TileConfig) -> int | None:
    """How many programs of a GEMM kernel a GPU runs at once; None of an unknown architecture.

    itemsize: bytes of an operand's element. Eight warps take all registers of a multiprocessor.
    """
    if architecture not in MULTIPROCESSORS:
        return None
    by_memory = SHARED_BYTES[architecture] // config.shared_bytes(itemsize)
    return MULTIPROCESSORS[architecture] * max(1, min(by_memory, 8 // config.num_warps))


@functools.cache
def split_vocabulary(
    vocabulary: int, hidden_size: int, config: TileConfig, at_once: int | None
) -> tuple[int, int]:
    """(tiles of a split, number of splits): at most config.max_splits, none of them empty.

    at_once: `programs_at_once`. The split whose waves are fullest, on average over ROW_BLOCKS: many
    short programs leave less of the last wave empty, and each costs START_FLOP. Of equally good
    ones the fewest splits.
    """
    num_tiles = -(-vocabulary // config.block_v)
    fewest_tiles = -(-num_tiles // config.max_splits)
    if at_once is None:
        tiles_per_split = -(-num_tiles // min(config.max_splits, SPLITS_ELSEWHERE))
        return tiles_per_split, -(-num_tiles // tiles_per_split)
    start = START_FLOP / (2 * config.block_n * config.block_v * hidden_size)  # in tiles

    def time(tiles_per_split: int) -> float:
        """The sum over ROW_BLOCKS of the time over that of a GPU without an idle moment."""
        num_splits = -(-num_tiles // tiles_per_split)
        waves = (-(-blocks * num_splits // at_once) / blocks for blocks in ROW_BLOCKS)
        return sum(waves) * (tiles_per_split + start)

    tiles_per_split = min(range(num_tiles, fewest_tiles - 1, -1), key=time)
    return tiles_per_split, -(-num_tiles // tiles_per_split)


def whole_waves(num_tiles: int, row_blocks: int, most: int, at_once: int) -> int:
    """Tiles of columns in a chunk, 31/32 of `most` or more: those with the fewest waves.

    A chunk is a launch with a program for each of its tiles in each of row_blocks, and num_tiles
    are cut into chunks. Of equally good sizes the largest.
    """

    def waves(size: int) -> int:
        chunks, rest = divmod(num_tiles, size)
        return chunks * -(-size * row_blocks // at_once) + -(-rest * row_blocks // at_once)

    return min(range(most, most - most // 32 - 1, -1), key=waves)
