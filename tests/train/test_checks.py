"""What is refused of a run before it begins, and what is said of its memory."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from transformers import GPT2Config

from agro_train import checks
from agro_train.checks import (
    check_dtype,
    check_first_tokens,
    check_launch,
    check_ranks,
    warn_of_memory,
)
from agro_train.cli import main
from agro_train.config import TrainConfig
from agro_train.data.mix import plan
from agro_train.data.recorded import Recorded
from agro_train.models import make_optimizer
from agro_train.ranks import Ranks
from agro_train.run import Start
from tests.train.models import rollout, tiny_policy


def test_launcher_that_accumulates_gradients_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_launch(Accelerator(cpu=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="gradient_accumulation_steps 1, got 4"):
        check_launch(Accelerator(cpu=True))


def test_launcher_that_shards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    accelerator = Accelerator(cpu=True)
    # accelerate heeds the variable on several devices only.
    accelerator.state.distributed_type = DistributedType.FSDP
    with pytest.raises(ValueError, match="expected distributed_type MULTI_GPU .* got FSDP"):
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

    monkeypatch.setattr(checks, "plan_memory", fail)
    warn_of_memory(config, 1, 80e9, said.append)
    assert said[1:] == ["memory was not planned: AttributeError: no such module"]
