"""The configured rewards: found by name, checked against the data, and summed.

The reward of a completion is the weighted sum of what the functions say of it. Where all of them
say None, or one of them fails, it has no reward: it is dropped from its group, and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from agro_train.config import TrainConfig
from agro_train.refusal import Refusal
from agro_train.rewards.environment import EnvironmentReward
from agro_train.rewards.math_verify import MathReward
from agro_train.rewards.number import NumberReward
from agro_train.rewards.own import OwnFunction
from agro_train.rewards.reward import Outcome, Reward
from agro_train.types import Prompt, Rollout

# By the name that `reward=` takes. A new built-in reward is a file in this folder and a word here.
BUILT_IN: dict[str, type[Reward]] = {
    kind.name: kind for kind in (NumberReward, MathReward, EnvironmentReward)
}


@dataclass(frozen=True)
class Part:
    """One reward of the sum, by the name its metrics go by."""

    name: str
    weight: float
    reward: Reward


Rewards = tuple[Part, ...]


def reward_class(spec: str) -> type[Reward]:
    """What `reward=spec` means. Raises Refusal where that is neither a built-in reward's name nor
    of the form module:function."""
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    module, _, function = spec.partition(":")
    if not (module and function):
        known = ", ".join(BUILT_IN)
        raise Refusal(f"reward: expected {known} or module:function, got {spec!r}")
    return OwnFunction


def load_rewards(config: TrainConfig) -> Rewards:
    """The configured functions and their weights."""
    names = [spec.rpartition(":")[2] for spec in config.reward]
    if len(set(names)) < len(names):  # two modules, one function name
        names = config.reward
    weights = config.reward_weights or [1.0] * len(config.reward)
    return tuple(
        Part(name, weight, reward_class(spec).start(spec, config))
        for name, weight, spec in zip(names, weights, config.reward, strict=True)
    )


def check_columns(spec: str, prompts: Sequence[Prompt], gold_column: str = "") -> None:
    """Raises Refusal where a prompt lacks what a built-in reward compares with.

    Args:
        gold_column: that setting; empty: the columns that the reward looks for.
    """
    gold = reward_class(spec).gold
    if gold is None:
        return
    for prompt in prompts:
        value = gold.find(prompt.columns, gold_column)
        if not gold.accepts(value):
            where = gold_column or " or ".join(gold.columns)
            raise Refusal(
                f"reward: expected {gold.kind} in column {where} for reward={spec}, "
                f"got {value!r} for the prompt {prompt.text[:40]!r}; "
                "gold_column=NAME names another column"
            )


def with_readable_gold(prompts: Sequence[Prompt], config: TrainConfig) -> list[Prompt]:
    """The prompts whose gold answers the configured rewards can read, for example those that
    math-verify can parse."""
    kept = list(prompts)
    for spec in config.reward:
        readable = reward_class(spec).readable(kept, config)
        kept = [prompt for prompt, keep in zip(kept, readable, strict=True) if keep]
    return kept


def score(rollouts: Sequence[Rollout], rewards: Rewards) -> list[Rollout]:
    """The same rollouts with their rewards; one whose environment failed has none."""
    whole = [rollout for rollout in rollouts if rollout.failure is None]
    if not whole:
        return list(rollouts)
    by_part = [part.reward.outcomes(whole) for part in rewards]
    scored = (
        replace(
            rollout,
            reward=_weighted_sum(rewards, outcomes),
            rewards={part.name: o.value for part, o in zip(rewards, outcomes, strict=True)},
            failure=next((o.failure for o in outcomes if o.failure), None),
        )
        for rollout, *outcomes in zip(whole, *by_part, strict=True)
    )
    return [next(scored) if rollout.failure is None else rollout for rollout in rollouts]


def _weighted_sum(rewards: Rewards, outcomes: Sequence[Outcome]) -> float | None:
    """None where no function has an opinion, or one of them failed: a sum without it would be
    another reward."""
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


def refuse_unasked(rollouts: Sequence[Rollout]) -> None:
    """Raises BrokenReward where an environment gave a number that no reward counts."""
    name = EnvironmentReward.name
    unasked = [r for r in rollouts if r.environment_reward is not None and name not in r.rewards]
    if unasked and unasked[0].rewards:
        raise BrokenReward(
            f"reward: expected the environment's steps to return None as reward with reward="
            f"{','.join(unasked[0].rewards)}, got {unasked[0].environment_reward:g}; "
            f"reward={name} takes its numbers, and reward=[{name},...] the sum with other functions"
        )


def refuse_broken(rollouts: Sequence[Rollout]) -> None:
    """Raises BrokenReward if no completion at all could be scored. Meant for a run's first step,
    where stopping loses nothing."""
    if not rollouts or any(r.reward is not None for r in rollouts):
        return
    failures = [r.failure for r in rollouts if r.failure is not None]
    if len(failures) == len(rollouts):
        key = "reward" if rollouts[0].rewards else "environment"
        raise BrokenReward(
            f"{key}: expected rewards for the first step, got a failure ({failures[0]}) "
            f"for all {len(rollouts)} completions; the warning above shows it"
        )
    named = next((r.rewards for r in rollouts if r.rewards), {})
    names = " and ".join(named) or "the reward function"
    raise BrokenReward(
        f"reward: expected a number for some completion of the first step, got None from {names} "
        f"for all {len(rollouts)}{f', {len(failures)} of them after a failure' * bool(failures)}; "
        "None means no opinion, and there is nothing to learn from it: return a number where the "
        "function can judge"
    )
