"""What a step's completions tell by themselves, as columns of metrics.jsonl."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from agro_train.types import Rollout


def describe(rollouts: Sequence[Rollout], step: int, weights: Sequence[float]) -> dict[str, float]:
    """Columns of metrics.jsonl that the completions alone tell. Where TRL has a name, it is TRL's.

    `sample/staleness_*`: optimiser steps between the policy that sampled a completion and the one
    that learns from it, over this run's own (fresh and replayed) completions; `effective` is the
    mean by each one's share of the gradient, its |coefficient| in `weights`.
    """
    lengths = [len(rollout.completion_ids) for rollout in rollouts]
    ended = [len(rollout.completion_ids) for rollout in rollouts if rollout.finish == "stop"]
    ages = [None if r.source == "recorded" or r.step is None else step - r.step for r in rollouts]
    own = [age for age in ages if age is not None]
    moved = [(age, w) for age, w in zip(ages, weights, strict=True) if age is not None and w > 0]
    metrics = {
        "reward": mean_of([r.reward for r in rollouts]),
        "reward_std": spread_of([r.reward for r in rollouts]),
        "rewards/timeout_rate": share(rollouts, lambda r: r.failure == "timeout"),
        "rewards/error_rate": share(rollouts, lambda r: r.failure == "error"),
        "completions/mean_length": fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/mean_terminated_length": fmean(ended) if ended else math.nan,
        "completions/min_terminated_length": float(min(ended)) if ended else math.nan,
        "completions/max_terminated_length": float(max(ended)) if ended else math.nan,
        "completions/clipped_ratio": share(rollouts, lambda r: r.finish == "length"),
        "tokens": float(sum(lengths)),
        "sample/recorded": share(rollouts, lambda r: r.source == "recorded"),
        "sample/replayed": share(rollouts, lambda r: r.source == "replayed"),
        "sample/staleness_mean": fmean(own) if own else math.nan,
        "sample/staleness_max": float(max(own)) if own else math.nan,
        "sample/staleness_effective": (
            sum(age * w for age, w in moved) / sum(w for _, w in moved) if moved else math.nan
        ),
    }
    for name in sorted({name for rollout in rollouts for name in rollout.rewards}):
        values = [r.rewards.get(name) for r in rollouts]
        metrics[f"rewards/{name}/mean"] = mean_of(values)
        metrics[f"rewards/{name}/std"] = spread_of(values)
    return metrics


def share(rollouts: Sequence[Rollout], holds: Callable[[Rollout], bool]) -> float:
    return sum(map(holds, rollouts)) / len(rollouts)


def mean_of(values: Sequence[float | None]) -> float:
    """Mean of those that are there; NaN if none is."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else math.nan


def spread_of(values: Sequence[float | None]) -> float:
    """Standard deviation (n - 1) of those that are there; NaN of fewer than two."""
    there = [value for value in values if value is not None]
    return stdev(there) if len(there) > 1 else math.nan
