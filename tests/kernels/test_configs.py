"""The tile tables: what can be said of a row without compiling it."""

import pytest

from agro_kernels import configs

ROWS = [
    pytest.param(kernel, architecture, itemsize, config, id=f"{kernel}-{architecture}-{itemsize}")
    for kernel, architectures in configs.TILES.items()
    for architecture, rows in architectures.items()
    for itemsize, config in rows.items()
]


@pytest.mark.parametrize("kernel, architecture, itemsize, config", ROWS)
def test_row_is_possible(
    kernel: str, architecture: str, itemsize: int, config: configs.TileConfig
) -> None:
    for block in (config.block_n, config.block_v, config.block_d):
        assert block >= 16 and block & (block - 1) == 0  # tl.arange, and the smallest tl.dot
    assert config.num_warps in (1, 2, 4, 8)  # 8 waves of 64 threads are all a ROCm program may have
    assert config.group_n >= 1 and config.max_splits >= 1
    if architecture != "interpreter":
        assert config.shared_bytes(itemsize) <= configs.SHARED_BYTES[architecture]


@pytest.mark.parametrize("kernel", configs.TILES)
def test_every_architecture_serves_every_dtype(kernel: str) -> None:
    assert set(configs.TILES[kernel]) == {*configs.SHARED_BYTES, "interpreter"}
    for rows in configs.TILES[kernel].values():
        assert set(rows) == {2, 4}


def test_unknown_architecture_gets_the_row_for_others() -> None:
    other = configs.TILES["linear_logprobs_fwd"]["other"][2]
    assert configs.select("linear_logprobs_fwd", "sm86", 2) == other
    assert configs.select("linear_logprobs_fwd", "gfx1100", 2) == other


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 129, 2048, 2049, 128256, 151936, 262144])
def test_splits_cover_the_vocabulary_and_none_is_empty(vocabulary: int) -> None:
    config = configs.select("linear_logprobs_fwd", "sm80", 2)
    tiles_per_split, num_splits = configs.split_vocabulary(vocabulary, config)
    columns = tiles_per_split * config.block_v
    assert 1 <= num_splits <= config.max_splits
    assert (num_splits - 1) * columns < vocabulary <= num_splits * columns
