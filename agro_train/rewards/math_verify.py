"""`reward=math`: math-verify, in processes that are killed when an answer takes too long."""

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from agro_train.config import TrainConfig
from agro_train.rewards import math_worker
from agro_train.rewards.final_answer import MARK, after_thinking, find_boxes
from agro_train.rewards.reward import Gold, Outcome, Reward, is_text, number_as_text
from agro_train.rewards.workers import NoResult, Workers
from agro_train.types import Prompt, Rollout

WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))


@dataclass(frozen=True)
class MathReward(Reward):
    """1.0 where the completion's final answer equals the gold one by value, else 0.0.

    A check that takes longer than `math_timeout_s`, or ends its process, gives 0.0 too, and is
    counted as a failure. A gold answer that math-verify cannot parse gives None.
    """

    name = "math"
    gold = Gold(
        ("solution", "answer"),
        kind="text or a number",
        accepts=lambda value: is_text(value) or number_as_text(value) is not None,
    )

    workers: Workers  # of the module math_worker
    gold_column: str = ""

    @classmethod
    def start(cls, spec: str, config: TrainConfig) -> "MathReward":
        return cls(shared_pool(config.math_timeout_s), config.gold_column)

    @classmethod
    def readable(cls, prompts: Sequence[Prompt], config: TrainConfig) -> list[bool]:
        golds = [gold_text(prompt.columns, config.gold_column) for prompt in prompts]
        return parseable(golds, shared_pool(config.math_timeout_s))

    def outcomes(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        return [
            Outcome(0.0, found.value)
            if isinstance(found, NoResult)
            else Outcome(float(found["equal"]) if found["gold"] else None)
            for found in self._checked(rollouts)
        ]

    def answers(self, rollouts: Sequence[Rollout]) -> list[Hashable | None]:
        """The final answers in one spelling, so that 0.5 and \\frac{1}{2} are one vote."""
        return [
            None if isinstance(found, NoResult) else found["answer"]
            for found in self._checked(rollouts)
        ]

    def _checked(self, rollouts: Sequence[Rollout]) -> list[Any | NoResult]:
        jobs = [
            {
                "gold": gold_text(rollout.columns, self.gold_column),
                "completion": after_thinking(rollout.completion, rollout.prompt),
            }
            for rollout in rollouts
        ]
        return self.workers.map(jobs)


def gold_text(columns: Mapping[str, Any], column: str = "") -> str:
    """Text with the gold answer: that of the column which is named, else of `solution` where it
    marks its answer (MATH: in \\boxed{}; GSM8K: after ####) or stands alone, else of `answer`.
    Empty where there is none."""
    value = MathReward.gold.find(columns, column)
    other = columns.get("answer")
    if not column and other is not None and isinstance(value, str) and not _marks_answer(value):
        value = other
    return "" if value is None else str(value)


def _marks_answer(text: str) -> bool:
    return bool(find_boxes(text)) or MARK in text


def parseable(golds: Sequence[str], workers: Workers) -> list[bool]:
    """Which gold answers math-verify can parse, in the time that a check has."""
    distinct = list(dict.fromkeys(golds))
    found = workers.map([{"gold": gold} for gold in distinct])
    good = {
        gold: not isinstance(one, NoResult) and one["gold"]
        for gold, one in zip(distinct, found, strict=True)
    }
    return [good[gold] for gold in golds]


@cache
def shared_pool(timeout_s: float) -> Workers:
    """One pool a process and time limit: workers take seconds to start."""
    return Workers(
        math_worker.__name__,
        size=WORKERS,
        timeout_s=timeout_s,
        advice="install what it needs: pip install math-verify",
    )
