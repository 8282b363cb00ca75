"""`reward=number`: the last integer of a completion against the gold answer."""

import re
from collections.abc import Hashable, Sequence
from typing import Any

from agro_train.rewards.reward import Gold, Outcome, Reward
from agro_train.types import Rollout


class NumberReward(Reward):
    """1.0 where the last integer of the completion is that of column `answer`, else 0.0.

    In GSM8K's form, on either side, the number after the last "####" counts: "... #### 1,000".
    """

    name = "number"
    gold = Gold(
        ("answer",), kind="an integer as text", pattern=r"-?\d+|(?s:.*)####\s*-?\d[\d,]*\s*"
    )

    def outcomes(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        completions = [rollout.completion for rollout in rollouts]
        golds = [self.gold.find(rollout.columns) for rollout in rollouts]
        return [Outcome(value) for value in number_reward(completions, golds)]

    def answers(self, rollouts: Sequence[Rollout]) -> list[Hashable | None]:
        return [last_integer(rollout.completion) for rollout in rollouts]


def number_reward(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the last integer of the completion is the answer's, an integer as text."""
    return [
        float(last_integer(completion) == last_integer(expected))
        for completion, expected in zip(completions, answer, strict=True)
    ]


def last_integer(text: str) -> str | None:
    _, mark, final = text.rpartition("####")
    # There a comma separates thousands; elsewhere it may separate anything.
    found = re.findall(r"-?\d+", re.sub(r"(?<=\d),(?=\d{3})", "", final)) if mark else []
    found = found or re.findall(r"-?\d+", text)  # a heading of Markdown has the same mark
    return _digits(found[-1]) if found else None


def _digits(integer: str) -> str:
    """One spelling for equal integers; int() would refuse thousands of digits."""
    return re.sub(r"^(-?)0+(?=\d)", r"\1", integer)
