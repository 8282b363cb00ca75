"""Checks of a run before it begins."""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import GPT2Config, get_scheduler

from agro_train import setup
from agro_train.cli import main
from agro_train.config import TrainConfig
from agro_train.data.mix import plan
from agro_train.data.recorded import Recorded
from agro_train.policy.load import load_base, load_model, load_sizes, load_tokenizer
from agro_train.ranks import Ranks
from agro_train.run import Start
from agro_train.setup import (
    check_dtype,
    check_first_tokens,
    check_launch,
    check_ranks,
    make_optimizer,
    set_learning_rate,
    start_accelerator,
    warn_of_memory,
)
from tests.train.models import rollout, save_llama3_miniature, tiny_policy

pytestmark = pytest.mark.usefixtures("no_curves")


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


def share_moved(dtype: torch.dtype) -> float:
    """Of the weights, after one step of AdamW at a learning rate of 1e-6, with a gradient each."""
    policy = tiny_policy(dtype=dtype)
    optimizer, _ = make_optimizer(TrainConfig(learning_rate=1e-6), policy, Start())
    before = [p.detach().clone() for p in policy.parameters()]
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    optimizer.step()
    after = list(policy.parameters())
    moved = sum(int((a != b).sum()) for a, b in zip(after, before, strict=True))
    return moved / sum(p.numel() for p in after)


def test_weights_in_bfloat16_would_not_move_and_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert share_moved(torch.float32) > 0.98 and share_moved(torch.bfloat16) < 0.02
    arguments = [f"output_dir={tmp_path / 'run'}", "dtype=bfloat16", "learning_rate=1e-6"]
    assert main(["train", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith(
        "agro: dtype: expected float32 for weights that are trained, got bfloat16, where most "
        "steps of learning_rate=1e-06 are rounded away; dtype=float32 mixed_precision=bf16"
    )
    assert not (tmp_path / "run").exists()
    check_dtype(
        TrainConfig(dtype="bfloat16", use_peft=True)
    )  # frozen ones, under a float32 adapter


def test_run_that_computes_in_bfloat16_moves_its_weights(tmp_path: Path) -> None:
    settings = ["mixed_precision=bf16", "learning_rate=1e-6", "lr_scheduler_type=constant"]
    settings += ["reward=tests.train.reward_functions:even_share", "max_completion_length=6"]
    settings += ["prompts_per_step=2", "num_generations=4", "warm_start_steps=0", "warmup_steps=0"]
    assert main(["train", f"output_dir={tmp_path}", *settings, "steps=1", "eval_every=0"]) == 0
    before = load_file(tmp_path / "base_model" / "model.safetensors")
    after = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    moved = sum(int((after[name] != before[name]).sum()) for name in after)
    assert moved > 0.9 * sum(weight.numel() for weight in after.values())


def test_completion_that_ends_before_min_new_tokens_is_refused() -> None:
    rows = (replace(rollout("a", [3], [4, 7, 1]), source="recorded"),) * 2
    data = Recorded((), (rows,))
    demonstrated = replace(rows[0], source="demonstration")
    check_first_tokens(TrainConfig(min_new_tokens=2), data, [demonstrated], {1})
    for given, extra, source in ((data, [], "recorded"), (Recorded(), rows[:1], "recorded")):
        with pytest.raises(ValueError, match=f"among the first 3 of a {source} completion"):
            check_first_tokens(TrainConfig(min_new_tokens=3), given, extra, {1})
    # What each of its tokens was drawn from is known, and the end token was among it.
    check_first_tokens(TrainConfig(min_new_tokens=3, top_k=4), data, [], {1})


def test_a_plan_beyond_the_gpu_is_said_and_nothing_else() -> None:
    config = TrainConfig(model="tiny", max_completion_length=24)
    said: list[str] = []
    warn_of_memory(config, 1, 80e9, said.append)
    assert said == []
    warn_of_memory(config, 1, 2.01e9, said.append)
    (line,) = said
    assert line.startswith("memory: 0.")
    assert "of a GPU's 2.0 GB are predicted for the stage" in line
    assert "the run goes on, see agro plan" in line
    warn_of_memory(replace(config, model="nobody/nothing"), 1, 2e9, said.append)
    assert said[1].startswith("memory was not planned: model: expected one whose config.json")


def test_a_plan_of_any_model_never_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=64)
    gpt2.save_pretrained(tmp_path)
    config = TrainConfig(model=str(tmp_path), max_prompt_length=8, max_completion_length=9)
    said: list[str] = []
    warn_of_memory(config, 1, 2.0001e9, said.append)
    assert said[0].startswith("memory: 0.")

    def fail(*_: object) -> None:
        raise AttributeError("no such\nmodule")

    monkeypatch.setattr(setup, "plan_memory", fail)
    warn_of_memory(config, 1, 80e9, said.append)
    assert said[1:] == ["memory was not planned: AttributeError: no such module"]
