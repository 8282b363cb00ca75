"""Rewards: functions from completions to numbers, built in or the user's own, and their sum.

A reward function has TRL's signature: keyword arguments `prompts`, `completions`, `completion_ids`
and every column of the dataset, each a list with one entry per completion; it returns a list of
numbers, None where it has no opinion. The reward is the weighted sum of the opinions; a completion
without any is dropped from its group, and counted.

No reward function can cost a run a step. One that raises, takes too long or returns something else
is called again prompt by prompt; the prompts for which it fails again get no reward, are counted
(`rewards/error_rate`, `rewards/timeout_rate`) and named in a warning.
"""

import importlib
import logging
import math
import re
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from numbers import Real
from pathlib import Path
from typing import Any

from agro_train.config import TrainConfig
from agro_train.math_rewards import check, gold_text, parseable
from agro_train.types import Failure, Prompt, Rollout

RewardFunction = Callable[..., Sequence[float | None]]
LATE_CALLS = 3  # after so many calls that took too long, the rest of the step is given up
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


BUILT_IN: dict[str, RewardFunction] = {"number": number_reward}  # and math: `math_outcomes`


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
    return Guarded(load_reward(spec), spec, config.reward_timeout_s)


def math_outcomes(rollouts: Sequence[Rollout], timeout_s: float) -> list[Outcome]:
    """A completion whose check was killed has reward 0 all the same: nobody could read it."""
    golds = [gold_text(rollout.columns) or "" for rollout in rollouts]
    return [
        Outcome(found.reward, "timeout" if found.timed_out else None)
        for found in check(golds, [rollout.completion for rollout in rollouts], timeout_s)
    ]


def load_reward(spec: str) -> RewardFunction:
    """A reward that is a function: built in, by name, or the user's own as `module:function`."""
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    module_name, _, function_name = spec.partition(":")
    if not function_name:
        raise ValueError(f"reward: expected number, math or module:function, got {spec!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reward: expected an importable module in {spec!r}, got none ({error}); it is looked "
            f"up in the Python path and in {Path.cwd()}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(
            f"reward: expected a function {function_name} in {module.__file__}, got {function!r}"
        )
    return function  # type: ignore[no-any-return]


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
class Guarded:
    """A reward function that cannot stop the run, see the top of this file.

    The time limit is an alarm in the main thread: it ends Python code and blocking calls, but not
    native code that never returns to the interpreter. In another thread there is none.
    """

    function: RewardFunction
    spec: str
    timeout_s: float

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
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
        try:
            with time_limit(self.timeout_s):
                return [_outcome(v) for v in call(self.function, rollouts)]
        except _TooLong:
            if explain:
                logger.warning("reward: %s took longer than %g s", self.spec, self.timeout_s)
            return "timeout"
        except (Exception, SystemExit) as error:  # the user's code must not end the run
            if explain:
                logger.warning("reward: %s failed: %r", self.spec, error, exc_info=True)
            return "error"


def _prompt(rollout: Rollout) -> tuple[str, tuple[int, ...]]:
    """What rollouts of one prompt share; rows of a file may have text and no ids."""
    return rollout.group, rollout.prompt_ids


def call(function: RewardFunction, rollouts: Sequence[Rollout]) -> Sequence[float | None]:
    """The function's values, one a rollout."""
    columns: dict[str, list[Any]] = defaultdict(list)
    for name in {name for rollout in rollouts for name in rollout.columns} - {"prompt"}:
        columns[name] = [rollout.columns.get(name) for rollout in rollouts]
    values = function(
        prompts=[rollout.prompt for rollout in rollouts],
        completions=[rollout.completion for rollout in rollouts],
        completion_ids=[list(rollout.completion_ids) for rollout in rollouts],
        **columns,
    )
    if not isinstance(values, Sequence) or len(values) != len(rollouts):
        got = f"{len(values)}" if isinstance(values, Sequence) else type(values).__name__
        raise ValueError(
            f"reward: expected a list of {len(rollouts)} numbers from the reward function, "
            f"got {got}"
        )
    for value in values:
        if value is not None and not isinstance(value, Real):
            raise ValueError(
                f"reward: expected a number or None from the reward function, got {value!r}"
            )
    return values


def _outcome(value: float | None) -> Outcome:
    if value is not None and not math.isfinite(value):
        return Outcome(None, "error")
    return Outcome(None if value is None else float(value))


class _TooLong(BaseException):
    """Not an Exception, which the function that takes too long may be catching."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises _TooLong in the block after that time, and every second from then on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, late)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
