"""What an older version wrote, today's code reads: formats on disk are kept.

`old_run/run` is the folder of a two-step run that was killed while it wrote its last checkpoint,
and `old_run/start` its model, random and with 900 weights. They were written before `agro_train`
was divided into folders (the commit is in environment.json), and are not to be written anew: where
this test fails, users' runs cannot be read. Only names of folders in them were changed.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from agro_train.cli import main
from agro_train.data.rows import read_jsonl

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests" / "train" / "old_run" / "run"
STEP_1 = Path("rollouts/step-000001.jsonl")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder; its config.yaml names the model from the root of the repository."""
    monkeypatch.chdir(ROOT)
    shutil.copytree(OLD, tmp_path / "run")
    return tmp_path / "run"


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def told(row: dict[str, Any]) -> dict[str, Any]:
    """What a log says of a completion, and not where this step took it from."""
    return {key: row[key] for key in ("group", "prompt_ids", "completion", "reward", "columns")}


def test_it_resumes_from_its_checkpoint_and_its_record_is_rewound_to_there(run: Path) -> None:
    assert main(["train", "--resume", str(run), "steps=3"]) == 0

    until_step_1 = [line for line in lines(OLD / "metrics.jsonl") if json.loads(line)["step"] < 2]
    assert lines(run / "metrics.jsonl")[: len(until_step_1)] == until_step_1
    assert (run / STEP_1).read_bytes() == (OLD / STEP_1).read_bytes()

    steps = [row for row in read_jsonl(run / "metrics.jsonl") if "reward" in row]
    evaluations = [row for row in read_jsonl(run / "metrics.jsonl") if "eval_accuracy" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert [row["step"] for row in evaluations] == [0, 1, 2, 3]
    for rows in (steps, evaluations):
        assert rows[0].keys() <= rows[-1].keys()  # no column has gone

    # Step 2 learns again from one fresh group and one that step 1 sampled.
    rows = read_jsonl(run / "rollouts" / "step-000002.jsonl")
    assert [row["source"] for row in rows] == ["fresh"] * 2 + ["replayed"] * 2
    before = [told(row) for row in read_jsonl(OLD / STEP_1)]
    assert all(told(row) in before for row in rows[2:])
    assert (run / "checkpoint-3").is_dir() and (run / "report.html").stat().st_size > 0


def test_its_rollouts_train_another_run(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "another"
    settings = [
        "model=tests/train/old_run/start",
        f"recorded=[{run / STEP_1}]",
        f"output_dir={folder}",
        *("steps=1", "prompts_per_step=2", "num_generations=2", "max_completion_length=8"),
        *("eval_every=0", "save_every=0"),
    ]
    assert main(["train", "tiny-arithmetic", *settings]) == 0
    (metrics,) = read_jsonl(folder / "metrics.jsonl")
    assert metrics["groups"] == 2 and metrics["dropped"] == 0 and metrics["grad_norm"] > 0
    taken = sorted(map(told, read_jsonl(folder / STEP_1)), key=str)
    assert taken == sorted(map(told, read_jsonl(run / STEP_1)), key=str)


def test_its_rollouts_are_scored(run: Path, tmp_path: Path) -> None:
    scored = tmp_path / "scored.jsonl"
    assert main(["score", str(run / STEP_1), "reward=number", f"--output={scored}"]) == 0
    assert [row["completion"] for row in read_jsonl(scored)] == [
        row["completion"] for row in read_jsonl(run / STEP_1)
    ]
    assert all(row["reward"] == 0.0 for row in read_jsonl(scored))


def test_its_report_and_its_curves_are_drawn(run: Path) -> None:
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "47+26=" in page and "954167+8" in page  # a prompt of step 2 and what it was answered
    assert main(["plot", str(run)]) == 0
    assert (run / "plots" / "overview.png").stat().st_size > 0


def test_its_checkpoint_is_evaluated(run: Path) -> None:
    assert main(["eval", str(run), "eval_prompts=3"]) == 0
    results = json.loads((run / "evaluations" / "checkpoint-1" / "results.json").read_text())
    assert results["step"] == 1 and results["prompts"] == 3
