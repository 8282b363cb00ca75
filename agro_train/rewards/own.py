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
from agro_train.rewards.reward import Outcome, Reward
from agro_train.rewards.workers import CannotStart, NoResult, Workers
from agro_train.types import Failure, Rollout

LATE_CALLS = 3  # after so many calls that took too long, the rest of the step is given up
START_S = 600.0  # for importing a function of the user's: its module may load a model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Failed:
    """A call that gave no values."""

    failure: Failure
    why: str  # continues a sentence that begins with the function's name


@dataclass(frozen=True)
class OwnFunction(Reward):
    """A function of the user's, by its name `module:function`."""

    spec: str
    workers: Workers  # a pool of one: the function may count its calls

    @classmethod
    def start(cls, spec: str, config: TrainConfig) -> "OwnFunction":
        """Raises Refusal where there is no such function."""
        workers = Workers(
            own_worker.__name__,
            spec,
            size=1,
            timeout_s=config.reward_timeout_s,
            start_s=START_S,
            advice=f"its process imports {spec}, so look there",
        )
        workers.start()
        return cls(spec, workers)

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
        logger.warning("reward: %s %s", self.spec, found.why)
        prompts = [list(rows) for _, rows in groupby(rollouts, key=_prompt)]
        if len(prompts) == 1:
            return [Outcome(None, found.failure)] * len(rollouts)
        return self._prompt_by_prompt(prompts, late_calls=int(found.failure == "timeout"))

    def _prompt_by_prompt(
        self, prompts: Sequence[Sequence[Rollout]], late_calls: int
    ) -> list[Outcome]:
        outcomes: list[Outcome] = []
        failed = 0
        for rows in prompts:
            if late_calls < LATE_CALLS:
                found = self._call(rows)
            else:
                found = _Failed("timeout", "was not called")
            if isinstance(found, _Failed):
                late_calls += found.failure == "timeout"
                failed += 1
                found = [Outcome(None, found.failure)] * len(rows)
            outcomes += found
        logger.warning(
            "reward: %s was called again prompt by prompt: %d of %d prompts stay without rewards",
            self.spec,
            failed,
            len(prompts),
        )
        return outcomes

    def _call(self, rollouts: Sequence[Rollout]) -> list[Outcome] | _Failed:
        # A pickle, because columns may hold what JSON has no word for.
        job = base64.b64encode(pickle.dumps(arguments(rollouts))).decode()
        (answer,) = self.workers.map([job])
        if answer is NoResult.TIMED_OUT:
            return _Failed("timeout", f"took longer than {self.workers.timeout_s:g} s")
        if answer is NoResult.DIED:
            return _Failed("error", "ended its process")
        if "error" in answer:
            return _Failed("error", f"failed: {answer['error']}\n{answer['traceback']}")
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
