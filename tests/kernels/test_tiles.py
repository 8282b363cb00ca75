"""The tile tables: what can be said of a row without compiling it."""

import heapq
import itertools
from dataclasses import replace

import pytest

from agro_kernels import tiles as configs

ROWS = [
    pytest.param(architecture, itemsize, row.tile, id=f"{kernel}-{architecture}-{itemsize}-{i}")
    for kernel, architectures in configs.TILES.items()
    for architecture, dtypes in architectures.items()
    for itemsize, rows in dtypes.items()
    for i, row in enumerate(rows)
]


@pytest.mark.parametrize(("architecture", "itemsize", "tile"), ROWS)
def test_row_is_possible(architecture: str, itemsize: int, tile: configs.TileConfig) -> None:
    for block in (tile.block_n, tile.block_v, tile.block_d):
        assert block >= 16 and block & (block - 1) == 0  # tl.arange, and the smallest tl.dot
        assert block <= 256  # a tensor descriptor's largest
    assert tile.block_v % 32 == 0  # the words of `kept`
    assert tile.num_warps in (1, 2, 4, 8)  # 8 waves of 64 threads are all a ROCm program may have
    assert tile.group_n >= 1 and tile.max_splits >= 1
    assert not tile.descriptors or architecture in ("sm90", "sm100", "interpreter")
    if architecture != "interpreter":
        assert tile.shared_bytes(itemsize) <= configs.SHARED_BYTES[architecture]


def needs_alignment(row: configs.Row) -> bool:
    return not row.serves(1 << 20, aligned=False, softcap=False, rounds=False)


@pytest.mark.parametrize("kernel", configs.TILES)
def test_every_architecture_serves_every_call(kernel: str) -> None:
    assert set(configs.TILES[kernel]) == {*configs.SHARED_BYTES, "interpreter"}
    for dtypes in configs.TILES[kernel].values():
        assert set(dtypes) == {2, 4}
        for rows in dtypes.values():
            assert rows[-1].serves(1, aligned=False, softcap=True, rounds=True)
            for earlier, later in itertools.combinations(rows, 2):  # no row is out of reach
                assert (
                    earlier.smallest_d > later.smallest_d
                    or (later.with_softcap and not earlier.with_softcap)
                    or (needs_alignment(earlier) and not needs_alignment(later))
                )


def test_select_follows_the_hidden_size_the_layout_and_the_softcap() -> None:
    forward, backward = configs.TILES
    wide = configs.select(forward, "sm90", 2, 4096)
    small = configs.select(forward, "sm90", 2, 1024)
    assert (wide.block_v, small.block_v) == (256, 128)
    assert wide.descriptors and small.descriptors
    assert not configs.select(forward, "sm90", 2, 4096, aligned=False).descriptors
    assert configs.select(backward, "sm90", 2, 4096).block_v == 256
    assert configs.select(backward, "sm90", 2, 4096, rounds=True).block_v == 128
    at_2048 = [configs.select(kernel, "sm90", 2, 2048).block_v for kernel in (forward, backward)]
    assert at_2048 == [256, 128]
    assert configs.select(backward, "sm90", 2, 4096, softcap=True).block_v == 128
    assert configs.select(backward, "sm80", 2, 4096) == configs.select(backward, "sm80", 2, 64)


def test_unknown_architecture_gets_the_row_for_others() -> None:
    other = configs.TILES["linear_logprobs_fwd"]["other"][2][0].tile
    assert configs.select("linear_logprobs_fwd", "sm86", 2, 4096) == other
    assert configs.select("linear_logprobs_fwd", "gfx1100", 2, 64) == other


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 129, 2048, 2049, 128256, 151936, 262144])
@pytest.mark.parametrize(
    ("architecture", "hidden_size"), [("sm80", 4096), ("sm90", 576), ("sm90", 4096), ("sm86", 64)]
)
def test_splits_cover_the_vocabulary_and_none_is_empty(
    vocabulary: int, architecture: str, hidden_size: int
) -> None:
    config = configs.select("linear_logprobs_fwd", architecture, 2, hidden_size)
    at_once = configs.programs_at_once(architecture, 2, config)
    assert (at_once is None) == (architecture == "sm86")
    split = configs.split_vocabulary(vocabulary, hidden_size, config, at_once)
    tiles_per_split, num_splits = split
    columns = tiles_per_split * config.block_v
    assert 1 <= num_splits <= config.max_splits
    assert (num_splits - 1) * columns < vocabulary <= num_splits * columns
    assert at_once is not None or num_splits <= 16


# --- Whole waves ----------------------------------------------------------------------------------


def test_programs_at_once_are_what_a_multiprocessor_has_room_for() -> None:
    large = configs.TileConfig(128, 256, 64, 8, 4)
    small = configs.TileConfig(128, 128, 64, 4, 3)
    assert configs.programs_at_once("sm90", 2, large) == 132
    assert configs.programs_at_once("sm90", 2, small) == 2 * 132
    assert configs.programs_at_once("sm90", 2, replace(small, num_warps=8)) == 132
    assert configs.programs_at_once("other", 2, large) is None
    assert configs.programs_at_once("interpreter", 2, large) is None


def busy(num_tiles: int, row_blocks: int, tiles_per_split: int, at_once: int) -> float:
    """The share of a GPU that works, by giving each program to whoever is free first."""
    until = [0] * at_once
    for first in range(0, num_tiles, tiles_per_split):
        for _ in range(row_blocks):
            heapq.heapreplace(until, until[0] + min(tiles_per_split, num_tiles - first))
    return num_tiles * row_blocks / at_once / max(until)


@pytest.mark.parametrize("vocabulary", [32000, 50304, 128256, 151936, 262144])
def test_splits_keep_a_hopper_busy(vocabulary: int) -> None:
    """More of it than sixteen splits do, and hardly less for any number of tokens."""
    config = configs.select("linear_logprobs_fwd", "sm90", 2, 4096)
    num_tiles = -(-vocabulary // config.block_v)
    chosen, _ = configs.split_vocabulary(vocabulary, 4096, config, 132)
    of_chosen = [busy(num_tiles, blocks, chosen, 132) for blocks in configs.ROW_BLOCKS]
    of_sixteen = [busy(num_tiles, b, -(-num_tiles // 16), 132) for b in configs.ROW_BLOCKS]
    assert min(of_chosen) > 0.93
    assert sum(of_chosen) > sum(of_sixteen)


def test_splits_of_a_vocabulary_that_fits_a_wave_whole() -> None:
    config = configs.TileConfig(128, 256, 64, 8, 4)
    vocabulary = 33 * 18 * 256
    # 33 splits of 8 row blocks are two waves of 132, of 16 four, and so on.
    assert configs.split_vocabulary(vocabulary, 4096, config, 132) == (18, 33)
    few = replace(config, max_splits=8)
    assert configs.split_vocabulary(vocabulary, 4096, few, 132)[1] <= 8


def test_chunks_are_whole_waves() -> None:
    assert configs.whole_waves(501, 32, 132, 132) == 132  # 32 waves
    assert configs.whole_waves(501, 128, 66, 132) == 66  # 64 waves
    assert configs.whole_waves(300, 32, 101, 132) == 99  # 24 waves; 101 would be 25
    assert configs.whole_waves(501, 1, 1, 132) == 1


@pytest.mark.parametrize("row_blocks", [1, 7, 31, 32, 97, 256])
@pytest.mark.parametrize("most", [1, 5, 33, 100, 132])
def test_whole_waves_are_never_more_than_those_of_the_largest_chunk(
    most: int, row_blocks: int
) -> None:
    def waves(size: int) -> int:
        sizes = [min(size, 501 - start) for start in range(0, 501, size)]
        return sum(-(-tiles * row_blocks // 132) for tiles in sizes)

    size = configs.whole_waves(501, row_blocks, most, 132)
    assert most - most // 32 <= size <= most
    assert waves(size) <= waves(most)
