"""`agro train` without arguments: a tiny model learns to carry, from reward alone."""

from pathlib import Path
from statistics import mean

import pytest

from agro_train.cli import main
from agro_train.data.rows import read_jsonl

pytestmark = pytest.mark.usefixtures("no_curves")


def test_default_run_learns_and_generalises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train"]) == 0
    rows = read_jsonl(tmp_path / "runs" / "tiny-arithmetic" / "metrics.jsonl")
    rewards = [row["reward"] for row in rows if "reward" in row]
    assert mean(rewards[:3]) < 0.5
    assert mean(rewards[-5:]) > 0.9
    held_out = [row for row in rows if "eval_accuracy" in row]
    for key in ("eval_accuracy", "eval_reward"):
        assert held_out[-1][key] - held_out[0][key] >= 0.3, key
    assert "Greedy completions" in capsys.readouterr().out
