"""The benchmark of a whole training step: its stopwatch, on a tiny model, and its ratios."""

from pathlib import Path

import pytest
import torch

from agro_train.policy import tiny
from benchmarks.measure.rows import read_csv
from benchmarks.trainer import step as step_benchmark
from benchmarks.trainer.step import Steps
from benchmarks.trainer.step_loops import Setting, Step


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    tokenizer = tiny.build_tokenizer()
    model = tmp_path / "model"
    tiny.build_model(len(tokenizer), 0).save_pretrained(model)
    tokenizer.save_pretrained(model)
    return Setting(
        model=str(model),
        questions=("2+3=", "14+5="),
        generations=4,
        completion_length=6,
        steps=2,
        precision=torch.get_float32_matmul_precision(),
        threads=1,
        folder=str(tmp_path),
    )


def test_our_own_loop_is_timed_step_by_step(setting: Setting) -> None:
    (found,) = step_benchmark.in_turn(["agro"], setting)
    assert found.status == "ok"
    assert len(found.steps) == 2
    for step in found.steps:
        assert step.rollout_s > 0
        assert step.update_s > 0
        assert step.resident_bytes > 0
        assert step.prompt_tokens == 4 * (4 + 5)
        assert step.completion_tokens == 2 * 4 * 6  # none ended early
        assert step.micro_batch_completions == 4  # one group


def test_a_trainer_that_fails_says_so(
    setting: Setting, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = Setting(**{**vars(setting), "model": str(tmp_path / "nowhere")})
    (found,) = step_benchmark.in_turn(["agro"], missing)
    assert found.status.startswith("died")
    assert not found.steps
    assert "nowhere" in capsys.readouterr().out
    assert step_benchmark.to_row(found, setting).n == 0


def step(update_s: float, peak: int, completion_tokens: int = 48, completions: int = 4) -> Step:
    return Step(1.0, update_s, peak, 10**9, 36, completion_tokens, completions)


def test_ratios_are_of_the_best_peer(setting: Setting, tmp_path: Path) -> None:
    found = [
        Steps("agro", steps=[step(1.0, 5 * 10**6), step(3.0, 4 * 10**6), step(1.5, 10**6)]),
        Steps("trl_grpo", steps=[step(4.0, 10**7)] * 3),
        Steps("trl_rloo", steps=[step(3.0, 2 * 10**7)] * 3),
    ]
    rows = [step_benchmark.to_row(steps, setting) for steps in found]
    step_benchmark.relate(rows)
    ours = rows[0]
    assert (ours.update_s, ours.step_s, ours.update_peak_mb) == (1.5, 2.5, 5.0)
    assert (ours.update_ratio, ours.step_ratio, ours.update_peak_ratio) == (0.5, 2.5 / 4, 0.5)
    step_benchmark.write(rows, setting, tmp_path / "rows.csv")
    written = read_csv(tmp_path / "rows.csv")
    assert [row["trainer"] for row in written] == ["agro", "trl_grpo", "trl_rloo"]
    assert written[0]["update_ratio"] == "0.5"
    assert written[0]["cpu"]


@pytest.mark.parametrize("other", [{"completion_tokens": 47}, {"completions": 5}], ids=str)
def test_steps_of_other_sizes_are_not_compared(
    other: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    found = [
        Steps("agro", steps=[step(1.0, 10)]),
        Steps("trl_grpo", steps=[step(1.0, 10, **other)]),
    ]
    monkeypatch.setattr(step_benchmark, "in_turn", lambda trainers, setting: found)
    arguments = ["--model", "unused", "--out", str(tmp_path / "rows.csv")]
    assert step_benchmark.main(arguments) == 1
    assert "not comparable" in capsys.readouterr().out
