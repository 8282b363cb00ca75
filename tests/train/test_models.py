"""A run's models and their optimiser."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM, get_scheduler

from agro_train.cli import main
from agro_train.config import TrainConfig
from agro_train.models import name_reference, set_learning_rate
from agro_train.policy.load import identity, load_base, load_model, load_sizes, load_tokenizer
from tests.train.models import SIZES, save_llama3_miniature

pytestmark = pytest.mark.usefixtures("no_curves")


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


def test_run_that_computes_in_bfloat16_moves_its_weights(tmp_path: Path) -> None:
    settings = ["mixed_precision=bf16", "learning_rate=1e-6", "lr_scheduler_type=constant"]
    settings += ["reward=tests.train.reward_functions:even_share", "max_completion_length=6"]
    settings += ["prompts_per_step=2", "num_generations=4", "warm_start_steps=0", "warmup_steps=0"]
    assert main(["train", f"output_dir={tmp_path}", *settings, "steps=1", "eval_every=0"]) == 0
    before = load_file(tmp_path / "base_model" / "model.safetensors")
    after = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    moved = sum(int((after[name] != before[name]).sum()) for name in after)
    assert moved > 0.9 * sum(weight.numel() for weight in after.values())


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


def test_a_reference_with_windows_is_not_found_by_the_name_it_had_without() -> None:
    sizes = {**SIZES, "vocab_size": 15, "num_key_value_heads": 2, "intermediate_size": 48}
    for window, expected in ((4, "; within windows"), (None, "")):
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=window))
        assert name_reference(model, None, TrainConfig(), set()) == identity(model) + expected
        early = name_reference(model, None, TrainConfig(min_new_tokens=2), {7, 1})
        assert early == identity(model) + expected + "; first 2 tokens without [1, 7]"
