"""Tile sizes of the Triton kernels, a table per GPU architecture. Nothing is tuned at run time.

Provenance of every row: compiled, not timed. Triton 3.8 compiled it for its architecture and
`python -m benchmarks.compile_report` read the result back: no register is spilled, except where the
row's comment says so.

A row decides the order in which a logit and a sum over the vocabulary are added up (block_v,
block_d, max_splits). It depends on the architecture and the dtype and never on the number of
tokens, so the result of a token does not depend on the batch it is in.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TileConfig:
    """One tile of (block_n tokens, block_v vocabulary entries), summed over D in steps of block_d.

    group_n row blocks pass over the vocabulary together, for the L2 cache; results do not depend on
    it. The forward pass cuts the vocabulary into at most max_splits parts, a program each: enough
    to fill a GPU with few tokens, few enough that merging them costs nothing.
    """

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group_n: int = 16
    max_splits: int = 16

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory, in bytes, of the operands in flight, of itemsize bytes an element."""
        return (self.block_n + self.block_v) * self.block_d * itemsize * self.num_stages


# Shared memory one program may use, in bytes. "other" is what every other GPU has at least.
SHARED_BYTES = {
    "sm80": 163 * 1024,
    "sm90": 227 * 1024,
    "sm100": 227 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
    "other": 64 * 1024,
}

# kernel -> architecture -> bytes of an operand's element -> row.
# fp32 operands are multiplied on the ordinary fp32 units, in full precision: there the accumulator
# and both operands are in registers, and the same row serves every architecture.
TILES: dict[str, dict[str, dict[int, TileConfig]]] = {
    "linear_logprobs_fwd": {
        "sm80": {2: TileConfig(128, 128, 64, 8, 3), 4: TileConfig(128, 64, 32, 8, 2)},
        "sm90": {2: TileConfig(256, 128, 64, 8, 3), 4: TileConfig(128, 64, 32, 8, 2)},
        "sm100": {2: TileConfig(128, 128, 64, 8, 3), 4: TileConfig(128, 64, 32, 8, 2)},
        "gfx942": {2: TileConfig(128, 128, 64, 8, 2), 4: TileConfig(128, 64, 32, 8, 2)},
        "gfx950": {2: TileConfig(128, 128, 64, 8, 2), 4: TileConfig(128, 64, 32, 8, 2)},
        "other": {2: TileConfig(128, 128, 32, 8, 3), 4: TileConfig(128, 64, 32, 8, 2)},
        # Triton's interpreter, which runs the kernels on CPU tensors in the tests.
        "interpreter": {
            2: TileConfig(16, 32, 32, 1, 1, group_n=2, max_splits=2),
            4: TileConfig(16, 32, 32, 1, 1, group_n=2, max_splits=2),
        },
    },
    "linear_logprobs_bwd": {
        # sm80 and other: 32 and 56 bytes spilled where softcap, entropy gradient and lse gradient
        # come together. The rows of "other" were compiled for sm80 and gfx942.
        "sm80": {2: TileConfig(128, 128, 64, 8, 3), 4: TileConfig(128, 64, 32, 8, 2)},
        "sm90": {2: TileConfig(128, 128, 64, 8, 3), 4: TileConfig(128, 64, 32, 8, 2)},
        "sm100": {2: TileConfig(128, 128, 64, 8, 3), 4: TileConfig(128, 64, 32, 8, 2)},
        "gfx942": {2: TileConfig(128, 128, 64, 8, 2), 4: TileConfig(128, 64, 32, 8, 2)},
        "gfx950": {2: TileConfig(128, 128, 64, 8, 2), 4: TileConfig(128, 64, 32, 8, 2)},
        "other": {2: TileConfig(128, 128, 32, 8, 3), 4: TileConfig(128, 64, 32, 8, 2)},
        "interpreter": {
            2: TileConfig(16, 32, 32, 1, 1, group_n=2),
            4: TileConfig(16, 32, 32, 1, 1, group_n=2),
        },
    },
}


def select(kernel: str, architecture: str, itemsize: int) -> TileConfig:
    """The row of a kernel; an architecture without rows of its own gets those of "other".

    kernel: a key of TILES. architecture: "sm90", "gfx942", ... or "interpreter". itemsize: bytes of
    an operand's element, 2 or 4.
    """
    rows = TILES[kernel]
    return rows.get(architecture, rows["other"])[itemsize]


def split_vocabulary(vocabulary: int, config: TileConfig) -> tuple[int, int]:
    """(tiles of a split, number of splits): at most config.max_splits, none of them empty."""
    num_tiles = -(-vocabulary // config.block_v)
    tiles_per_split = -(-num_tiles // config.max_splits)
    return tiles_per_split, -(-num_tiles // tiles_per_split)
