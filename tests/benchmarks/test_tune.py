"""The tuner runs, on a CPU, and refuses what it should refuse."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agro_kernels import tiles
from agro_kernels.tiles import TileConfig
from benchmarks.head import tune
from benchmarks.head.providers.base import make_inputs
from benchmarks.head.tune_kernel import KERNELS, truth_of
from benchmarks.head.tune_search import SMOKE, Candidate, candidates, check, variations
from benchmarks.measure.rows import read_csv


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here")
@pytest.mark.parametrize("kernel", KERNELS)
def test_tuner_prints_a_row_of_the_table(
    kernel: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select = tiles.select
    arguments = ["--smoke", "--kernel", kernel, "--tokens", "5", "--results", str(tmp_path)]
    assert tune.main(arguments) == 0
    assert tiles.select is select
    assert os.environ["TRITON_INTERPRET"] == "1"
    lines = capsys.readouterr().out.splitlines()
    row = eval(lines[-1].rstrip(","), {"Row": tiles.Row, "TileConfig": TileConfig})
    rows = read_csv(tmp_path / f"tune_{kernel}_interpreter_bf16.csv")
    best = min(rows, key=lambda r: float(r["score"]))
    assert (row.tile.block_v, row.smallest_d) == (int(best["block_v"]), 24)
    assert float(rows[0]["score"]) == 1.0  # the shipped row
    assert {r["status"] for r in rows} == {"ok"}
    assert {r["descriptors"] for r in rows} == {"True", "False"}


@pytest.mark.parametrize("architecture", tiles.SHARED_BYTES)
def test_candidates_fit_the_architecture(architecture: str) -> None:
    found = candidates(architecture, 2, 4096)
    assert len(found) > 20
    for tile in found:
        assert tile.shared_bytes(2) <= tiles.SHARED_BYTES[architecture]
        assert not tile.descriptors or architecture in ("sm90", "sm100")
    assert any(tile.descriptors for tile in found) == (architecture in ("sm90", "sm100"))
    assert not any(tile.descriptors for tile in candidates("sm90", 2, 7))
    assert not any(t.descriptors for t in candidates("sm90", 2, 4096, True))


def test_a_quick_search_has_the_likely_tiles_only() -> None:
    quick = candidates("sm90", 2, 2048, quick=True)
    every = candidates("sm90", 2, 2048)
    assert set(quick) < set(every)
    assert 10 < len(quick) < len(every) / 10
    shipped = tiles.select("linear_logprobs_fwd", "sm90", 2, 2048)
    assert replace(shipped, flatten=False) in quick
    assert shipped in variations("linear_logprobs_fwd", "sm90", replace(shipped, flatten=False))


def test_tiles_of_today_are_among_the_candidates() -> None:
    """Or the grid of the search has holes where a good tile is known to be."""
    for architecture in tiles.SHARED_BYTES:
        for kernel in KERNELS:
            tile = tiles.select(kernel, architecture, 2, 4096)
            plain = TileConfig(
                tile.block_n, tile.block_v, tile.block_d, tile.num_warps, tile.num_stages,
                descriptors=tile.descriptors,
            )  # fmt: skip
            assert plain in candidates(architecture, 2, 4096), architecture


def test_tuner_puts_out_a_tile_that_is_wrong_or_cannot_run() -> None:
    inputs = make_inputs(SMOKE, torch.float32)
    truth = truth_of("linear_logprobs_fwd", inputs)
    good = Candidate(TileConfig(16, 16, 16, 1, 1))
    check("linear_logprobs_fwd", good, inputs, truth, 1e-4)
    assert good.status == "ok"
    assert good.error is not None
    assert good.error < 1e-4
    strict = Candidate(TileConfig(16, 16, 16, 1, 1))
    check("linear_logprobs_fwd", strict, inputs, truth + 1.0, 1e-4)
    assert strict.status.startswith("wrong: error 1.0e+00")
    odd = Candidate(TileConfig(17, 16, 16, 1, 1))  # not a power of two
    check("linear_logprobs_fwd", odd, inputs, truth, 1e-4)
    assert odd.status.startswith("refused: ")


def test_row_shows_what_differs_from_the_defaults() -> None:
    tile = TileConfig(128, 256, 64, 8, 4, max_splits=32, descriptors=True)
    assert tune.row_to_paste(tile, 2049) == (
        "Row(TileConfig(128, 256, 64, 8, 4, max_splits=32, descriptors=True), smallest_d=2049),"
    )
    assert tune.row_to_paste(TileConfig(64, 64, 32, 4, 2), 1) == (
        "Row(TileConfig(64, 64, 32, 4, 2)),"
    )
