"""`reward=module:function`: the user's own reward function, which cannot cost a run a step.

The function has TRL's signature: keyword arguments `prompts`, `completions`, `completion_ids` and
every column of the dataset, each a list with one entry per completion. It returns a list of
numbers, None where it has no opinion.

It is called in a process of its own, one a function and rank, which keeps whatever the function
keeps between calls. A function that raises, ends its process, or returns something else is called
again prompt by prompt. So is one that takes too long, wherever it waits: its process is killed, and
another started. The prompts for which it fails again get no reward from it. They are counted
(`rewards/error_rate`, `rewards/timeout_rate`), and a warning says how many there are.
"""

import base64
import logging
import math
import pickle
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from agro_train.config import TrainConfig
from agro_train.rewards import own_worker
from agro_train.rewards.own_code import Failed, OwnCode, one_by_one
from agro_train.rewards.reward import Outcome, Reward
from agro_train.rewards.workers import CannotStart
from agro_train.types import Rollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnFunction(Reward):
    """A function of the user's, by its name `module:function`."""

    spec: str
    code: OwnCode

    @classmethod
    def start(cls, spec: str, config: TrainConfig) -> "OwnFunction":
        """Raises Refusal where there is no such function."""
        return cls(spec, OwnCode(own_worker.__name__, spec, config.reward_timeout_s))

    def outcomes(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        try:
            return self._outcomes(rollouts)
        except CannotStart as error:  # it could at the start of the run, which should not end here
            logger.warning("reward: %s could not be started again: %s", self.spec, error)
            return [Outcome(None, "timeout")] * len(rollouts)

    def _outcomes(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        """In one call, or where that fails in one a prompt. Raises CannotStart."""
        found = self._call(rollouts)
        if isinstance(found, list):
            return found
        logger.warning("reward: %s %s", self.spec, f"{found.why}\n{found.trace}".rstrip("\n"))
        prompts = [list(rows) for _, rows in groupby(rollouts, key=_prompt)]
        if len(prompts) == 1:
            return [Outcome(None, found.failure)] * len(rollouts)
        return self._prompt_by_prompt(prompts, late_calls=int(found.failure == "timeout"))

    def _prompt_by_prompt(
        self, prompts: Sequence[Sequence[Rollout]], late_calls: int
    ) -> list[Outcome]:
        outcomes: list[Outcome] = []
        failed = 0
        answers = one_by_one(self._call, prompts, late=late_calls)
        for rows, found in zip(prompts, answers, strict=True):
            if isinstance(found, Failed):
                failed += 1
                outcomes += [Outcome(None, found.failure)] * len(rows)
            else:
                outcomes += found
        logger.warning(
            "reward: %s was called again prompt by prompt: %d of %d prompts stay without rewards",
            self.spec,
            failed,
            len(prompts),
        )
        return outcomes

    def _call(self, rollouts: Sequence[Rollout]) -> list[Outcome] | Failed:
        # A pickle, because columns may hold what JSON has no word for.
        job = base64.b64encode(pickle.dumps(arguments(rollouts))).decode()
        answer = self.code.ask(job)
        if isinstance(answer, Failed):
            return answer
        return [_outcome(value) for value in answer["values"]]


def _prompt(rollout: Rollout) -> tuple[str, tuple[int, ...]]:
    """What rollouts of one prompt share; rows of a file may have text and no ids."""
    return rollout.group, rollout.prompt_ids


def arguments(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """What a reward function is called with."""
    columns: dict[str, list[Any]] = defaultdict(list)
    for name in {name for rollout in rollouts for name in rollout.columns} - {"prompt"}:
        columns[name] = [rollout.columns.get(name) for rollout in rollouts]
    if any(rollout.turns is not None for rollout in rollouts):
        columns["turns"] = [
            None if rollout.turns is None else list(rollout.turns) for rollout in rollouts
        ]
    return {
        **columns,
        "prompts": [rollout.prompt for rollout in rollouts],
        "completions": [rollout.completion for rollout in rollouts],
        "completion_ids": [list(rollout.completion_ids) for rollout in rollouts],
    }


def _outcome(value: float | None) -> Outcome:
    finite = value is None or math.isfinite(value)
    return Outcome(value) if finite else Outcome(None, "error")
