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

import base64
import logging
import math
import pickle
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from agro_train.config import TrainConfig
from agro_train.math_rewards import check, gold_text, parseable
from agro_train.types import Failure, Prompt, Rollout
from agro_train.workers import CannotStart, Lost, Workers

LATE_CALLS = 3  # after so many calls that took too long, the rest of the step is given up
START_S = 600.0  # for importing a function of the user's: its module may load a model
logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Outcome:
    """What one function says of one completion."""

    value: float | None
    failure: Failure | None = None


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
    """Raises ValueError where a prompt lacks what a built-in reward compares with."""
    needs = {"number": ("answer",), "math": ("solution", "answer")}.get(spec, ())
    for prompt in prompts if needs else ():
        values = (prompt.columns.get(name) for name in needs)
        gold = next((value for value in values if value is not None), None)
        if not isinstance(gold, str) or (spec == "number" and not re.fullmatch(r"-?\d+", gold)):
            kind = "an integer as text" if spec == "number" else "text"
            raise ValueError(
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


class BrokenReward(ValueError):
    """No completion of a run's first step could be scored."""


def refuse_broken(rollouts: Sequence[Rollout]) -> None:
    """Raises BrokenReward if no completion at all could be scored: at a run's start, a function
    that always fails is a mistake to mend, and nothing is lost by stopping."""
    if rollouts and all(r.failure is not None and r.reward is None for r in rollouts):
        raise BrokenReward(
            f"reward: expected rewards for the first step, got a failure ({rollouts[0].failure}) "
            f"for all {len(rollouts)} completions; the warning above shows it"
        )


@dataclass(frozen=True)
class OwnFunction:
    """A reward function of the user's, `module:function`, that cannot stop the run, see the top of
    this file."""

    spec: str
    workers: Workers  # a pool of one: the function may count its calls

    @classmethod
    def start(cls, spec: str, timeout_s: float) -> "OwnFunction":
        """Raises ValueError where there is no such function."""
        workers = Workers(
            "agro_train.reward_worker",
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
