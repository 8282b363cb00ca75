"""`reward=module:function`: the user's own reward function, in a process that may be killed."""

import base64
import logging
import math
import pickle
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from agro_train.rewards.workers import CannotStart, Lost, Workers
from agro_train.types import Failure, Rollout

LATE_CALLS = 3  # after so many calls that took too long, the rest of the step is given up


START_S = 600.0  # for importing a function of the user's: its module may load a model


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What one function says of one completion."""

    value: float | None
    failure: Failure | None = None


@dataclass(frozen=True)
class OwnFunction:
    """A reward function of the user's, `module:function`, that cannot stop the run, see the top of
    this file."""

    spec: str
    workers: Workers  # a pool of one: the function may count its calls

    @classmethod
    def start(cls, spec: str, timeout_s: float) -> "OwnFunction":
        """Raises Refusal where there is no such function."""
        workers = Workers(
            "agro_train.rewards.own_worker",
            spec,
            size=1,
            timeout_s=timeout_s,
            start_s=START_S,
            advice=f"its process imports {spec}, so look there",
        )
        workers.start()
        return cls(spec, workers)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        try:
            return self._outcomes(rollouts)
        except CannotStart as error:  # once it could: this is not how the run should end
            logger.warning("reward: %s could not be started again: %s", self.spec, error)
            return [Outcome(None, "timeout")] * len(rollouts)

    def _outcomes(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        """Raises CannotStart."""
        outcomes = self._attempt(rollouts, explain=True)
        prompts = [list(rows) for _, rows in groupby(rollouts, key=_prompt)]
        if isinstance(outcomes, list):
            return outcomes
        if len(prompts) == 1:
            return [Outcome(None, outcomes)] * len(rollouts)
        late, failed, joined = int(outcomes == "timeout"), 0, []
        for rows in prompts:
            again = self._attempt(rows) if late < LATE_CALLS else "timeout"
            if not isinstance(again, list):
                late, failed = late + (again == "timeout"), failed + 1
                again = [Outcome(None, again)] * len(rows)
            joined += again
        logger.warning(
            "reward: %s was called again prompt by prompt: %d of %d prompts stay without rewards",
            self.spec,
            failed,
            len(prompts),
        )
        return joined

    def _attempt(
        self, rollouts: Sequence[Rollout], *, explain: bool = False
    ) -> list[Outcome] | Failure:
        # A pickle, for columns may hold what JSON has no word for.
        job = base64.b64encode(pickle.dumps(arguments(rollouts))).decode()
        (answer,) = self.workers.map([job])
        if isinstance(answer, Lost):
            if explain and answer is Lost.LATE:
                timeout_s = self.workers.timeout_s
                logger.warning("reward: %s took longer than %g s", self.spec, timeout_s)
            elif explain:
                logger.warning("reward: %s ended its process", self.spec)
            return answer.value
        if "error" in answer:
            if explain:
                found = answer["error"], answer["traceback"]
                logger.warning("reward: %s failed: %s\n%s", self.spec, *found)
            return "error"
        return [_outcome(value) for value in answer["values"]]


def _prompt(rollout: Rollout) -> tuple[str, tuple[int, ...]]:
    """What rollouts of one prompt share; rows of a file may have text and no ids."""
    return rollout.group, rollout.prompt_ids


def arguments(rollouts: Sequence[Rollout]) -> dict[str, list[Any]]:
    """What a reward function is called with."""
    columns: dict[str, list[Any]] = defaultdict(list)
    for name in {name for rollout in rollouts for name in rollout.columns} - {"prompt"}:
        columns[name] = [rollout.columns.get(name) for rollout in rollouts]
    return {
        **columns,
        "prompts": [rollout.prompt for rollout in rollouts],
        "completions": [rollout.completion for rollout in rollouts],
        "completion_ids": [list(rollout.completion_ids) for rollout in rollouts],
    }


def _outcome(value: float | None) -> Outcome:
    finite = value is None or math.isfinite(value)
    return Outcome(value) if finite else Outcome(None, "error")
