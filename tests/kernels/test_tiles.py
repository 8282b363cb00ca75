"""The tile tables: what can be said of a row without compiling it."""

import itertools

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
    ("architecture", "hidden_size"), [("sm80", 4096), ("sm90", 576), ("sm90", 4096)]
)
def test_splits_cover_the_vocabulary_and_none_is_empty(
    vocabulary: int, architecture: str, hidden_size: int
) -> None:
    config = configs.select("linear_logprobs_fwd", architecture, 2, hidden_size)
    tiles_per_split, num_splits = configs.split_vocabulary(vocabulary, config)
    columns = tiles_per_split * config.block_v
    assert 1 <= num_splits <= config.max_splits
    assert (num_splits - 1) * columns < vocabulary <= num_splits * columns
