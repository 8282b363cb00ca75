"""Checks of a run before it begins."""

from datetime import timedelta

import pytest
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState

from agro_train.config import TrainConfig
from agro_train.data.mix import plan
from agro_train.setup import check_context, check_launch, check_ranks, readable, start_accelerator
from agro_train.types import Prompt

PROMPTS = [Prompt("a", "1+2=", (3, 4, 5), {"answer": "3"}), Prompt("b", "1", (3,), {"answer": "1"})]


def test_completions_must_fit_the_context() -> None:
    config = TrainConfig(max_completion_length=20)
    check_context(config, PROMPTS, 23)
    check_context(config, PROMPTS, None)
    with pytest.raises(ValueError, match="max_completion_length: expected at most 19, .* got 20"):
        check_context(config, PROMPTS, 22)


def test_ranks_wait_for_hours_while_the_main_one_writes() -> None:
    accelerator = start_accelerator(TrainConfig())
    assert accelerator.init_handler.timeout >= timedelta(hours=1)  # NCCL's own is 10 minutes


def test_gold_answers_of_which_none_can_be_read_are_refused() -> None:
    hopeless = [Prompt("a", "why?", (3,), {"answer": "no answer here"})]
    config = TrainConfig(reward=["math"])
    assert readable(PROMPTS, config, Accelerator(cpu=True)) == PROMPTS
    with pytest.raises(ValueError, match="data: expected gold answers .* got none in 1 prompts"):
        readable(hopeless, config, Accelerator(cpu=True))


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
    class TwoRanks:
        num_processes = 2

    settings = {"prompts_per_step": 4, "replay_max_staleness": 1, "steps": 3}
    for fraction, enough in ((0.5, True), (0.75, False), (1.0, True)):
        config = TrainConfig(replay_fraction=fraction, **settings)  # type: ignore[arg-type]
        if enough:
            check_ranks(config, TwoRanks(), 2, plan(config))  # type: ignore[arg-type]
        else:
            with pytest.raises(ValueError, match="fresh prompts in a step: .* got 1"):
                check_ranks(config, TwoRanks(), 2, plan(config))  # type: ignore[arg-type]
