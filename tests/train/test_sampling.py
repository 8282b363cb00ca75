"""Whole runs with top_p, min_new_tokens and stop: what is sampled is what is scored and trained."""

from pathlib import Path
from typing import Any

import pytest
import torch

from agro_train.cli import main
from agro_train.config import TrainConfig
from agro_train.data import kept_ids
from agro_train.data.rows import read_jsonl
from agro_train.policy.load import load_model
from agro_train.policy.tiny import build_tokenizer

pytestmark = pytest.mark.usefixtures("no_curves")

QUICK = """
    warm_start_steps=0 reward=tests.train.reward_functions:even_share prompts_per_step=2
    num_generations=4 max_completion_length=8 learning_rate=1e-3 warmup_steps=0 eval_every=0
""".split()
END = build_tokenizer().eos_token_id


def train(folder: Path, *settings: str) -> int:
    return main(["train", f"output_dir={folder}", *QUICK, *settings])


def steps(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(folder / "metrics.jsonl") if "reward" in row]


def log(folder: Path, step: int) -> list[dict[str, Any]]:
    return read_jsonl(folder / "rollouts" / f"step-{step:06d}.jsonl")


def logits_of(folder: Path, row: dict[str, Any]) -> torch.Tensor:
    """(tokens, V) float64, of the model that a run began with, without packing or cache."""
    model = load_model(str(folder / "base_model"), TrainConfig()).double()
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    logits: torch.Tensor = model(input_ids=ids).logits[0, len(row["prompt_ids"]) - 1 : -1].detach()
    return logits


@pytest.fixture(scope="module")
def nucleus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on what top_p keeps; the second has half of its groups from the first."""
    folder = tmp_path_factory.mktemp("runs") / "nucleus"
    assert train(folder, "top_p=0.9", "replay_fraction=0.5", "steps=2") == 0
    return folder


def test_run_on_a_nucleus_trains_the_truncated_policy(nucleus: Path) -> None:
    first, second = steps(nucleus)
    # Equal weights over equal sets, on the samples of just now: no log-ratio at all.
    assert first["kl"] == 0.0 == first["agro/logratio_abs_max"] and not first["skipped"]
    assert second["sample/replayed"] == 0.5 and 0 < abs(second["agro/sampler_log_ratio"]) < 2
    rows, left_out = log(nucleus, 1), 0
    for row in rows:
        sets = kept_ids.decode(row["kept_ids"])
        left_out += sum(len(kept) < 15 for kept in sets)
        expected = sum(
            float(z[kept].log_softmax(-1)[list(kept).index(token)])
            for z, kept, token in zip(
                logits_of(nucleus, row), sets, row["completion_ids"], strict=True
            )
        )
        assert row["sampling_logprob"] == pytest.approx(expected, abs=1e-4)
    assert left_out > len(rows)
    known = {tuple(row["completion_ids"]): row["kept_ids"] for row in rows}
    replayed = [row for row in log(nucleus, 2) if row["source"] == "replayed"]
    assert len(replayed) == 4
    assert all(row["kept_ids"] == known[tuple(row["completion_ids"])] for row in replayed)


def test_recorded_nucleus_is_scored_over_its_own_sets(
    nucleus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = nucleus / "rollouts" / "step-000001.jsonl"
    model = f"model={nucleus / 'base_model'}"
    offline = [model, "steps=1", "top_p=0.9", f"recorded=[{path}]"]
    assert train(tmp_path / "offline", *offline) == 0
    (ours,), theirs = steps(tmp_path / "offline"), steps(nucleus)[0]
    assert ours["kl"] == pytest.approx(0.0, abs=1e-5)
    assert ours["agro/sampler_log_ratio"] == pytest.approx(0.0, abs=1e-5)
    for name in ("loss", "grad_norm", "entropy"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name

    # A policy over all ids gives those completions less, and needs no sets.
    assert train(tmp_path / "whole", *offline[:2], offline[3]) == 0
    (whole,) = steps(tmp_path / "whole")
    assert whole["agro/sampler_log_ratio"] < -0.1 and whole["entropy"] > ours["entropy"]

    path = tmp_path / "whole" / "rollouts" / "step-000001.jsonl"
    capsys.readouterr()
    assert train(tmp_path / "refused", *offline[:3], f"recorded=[{path}]") == 2
    message = capsys.readouterr().err
    assert message.startswith("agro: recorded: expected kept_ids in") and message.count("\n") == 1
    assert not (tmp_path / "refused").exists()


def test_rollout_command_writes_what_a_run_on_a_nucleus_takes(
    nucleus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    model = f"model={nucleus / 'base_model'}"
    command = ["rollout", *QUICK, model, "top_p=0.9", f"--output={path}", "--prompts=2"]
    assert main(command) == 0
    assert train(tmp_path / "run", model, "steps=1", "top_p=0.9", f"recorded=[{path}]") == 0
    (row,) = steps(tmp_path / "run")
    assert row["agro/sampler_log_ratio"] == pytest.approx(0.0, abs=1e-5)


def test_first_tokens_are_scored_without_the_end_token_and_stop_strings_as_sampled(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    settings = ["steps=1", "min_new_tokens=3", "stop=[7]", "num_generations=8"]
    assert train(folder, *settings) == 0
    (row,) = steps(folder)
    assert row["agro/logratio_abs_max"] == 0.0 == row["kl"]
    assert row["completions/min_length"] > 3 and not row["skipped"]
    rows = log(folder, 1)
    for row in rows:
        assert "7" not in row["completion"][3:-1] and "kept_ids" not in row
        logits = logits_of(folder, row)
        logits[:3, END] = -torch.inf
        ids = torch.tensor(row["completion_ids"])
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, None])
        assert row["sampling_logprob"] == pytest.approx(float(logprobs.sum()), abs=1e-4)
    stopped = [row for row in rows if row["completion"].endswith("7")]
    assert stopped and all(row["finish"] == "stop" for row in stopped)
    assert all(END not in row["completion_ids"] for row in stopped)
