"""The least time of a step, by datasheets."""

from dataclasses import replace

from agro_train.config import TrainConfig
from agro_train.plan.machine import Machine
from agro_train.plan.memory import plan, step_tokens
from agro_train.plan.speed import speed
from agro_train.policy import tiny

CONFIG = TrainConfig(model="tiny", max_prompt_length=8, max_completion_length=9, fsdp=True)
SMALL = tiny.build_config(15)
MACHINE = Machine(gpus=2, network=1.0)


def test_gathered_weights_of_bfloat16_cost_two_bytes_by_either_setting() -> None:
    mixed = replace(CONFIG, mixed_precision="bf16")
    for config in (mixed, replace(CONFIG, dtype="bfloat16")):
        found = plan(config, MACHINE, SMALL)
        weights = found.weights
        micro = -(-step_tokens(config, 2) // found.micro_batch)
        sent = micro * (4 * weights.count * 2 + 4 * weights.trained_count) / 2
        assert speed(config, MACHINE, SMALL, found).network == sent / 1e9


def test_no_time_is_predicted_for_float32() -> None:
    found = plan(CONFIG, MACHINE, SMALL)
    assert speed(CONFIG, MACHINE, SMALL, found).update is None
