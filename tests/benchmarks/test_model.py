"""The whole-model benchmark measures what it says, on a tiny model."""

import argparse
import sys

import pytest

from benchmarks.trainer import model as model_benchmark


@pytest.fixture
def options() -> argparse.Namespace:
    return argparse.Namespace(
        model=None, smoke=True, batch=2, length=16, counted=9, ways=None, repetitions=1
    )


@pytest.mark.parametrize("way", ["patched", "hf_trainer", "hf_trainer_patched"])
def test_every_way_has_the_gradient_of_the_logits(way: str, options: argparse.Namespace) -> None:
    row = model_benchmark.measure(way, options)
    assert row["error"] < 1e-4
    assert row["n"] == 1
    assert row["median_s"] > 0
    if way != "hf_trainer":  # which computes the very logits
        assert row["error"] > 0


def test_a_wrong_gradient_shows(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = model_benchmark.scorer

    def spoilt(way, model):  # type: ignore[no-untyped-def]
        score = scorer(way, model)
        return score if way == "logits" else lambda ids, targets: score(ids, targets) ** 3

    monkeypatch.setattr(model_benchmark, "scorer", spoilt)
    assert model_benchmark.measure("patched", options)["error"] > 0.1


def test_a_way_that_fails_is_the_exit_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert model_benchmark.main(["--ways", "logits"]) == 1
    assert "ended with status 1" in capsys.readouterr().out
