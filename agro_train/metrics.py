"""The columns of metrics.jsonl that a training step writes: of its completions and its update."""

import math
import resource
import sys
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

import torch

from agro_kernels import AgroStats
from agro_train.algorithm import coefficient_sizes
from agro_train.config import TrainConfig
from agro_train.types import Rollout, Scores


def describe(rollouts: Sequence[Rollout], step: int, weights: Sequence[float]) -> dict[str, float]:
    """The columns that need only the completions. Where TRL has a name, it is TRL's.

    Rewards and lengths are of what some policy made: worked answers of the dataset do not count,
    nor do an environment's tokens. How many these are in a completion, and how many turns the model
    has, is `environment/*`.

    `sample/staleness_*`: optimiser steps between the policy that sampled a completion and the one
    that learns from it, over this run's own (fresh and replayed) completions; `effective` is the
    mean weighted by |coefficient|, each one's part of the gradient, in `weights`.
    """
    tokens = sum(len(rollout.sampled_ids) for rollout in rollouts)
    demonstrated = proportion(rollouts, lambda r: r.demonstrated)
    made = [(r, w) for r, w in zip(rollouts, weights, strict=True) if not r.demonstrated]
    rollouts, weights = [r for r, _ in made], [w for _, w in made]
    lengths = [len(rollout.sampled_ids) for rollout in rollouts]
    ended = [len(rollout.sampled_ids) for rollout in rollouts if rollout.finish == "stop"]
    ages = [None if r.source == "recorded" or r.step is None else step - r.step for r in rollouts]
    own = [age for age in ages if age is not None]
    moved = [(age, w) for age, w in zip(ages, weights, strict=True) if age is not None and w > 0]
    metrics = {
        "reward": mean_of([r.reward for r in rollouts]),
        "reward_std": std_of([r.reward for r in rollouts]),
        "rewards/timeout_rate": proportion(rollouts, lambda r: r.failure == "timeout"),
        "rewards/error_rate": proportion(rollouts, lambda r: r.failure == "error"),
        "completions/mean_length": fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/mean_terminated_length": fmean(ended) if ended else math.nan,
        "completions/min_terminated_length": float(min(ended)) if ended else math.nan,
        "completions/max_terminated_length": float(max(ended)) if ended else math.nan,
        "completions/clipped_ratio": proportion(rollouts, lambda r: r.finish == "length"),
        "tokens": float(tokens),
        "sample/recorded": proportion(rollouts, lambda r: r.source == "recorded"),
        "sample/replayed": proportion(rollouts, lambda r: r.source == "replayed"),
        "sample/demonstrations": demonstrated,
        "sample/staleness_mean": fmean(own) if own else math.nan,
        "sample/staleness_max": float(max(own)) if own else math.nan,
        "sample/staleness_effective": (
            sum(age * w for age, w in moved) / sum(w for _, w in moved) if moved else math.nan
        ),
    }
    several = [r for r in rollouts if r.turns is not None]
    if several:
        metrics["environment/turns"] = fmean(len(r.sampled) for r in several)
        metrics["environment/tokens"] = fmean(
            len(r.completion_ids) - len(r.sampled_ids) for r in several
        )
    for name in sorted({name for rollout in rollouts for name in rollout.rewards}):
        values = [r.rewards.get(name) for r in rollouts]
        metrics[f"rewards/{name}/mean"] = mean_of(values)
        metrics[f"rewards/{name}/std"] = std_of(values)
    return metrics


def proportion(rollouts: Sequence[Rollout], holds: Callable[[Rollout], bool]) -> float:
    """Of the rollouts, those for which `holds` is true; 0 to 1."""
    return sum(map(holds, rollouts)) / len(rollouts)


def mean_of(values: Sequence[float | None]) -> float:
    """Mean of those that are there; NaN if none is."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else math.nan


def std_of(values: Sequence[float | None]) -> float:
    """Standard deviation (n - 1) of those that are there; NaN of fewer than two."""
    there = [value for value in values if value is not None]
    return stdev(there) if len(there) > 1 else math.nan


def frac_reward_zero_std(scores: Scores) -> float:
    """Proportion of groups whose rewards are all equal. They still learn: towards the reference."""
    groups = scores.groups.unique(return_inverse=True)[1]
    count = int(groups.max()) + 1
    highest, lowest = torch.full((2, count), math.nan, dtype=torch.float64)
    finite = scores.rewards.isfinite()
    index, values = groups[finite], scores.rewards[finite]
    highest = highest.scatter_reduce(0, index, values, "amax", include_self=False)
    lowest = lowest.scatter_reduce(0, index, values, "amin", include_self=False)
    return float((highest == lowest).double().mean())


def measure(
    scores: Scores, stats: AgroStats, config: TrainConfig, grad_norm: float, skipped: bool
) -> dict[str, float]:
    """The columns that need the update: its scores, AGRO's statistics of them, and its gradient."""
    log_ratio = scores.logprobs - scores.ref_logprobs
    mismatch = {}
    if len(scores.mismatch):
        mismatch["sampling/sampling_logp_difference/mean"] = float(scores.mismatch.mean())
        mismatch["sampling/sampling_logp_difference/max"] = float(scores.mismatch.max())
    return {
        "loss": float(stats.variance) / (2 * config.beta),
        "grad_norm": grad_norm,
        # Mean log(policy / reference), nats a completion: the KL where the policy did the sampling.
        # Not the k3 estimator, exp(-l) - 1 + l: one token that the policy has nearly given up would
        # dominate the mean.
        "kl": float(stats.log_ratio),
        "kl_per_token": float(log_ratio.sum()) / int(scores.num_tokens),
        "entropy": float(scores.entropy) / int(scores.num_tokens),
        "agro/regularised_reward": float(stats.reward) - config.beta * float(stats.log_ratio),
        "agro/variance": float(stats.variance),
        "agro/kl_to_optimum": float(stats.kl_to_optimum),
        "agro/lr_dominance": float(stats.lr_dominance),
        "agro/logratio_abs_max": float(log_ratio.abs().max()),
        "agro/taper_weight": float(stats.taper_weight),
        "agro/sampler_log_ratio": float(stats.sampler_log_ratio),
        **coefficient_sizes(scores, config),
        "frac_reward_zero_std": frac_reward_zero_std(scores),
        "groups": float(stats.num_groups),
        "short_groups": float(stats.num_short_groups),
        "dropped": float(stats.num_dropped),
        "skipped": float(skipped),
        **mismatch,
    }


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has held so far, in 1e9 bytes: on a CUDA device what torch
    allocated there, on a CPU the resident set.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
