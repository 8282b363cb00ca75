"""A model to sample from, with the prompts of its configuration: what rollout and eval share."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from agro_train import durable
from agro_train.config import TrainConfig
from agro_train.engines.transformers_engine import TransformersEngine
from agro_train.engines.turns import Dialogue
from agro_train.environments.pool import Environments
from agro_train.policy import checkpoint
from agro_train.policy.attention import check_attention
from agro_train.policy.load import (
    end_tokens,
    load_base,
    load_sizes,
    load_tokenizer,
    set_matmul_precision,
)
from agro_train.questions import Questions, check_files, load_questions, start_dialogue
from agro_train.refusal import Refusal, writing_to


@dataclass(frozen=True)
class Sampler:
    """A model to sample from, and the prompts of its configuration."""

    config: TrainConfig
    source: str  # where the weights are
    model: PreTrainedModel
    tokenizer: Any
    step: int | None  # optimiser steps the weights have taken; None: not a run's checkpoint
    questions: Questions
    dialogue: Dialogue | None  # with the environment, where there is one

    def engine(self) -> TransformersEngine:
        """transformers', whatever sampled in the run."""
        ends = end_tokens(self.model, self.tokenizer)
        return TransformersEngine(
            lambda function: function(self.model), self.tokenizer, ends, self.config, self.dialogue
        )


def load_sampler(config: TrainConfig) -> Sampler:
    """Loads `config.model`, which may also be a run's folder, for its newest checkpoint."""
    check_files(config, recorded=False)
    check_attention(config.attn_implementation)
    environments = Environments.of(config)
    source, step = checkpoint.find_model(config.model, print)
    set_matmul_precision(config.matmul_precision)
    tokenizer, sizes = load_tokenizer(source, config.chat_template), load_sizes(source)
    of_source = replace(config, model=source)
    questions = load_questions(of_source, tokenizer, sizes.context, gold_needed=False)
    dialogue = start_dialogue(config, environments, tokenizer, sizes.context, questions)
    model, _ = load_base(source, config, tokenizer)
    return Sampler(
        config=config,
        source=source,
        model=model.to("cuda" if torch.cuda.is_available() else "cpu"),
        tokenizer=tokenizer,
        step=step,
        questions=questions,
        dialogue=dialogue,
    )


def in_words(left_out: Mapping[str, int]) -> str:
    """Why prompts were left out, and how many."""
    return (
        f"{left_out['too_long']} as too long, "
        f"{left_out['unreadable_gold']} as their gold answer cannot be parsed"
    )


def check_free(path: Path, key: str) -> None:
    """Raises Refusal, naming the setting, where something is at `path` or nothing can be written
    beside it."""
    if path.exists():
        raise Refusal(
            f"{key}: expected a new name, got {str(path)!r}, which exists; choose another"
        )
    with writing_to(path.parent, key):
        durable.check_writable(path.parent)
