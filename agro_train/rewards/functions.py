"""Rewards: functions from completions to numbers, built in or the user's own, and their sum.

A reward function has TRL's signature: keyword arguments `prompts`, `completions`, `completion_ids`
and every column of the dataset, each a list with one entry per completion; it returns a list of
numbers, None where it has no opinion. The reward is the weighted sum of the opinions; a completion
without any is dropped from its group, and counted.

No reward function can cost a run a step. The user's own are called by name in a process of their
own, one a function and rank, which keeps whatever they keep between calls. One that raises, ends
its process or returns something else is called again prompt by prompt, and so is one that takes too
long, wherever it waits: its process is killed, and another started. The prompts for which it fails
again get no reward, are counted (`rewards/error_rate`, `rewards/timeout_rate`) and named in a
warning.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from agro_train.config import TrainConfig
from agro_train.refusal import Refusal
from agro_train.rewards.math_verify import check, gold_text, parseable
from agro_train.rewards.number import number_reward
from agro_train.rewards.own import Outcome, OwnFunction, arguments
from agro_train.types import Prompt, Rollout


@dataclass(frozen=True)
class Part:
    """One function of the sum, by the name its metrics go by."""

    name: str
    weight: float
    outcomes: Callable[[Sequence[Rollout]], list[Outcome]]


Rewards = tuple[Part, ...]


def load_rewards(config: TrainConfig) -> Rewards:
    """The configured functions and their weights."""
    names = [spec.rpartition(":")[2] for spec in config.reward]
    if len(set(names)) < len(names):  # two modules, one function name
        names = config.reward
    weights = config.reward_weights or [1.0] * len(config.reward)
    return tuple(
        Part(name, weight, _outcomes(spec, config))
        for name, weight, spec in zip(names, weights, config.reward, strict=True)
    )


def _outcomes(spec: str, config: TrainConfig) -> Callable[[Sequence[Rollout]], list[Outcome]]:
    if spec == "math":
        return lambda rollouts: math_outcomes(rollouts, config.math_timeout_s)
    if spec == "number":
        return lambda rollouts: [Outcome(r) for r in number_reward(**arguments(rollouts))]
    return OwnFunction.start(spec, config.reward_timeout_s)


def math_outcomes(rollouts: Sequence[Rollout], timeout_s: float) -> list[Outcome]:
    """A completion whose check was lost has reward 0 all the same: nobody could read it."""
    golds = [gold_text(rollout.columns) or "" for rollout in rollouts]
    return [
        Outcome(found.reward, found.failure)
        for found in check(golds, [rollout.completion for rollout in rollouts], timeout_s)
    ]


def check_columns(spec: str, prompts: Sequence[Prompt]) -> None:
    """Raises Refusal where a prompt lacks what a built-in reward compares with."""
    needs = {"number": ("answer",), "math": ("solution", "answer")}.get(spec, ())
    for prompt in prompts if needs else ():
        values = (prompt.columns.get(name) for name in needs)
        gold = next((value for value in values if value is not None), None)
        if not isinstance(gold, str) or (spec == "number" and not re.fullmatch(r"-?\d+", gold)):
            kind = "an integer as text" if spec == "number" else "text"
            raise Refusal(
                f"reward: expected {kind} in column {' or '.join(needs)} for reward={spec}, got "
                f"{gold!r} for the prompt {prompt.text[:40]!r}"
            )


def with_readable_gold(prompts: Sequence[Prompt], config: TrainConfig) -> list[Prompt]:
    """The prompts whose gold answer math-verify can parse; all of them without reward=math."""
    if "math" not in config.reward:
        return list(prompts)
    golds = [gold_text(prompt.columns) or "" for prompt in prompts]
    good = parseable(golds, config.math_timeout_s)
    return [prompt for prompt, keep in zip(prompts, good, strict=True) if keep]


def score(rollouts: Sequence[Rollout], rewards: Rewards) -> list[Rollout]:
    """The same rollouts with their rewards."""
    if not rollouts:
        return []
    by_part = [part.outcomes(rollouts) for part in rewards]
    return [
        replace(
            rollout,
            reward=_weighted_sum(rewards, outcomes),
            rewards={part.name: o.value for part, o in zip(rewards, outcomes, strict=True)},
            failure=next((o.failure for o in outcomes if o.failure), None),
        )
        for rollout, *outcomes in zip(rollouts, *by_part, strict=True)
    ]


def _weighted_sum(rewards: Rewards, outcomes: Sequence[Outcome]) -> float | None:
    """None where no function has an opinion, or one of them failed to form it."""
    if any(outcome.failure and outcome.value is None for outcome in outcomes):
        return None
    opinions = [
        part.weight * outcome.value
        for part, outcome in zip(rewards, outcomes, strict=True)
        if outcome.value is not None
    ]
    return sum(opinions) if opinions else None


class BrokenReward(Refusal):
    """No completion of a run's first step could be scored."""


def refuse_broken(rollouts: Sequence[Rollout]) -> None:
    """Raises BrokenReward if no completion at all could be scored: at a run's start, a function
    that always fails is a mistake to mend, and nothing is lost by stopping."""
    if rollouts and all(r.failure is not None and r.reward is None for r in rollouts):
        raise BrokenReward(
            f"reward: expected rewards for the first step, got a failure ({rollouts[0].failure}) "
            f"for all {len(rollouts)} completions; the warning above shows it"
        )
