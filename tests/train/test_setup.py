"""A run before it begins."""

import json
from datetime import timedelta
from pathlib import Path

import pytest

from agro_train.cli import main
from agro_train.config import TrainConfig
from agro_train.setup import start_accelerator
from tests.train.models import save_llama3_miniature

pytestmark = pytest.mark.usefixtures("no_curves")


def test_ranks_wait_for_hours_while_the_main_one_writes() -> None:
    accelerator = start_accelerator(TrainConfig())
    assert accelerator.init_handler.timeout >= timedelta(hours=1)  # NCCL's own is 10 minutes


def test_data_are_checked_before_the_weights_are_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A large model takes minutes; here it would fail, for its weights are missing."""
    model = save_llama3_miniature(tmp_path / "model")
    (model / "model.safetensors").unlink()
    settings = [f"model={model}", f"output_dir={tmp_path / 'run'}", "eval_prompts=0"]
    for setting, message in (
        ("data=nowhere.jsonl", "agro: data: expected"),
        ("max_completion_length=1024", "agro: max_completion_length: expected at most"),
        ("recorded=[absent.jsonl]", "agro: recorded: expected a file of rows, got 'absent"),
        ("max_completion_length=8", "agro: model: expected"),
    ):
        assert main(["train", "tiny-arithmetic", *settings, setting]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_first_line_counts_what_of_recorded_data_is_left_out_and_tokenised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("1+2=", "3"), ("1+2=", "4"), ("2+2=", "4"), ("3+2=", "5"), ("3+2=", "5" * 200)]
    path = tmp_path / "r.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": p, "completion": c, "reward": 1}) + "\n" for p, c in rows)
    )
    small = ["warm_start_steps=0", "steps=1", "prompts_per_step=1", "eval_every=0", "save_every=0"]
    assert main(["train", f"output_dir={tmp_path / 'run'}", f"recorded={path}", *small]) == 0
    assert (
        "1 recorded groups, 1 left out of one completion, 1 left out as too long, 2 of their "
        "completions tokenised anew from text" in " ".join(capsys.readouterr().out.split())
    )
