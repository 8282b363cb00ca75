"""Whole runs with an environment: what was sampled is trained, recorded, replayed and resumed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from agro_train.cli import main
from agro_train.config import TrainConfig
from agro_train.data import kept_ids
from agro_train.data.rows import read_jsonl
from agro_train.policy.load import load_model

pytestmark = pytest.mark.usefixtures("no_curves")

ODD = "tests.train.environments.odd"
QUICK = f"""
    warm_start_steps=0 environment={ODD}:Counts
    reward=[environment,tests.train.reward_functions:even_share] stop=['3','7','=']
    prompts_per_step=2 num_generations=4 max_completion_length=14 learning_rate=1e-3
    warmup_steps=0 eval_every=0
""".split()


def train(folder: Path, *settings: str) -> int:
    return main(["train", f"output_dir={folder}", *QUICK, *settings])


def log(folder: Path, step: int) -> list[dict[str, Any]]:
    return read_jsonl(folder / "rollouts" / f"step-{step:06d}.jsonl")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps over what top_p keeps; the second has half of its groups from the first."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = ["top_p=0.9", "replay_fraction=0.5", "steps=2", "save_every=1"]
    assert train(folder, *settings) == 0
    return folder


def test_only_what_the_model_said_is_scored(run: Path) -> None:
    first = next(row for row in read_jsonl(run / "metrics.jsonl") if "reward" in row)
    assert first["kl"] == 0.0 == first["agro/logratio_abs_max"] and not first["skipped"]
    rows = log(run, 1)
    assert first["environment/turns"] == pytest.approx(
        sum((len(row["turns"]) + 1) / 2 for row in rows) / len(rows)
    )
    assert first["environment/tokens"] > 0
    model = load_model(str(run / "base_model"), TrainConfig()).double()
    for row in rows:
        prompt, ids = row["prompt_ids"], row["completion_ids"]
        logits = (
            model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].detach()
        )
        sets, expected, at = iter(kept_ids.decode(row["kept_ids"])), 0.0, 0
        for turn in row["turns"]:
            for place in range(at, at + turn["tokens"] * (turn["by"] == "model")):
                kept = next(sets)
                among = logits[place, kept].log_softmax(-1)
                expected += float(among[list(kept).index(ids[place])])
            at += turn["tokens"]
        assert at == len(ids) and next(sets, None) is None
        assert row["sampling_logprob"] == pytest.approx(expected, abs=1e-4)
        assert row["reward"] == pytest.approx(sum(row["rewards"].values()))
    replayed = [row for row in log(run, 2) if row["source"] == "replayed"]
    assert len(replayed) == 4 and all(row["turns"] for row in replayed)
    assert "environment</i>" in (run / "report.html").read_text()


def test_a_log_of_such_a_run_is_trained_on(run: Path, tmp_path: Path) -> None:
    """By a run without the environment, whose policy is the log's sampler."""
    recorded = run / "rollouts" / "step-000001.jsonl"
    settings = [
        f"model={run / 'base_model'}",
        f"recorded=[{recorded}]",
        "data=''",
        "environment=''",
    ]
    settings += ["reward=number", "stop=[]", "top_p=0.9", "steps=1"]
    assert train(tmp_path / "offline", *settings) == 0
    first = next(row for row in read_jsonl(tmp_path / "offline" / "metrics.jsonl"))
    assert first["agro/logratio_abs_max"] < 1e-4 and not first["skipped"]
    assert abs(first["agro/sampler_log_ratio"]) < 1e-4
    assert [r["turns"] for r in log(tmp_path / "offline", 1)] != []


def test_a_resumed_run_asks_the_same(run: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "resumed"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "checkpoint-2")
    config = resumed / "config.yaml"
    config.write_text(config.read_text().replace(str(run), str(resumed)))
    assert main(["train", "--resume", str(resumed)]) == 0
    assert log(resumed, 2) == log(run, 2)
    both = [load_model(str(f / "checkpoint-2"), TrainConfig()) for f in (run, resumed)]
    for ours, theirs in zip(*(model.parameters() for model in both), strict=True):
        assert torch.equal(ours, theirs)


def test_rollouts_are_sampled_ahead_of_the_updates_too(run: Path, tmp_path: Path) -> None:
    model = f"model={run / 'base_model'}"
    assert train(tmp_path / "ahead", model, "max_staleness=1", "steps=2", "min_new_tokens=2") == 0
    rows = log(tmp_path / "ahead", 2)
    assert {row["step"] for row in rows} == {0} and any(len(row["turns"]) > 1 for row in rows)
    assert all(row["sampling_logprob"] < 0 for row in rows)


def test_rollout_and_eval_have_the_same_turns(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "recorded.jsonl"
    model = f"model={run / 'base_model'}"
    assert main(["rollout", *QUICK, model, "--output", str(output), "--prompts", "2"]) == 0
    rows = read_jsonl(output)
    assert len(rows) == 8 and any(len(row["turns"]) > 1 for row in rows)
    few = ["eval_prompts=3", "eval_generations=2", f"output_dir={tmp_path / 'eval'}"]
    assert main(["eval", str(run / "base_model"), *QUICK, *few]) == 0
    assert all(row["turns"] for row in read_jsonl(tmp_path / "eval" / "samples.jsonl"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([f"environment={ODD}:NoReset"], "environment: expected a class with the methods reset"),
        ([f"environment={ODD}:BadReset"], "got one that failed: environment: expected reset to"),
        ([f"environment={ODD}:Raises"], "environment: expected rewards for the first step"),
        (["reward=number"], "environment's steps to return None as reward with reward=number"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    settings: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"model={run / 'base_model'}"
    assert train(tmp_path / "run", model, "steps=1", *settings) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
