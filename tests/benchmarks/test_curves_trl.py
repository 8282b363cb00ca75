"""The statement about training curves: its statistics, and that the committed curves make it."""

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measure.rows import RESULTS, read_csv
from benchmarks.trainer import curves_trl
from benchmarks.trainer.curves_plots import plot_training


def rows(trainer: str, shift: float, seeds: int = 5, steps: int = 8) -> list[dict[str, Any]]:
    """Rewards that rise, and a KL, the same for all but noise and a shift of later rewards."""
    noise = random.Random(trainer)
    return [
        {
            "trainer": trainer,
            "seed": seed,
            "step": step,
            "reward": 0.1 * step + shift * (step > 3) + noise.gauss(0, 0.02),
            "kl": 1 + noise.gauss(0, 0.1),
        }
        for seed in range(seeds)
        for step in range(1, steps + 1)
    ]


def test_an_estimate_is_a_mean_over_seeds_with_its_standard_error() -> None:
    made = [
        {"trainer": "trl", "seed": seed, "step": step, "reward": seed + 0.5 * step, "kl": "2.0"}
        for seed in (0, 1)
        for step in range(1, 9)
    ]
    found = curves_trl.estimates(made, "trl")
    assert found["start"].mean == pytest.approx(0.5 + 1.0)  # steps 1 to 3, seeds 0 and 1
    assert found["whole"].mean == pytest.approx(0.5 + 2.25)
    assert found["end"].mean == pytest.approx(0.5 + 3.75)  # steps 7 and 8
    assert found["end"].error == pytest.approx(0.5)  # of 3.75 and 4.75
    assert (found["kl"].mean, found["kl"].error) == (2.0, 0.0)
    difference = found["end"].minus(found["start"])
    assert difference.mean == pytest.approx(2.75)
    assert difference.error == pytest.approx(0.5**0.5)


def test_the_same_noise_is_the_same_and_a_shift_is_not() -> None:
    made = [*rows("agro", 0.0), *rows("trl", 0.0), *rows("agro_slower", -0.1)]
    assert curves_trl.verdict(made, "agro", "trl")[0]
    same, table = curves_trl.verdict(made, "agro", "agro_slower")
    assert not same
    assert "standard errors" in table
    flat = [{**row, "reward": 0.3 + 0.01 * (row["seed"] % 2)} for row in made]
    assert not curves_trl.verdict(flat, "agro", "trl")[0]  # neither has learned anything


def test_the_committed_curves_say_the_same_and_would_have_shown_a_difference() -> None:
    committed = read_csv(RESULTS / "curves_trl.csv")
    assert {row["trl"] for row in committed} == {"1.16.0"}
    assert curves_trl.verdict(committed, "agro", "trl")[0]
    assert not curves_trl.verdict(committed, "agro", "agro_slower")[0]


def test_rows_are_written_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "curves.csv"
    curves_trl.write([*rows("agro", 0.0), *rows("trl", 0.0)], path)
    assert len(read_csv(path)) == 2 * 5 * 8
    assert plot_training(path).stat().st_size > 5000


def test_a_run_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="agro, seed 3, ended with 1"):
        curves_trl.run_one("agro", 3, 1, tmp_path)


def test_one_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        curves_trl.main(["--seeds", "1"])
    assert "--seeds: expected at least 2, got 1" in capsys.readouterr().err
