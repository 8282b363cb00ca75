"""Held-out prompts: one greedy completion each, and sampled ones at the training temperature."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from agro_train.config import TrainConfig
from agro_train.data import derive_seed
from agro_train.rewards import RewardFunction, score
from agro_train.rollout import generate
from agro_train.types import Prompt, Rollout


@dataclass(frozen=True)
class Evaluation:
    greedy: list[Rollout]
    sampled: list[Rollout]


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    reward: RewardFunction,
    config: TrainConfig,
    end_tokens: set[int],
    step: int,
) -> Evaluation:
    """Scored completions of the prompts. Every evaluation of a run samples with the same seed."""
    groups: list[list[Rollout]] = []
    for num_generations, temperature in ((1, 0.0), (config.eval_generations, config.temperature)):
        rollouts: list[Rollout] = []
        if num_generations:
            rollouts = generate(
                model,
                tokenizer,
                prompts,
                num_generations=num_generations,
                temperature=temperature,
                max_completion_length=config.max_completion_length,
                batch_size=config.generation_batch_size,
                end_tokens=end_tokens,
                seed=derive_seed(config.seed, "evaluate"),
                step=step,
            )
        groups.append(score(rollouts, reward) if rollouts else [])
    return Evaluation(*groups)


def summarise(evaluation: Evaluation) -> dict[str, float]:
    """Mean reward of greedy decoding (`eval_accuracy`) and of sampling (`eval_reward`), and mean
    length of the greedy completions in tokens (`eval_length`)."""
    greedy, sampled = evaluation.greedy, evaluation.sampled
    metrics = {
        "eval_accuracy": mean_reward(greedy),
        "eval_length": sum(len(r.completion_ids) for r in greedy) / len(greedy),
    }
    if sampled:
        metrics["eval_reward"] = mean_reward(sampled)
    return metrics


def mean_reward(rollouts: Sequence[Rollout]) -> float:
    """Mean over the completions that have a reward; NaN if none has."""
    rewards = [r.reward for r in rollouts if r.reward is not None]
    return sum(rewards) / len(rewards) if rewards else float("nan")
