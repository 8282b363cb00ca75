"""`reward=number`: the last integer of a completion against the gold answer."""

import re
from collections.abc import Hashable, Sequence
from typing import Any

from agro_train.rewards.reward import Gold, Outcome, Reward
from agro_train.types import Rollout


class NumberReward(Reward):
    """1.0 where the last integer of the completion is the one in column `answer`, else 0.0."""

    name = "number"
    gold = Gold(("answer",), kind="an integer as text", pattern=r"-?\d+")

    def outcomes(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        completions = [rollout.completion for rollout in rollouts]
        golds = [rollout.columns["answer"] for rollout in rollouts]
        return [Outcome(value) for value in number_reward(completions, golds)]

    def answers(self, rollouts: Sequence[Rollout]) -> list[Hashable | None]:
        return [last_integer(rollout.completion) for rollout in rollouts]


def number_reward(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the last integer of the completion is the answer, an integer as text."""
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        rewards.append(float(last_integer(completion) == _digits(expected)))
    return rewards


def last_integer(text: str) -> str | None:
    found = re.findall(r"-?\d+", text)
    return _digits(found[-1]) if found else None


def _digits(integer: str) -> str:
    """One spelling for equal integers; int() would refuse thousands of digits."""
    return re.sub(r"^(-?)0+(?=\d)", r"\1", integer)
