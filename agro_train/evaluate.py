"""Held-out prompts: one greedy completion each, and sampled ones at the training temperature.

A completion passes if the first reward function gives it 1.0 or more.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from agro_train.config import TrainConfig
from agro_train.engines.engine import Engine
from agro_train.rewards.functions import Rewards, score
from agro_train.seeds import derive_seed
from agro_train.types import Prompt, Rollout


@dataclass(frozen=True)
class Evaluation:
    greedy: list[Rollout]
    sampled: list[Rollout]


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % interval, by bootstrap over the prompts."""

    value: float
    low: float
    high: float


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    numbers: Sequence[int],
    rewards: Rewards,
    config: TrainConfig,
    step: int | None,
) -> Evaluation:
    """Scored completions of the prompts. Every evaluation of a run samples with the same seeds.

    Args:
        numbers: of each prompt among all held-out ones, of which this rank may have a share.
        step: how many steps the policy has taken.
    """
    groups: list[list[Rollout]] = []
    for num_generations, temperature in ((1, 0.0), (config.eval_generations, config.temperature)):
        rollouts: list[Rollout] = []
        if num_generations:
            rollouts = engine.complete(
                prompts,
                seeds=[derive_seed(config.seed, "evaluate", number) for number in numbers],
                num_generations=num_generations,
                temperature=temperature,
                step=step,
            )
        groups.append(score(rollouts, rewards) if rollouts else [])
    return Evaluation(*groups)


def summarise(evaluation: Evaluation) -> dict[str, float]:
    """Mean reward of greedy decoding (`eval_accuracy`) and of sampling (`eval_reward`), mean length
    of the greedy completions in tokens (`eval_length`), share cut off (`eval_truncated_rate`), and
    the share of sampled completions that pass (`eval_pass@1`) with that of prompts for which any of
    their n does (`eval_pass@n`)."""
    greedy, sampled = evaluation.greedy, evaluation.sampled
    metrics = {
        "eval_accuracy": mean_reward(greedy),
        "eval_length": sum(len(r.sampled_ids) for r in greedy) / len(greedy),
        "eval_truncated_rate": sum(r.finish == "length" for r in greedy) / len(greedy),
    }
    if sampled:
        metrics["eval_reward"] = mean_reward(sampled)
        prompts = by_prompt(evaluation)
        for k in sorted({1, len(prompts[0])}):
            values = [pass_at_k(len(rows), sum(map(passes, rows)), k) for rows in prompts]
            metrics[f"eval_pass@{k}"] = sum(values) / len(values)
    return metrics


def estimates(evaluation: Evaluation, rewards: Rewards, config: TrainConfig) -> dict[str, Estimate]:
    """greedy, pass@k and maj@k for k = 1, 2, 4, ... and the number of sampled completions.

    The first reward function says what a completion's answer is, which it votes for.
    """
    seed = derive_seed(config.seed, "bootstrap")
    per_prompt = {"greedy": [float(passes(rollout)) for rollout in evaluation.greedy]}
    if evaluation.sampled:
        prompts = by_prompt(evaluation)
        answers = rewards[0].reward.answers(evaluation.sampled)
        n = config.eval_generations
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "majority"))
        ks = sorted({2**i for i in range(n.bit_length())} | {n})
        for k in ks:
            per_prompt[f"pass@{k}"] = [pass_at_k(n, sum(map(passes, p)), k) for p in prompts]
        for k in ks[1:]:  # the majority of one is that one
            per_prompt[f"maj@{k}"] = [
                majority_at_k(
                    answers[i * n : (i + 1) * n], [*map(passes, rows)], k, generator=generator
                )
                for i, rows in enumerate(prompts)
            ]
    return {
        name: Estimate(sum(values) / len(values), *bootstrap_interval(values, seed=seed))
        for name, values in per_prompt.items()
    }


def passes(rollout: Rollout) -> bool:
    first = next(iter(rollout.rewards.values()), None)
    return first is not None and first >= 1.0


def by_prompt(evaluation: Evaluation) -> list[list[Rollout]]:
    """The sampled completions, prompt by prompt in the order of the greedy ones."""
    n = len(evaluation.sampled) // len(evaluation.greedy)
    return [evaluation.sampled[i : i + n] for i in range(0, len(evaluation.sampled), n)]


def mean_reward(rollouts: Sequence[Rollout]) -> float:
    """Mean over the completions that have a reward; NaN if none has."""
    rewards = [r.reward for r in rollouts if r.reward is not None]
    return sum(rewards) / len(rewards) if rewards else float("nan")


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that k of the n completions, drawn without replacement, hold a correct one: the
    unbiased estimate 1 - C(n - c, k) / C(n, k) of passing with k samples (Chen et al. 2021)."""
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to the {n} completions of a prompt, got {k}")
    return 1.0 - comb(n - correct, k) / comb(n, k)


def majority_at_k(
    answers: Sequence[Hashable | None],
    correct: Sequence[bool],
    k: int,
    *,
    generator: torch.Generator,
    draws: int = 200,
) -> float:
    """Probability that the most frequent answer of k completions is correct.

    The mean over all choices of k of the n completions, or over `draws` random ones where there are
    more. An answer of None does not vote; answers with equally many votes are as likely as each
    other; without any vote the prompt is failed. Equal answers are correct together: the share of
    correct ones counts.
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to the {n} completions of a prompt, got {k}")
    picks: list[Sequence[int]] = []
    if comb(n, k) <= draws:
        picks.extend(combinations(range(n), k))
    else:
        order = torch.rand(draws, n, generator=generator, dtype=torch.float64).argsort(1)
        picks.extend(order[:, :k].tolist())
    votes = [_majority([answers[i] for i in pick], [correct[i] for i in pick]) for pick in picks]
    return sum(votes) / len(votes)


def _majority(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    right = Counter(a for a, good in zip(answers, correct, strict=True) if good)
    winners = [answer for answer, count in votes.items() if count == most]
    return sum(right[answer] / most for answer in winners) / len(winners)


def bootstrap_interval(
    values: Sequence[float], *, seed: int, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the mean of `values`, one a prompt, over resamples of the prompts."""
    data = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means: Tensor = torch.stack(
        [
            data[torch.randint(len(data), (len(data),), generator=generator)].mean()
            for _ in range(resamples)
        ]
    )
    tail = (1 - level) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
