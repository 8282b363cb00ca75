"""Checks of a run before it begins."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from transformers import get_scheduler

from agro_train.cli import main
from agro_train.config import TrainConfig
from agro_train.data.mix import plan
from agro_train.policy.load import load_base, load_model, load_sizes, load_tokenizer
from agro_train.ranks import Ranks
from agro_train.setup import check_launch, check_ranks, set_learning_rate, start_accelerator
from tests.train.models import save_llama3_miniature


def test_ranks_wait_for_hours_while_the_main_one_writes() -> None:
    accelerator = start_accelerator(TrainConfig())
    assert accelerator.init_handler.timeout >= timedelta(hours=1)  # NCCL's own is 10 minutes


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps 1, got 4"),
        ("ACCELERATE_USE_FSDP", "true", "expected distributed_type MULTI_GPU .* got FSDP"),
    ],
)
def test_launchers_that_would_change_the_gradient_are_refused(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_launch(Accelerator(cpu=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv(variable, value)
    accelerator = Accelerator(cpu=True)
    if variable == "ACCELERATE_USE_FSDP":  # which accelerate heeds on several devices only
        accelerator.state.distributed_type = DistributedType.FSDP
    with pytest.raises(ValueError, match=message):
        check_launch(accelerator)


def test_every_rank_needs_a_fresh_group_in_steps_that_have_any() -> None:
    settings = {"prompts_per_step": 4, "replay_max_staleness": 1, "steps": 3}
    for fraction, enough in ((0.5, True), (0.75, False), (1.0, True)):
        config = TrainConfig(replay_fraction=fraction, **settings)  # type: ignore[arg-type]
        if enough:
            check_ranks(config, Ranks(0, 2), 2, plan(config))
        else:
            with pytest.raises(ValueError, match="fresh prompts in a step: .* got 1"):
                check_ranks(config, Ranks(0, 2), 2, plan(config))


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_schedule_with_another_learning_rate_is_that_of_a_run_that_always_had_it(
    kind: str,
) -> None:
    def begin(highest: float) -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW([torch.zeros(1)], lr=highest)
        return optimizer, get_scheduler(kind, optimizer, 2, 6)

    (optimizer, scheduler), (other, expected) = begin(1e-3), begin(5e-2)
    for step in range(6):
        if step == 3:
            set_learning_rate(optimizer, scheduler, 5e-2)
        if step >= 3:
            assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
            assert scheduler.get_last_lr() == expected.get_last_lr()
        for each in (optimizer, scheduler, other, expected):
            each.step()


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
        ("recorded=[absent.jsonl]", "agro: data: expected a JSONL or parquet file, got 'absent"),
        ("max_completion_length=8", "agro: model: expected"),
    ):
        assert main(["train", "tiny-arithmetic", *settings, setting]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_sizes_are_those_of_the_model_that_is_loaded(tmp_path: Path) -> None:
    folder = save_llama3_miniature(tmp_path / "model")
    tokenizer = load_tokenizer("tiny")
    tiny_model, _ = load_base("tiny", TrainConfig(warm_start_steps=0), tokenizer)
    for source, model in (
        (str(folder), load_model(str(folder), TrainConfig())),
        ("tiny", tiny_model),
    ):
        found = model.config.vocab_size, model.config.max_position_embeddings
        assert load_sizes(source) == found
        assert model.get_input_embeddings().weight.shape[0] == found[0]
