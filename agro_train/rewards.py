"""Rewards: functions from completions to numbers, built in or the user's own.

A reward function has TRL's signature: keyword arguments `prompts`, `completions`, `completion_ids`
and every column of the dataset, each a list with one entry per completion; it returns a list of
numbers, None where it has no opinion (that completion is dropped from its group, and counted).
"""

import importlib
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agro_train.types import Prompt, Rollout

RewardFunction = Callable[..., Sequence[float | None]]


def number_reward(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1.0 where the last integer of the completion is the answer, an integer as text."""
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        found = re.findall(r"-?\d+", completion)
        rewards.append(float(bool(found) and _digits(found[-1]) == _digits(expected)))
    return rewards


def _digits(integer: str) -> str:
    """One spelling for equal integers; int() would refuse thousands of digits."""
    return re.sub(r"^(-?)0+(?=\d)", r"\1", integer)


def math_reward(completions: Sequence[str], **columns: Any) -> list[float | None]:
    """1.0 where math-verify finds the completion's final answer equal to the gold one.

    The gold answer is the column `solution` (MATH: in \\boxed{}) or `answer` (GSM8K: after ####).
    A gold answer that cannot be parsed gives None: the prompt says nothing about the completion.
    """
    from math_verify import parse, verify  # pulls in sympy

    absent = [None] * len(completions)
    solutions, answers = columns.get("solution", absent), columns.get("answer", absent)
    rewards: list[float | None] = []
    for completion, solution, answer in zip(completions, solutions, answers, strict=True):
        target = parse((answer if solution is None else solution).split("####")[-1].strip())
        rewards.append(float(verify(target, parse(completion))) if target else None)
    return rewards


BUILT_IN: dict[str, RewardFunction] = {"number": number_reward, "math": math_reward}


def load_reward(spec: str) -> RewardFunction:
    """A built-in reward by name, or the user's own as `module:function`."""
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    module_name, _, function_name = spec.partition(":")
    if not function_name:
        raise ValueError(f"reward: expected {', '.join(BUILT_IN)} or module:function, got {spec!r}")
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


def score(rollouts: Sequence[Rollout], reward: RewardFunction) -> list[Rollout]:
    """The same rollouts with their rewards."""
    if not rollouts:
        return []
    columns: dict[str, list[Any]] = defaultdict(list)
    for name in {name for rollout in rollouts for name in rollout.columns} - {"prompt"}:
        columns[name] = [rollout.columns.get(name) for rollout in rollouts]
    values = reward(
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
    return [
        replace(rollout, reward=_as_reward(value))
        for rollout, value in zip(rollouts, values, strict=True)
    ]


def _as_reward(value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)):
        raise ValueError(
            f"reward: expected a number or None from the reward function, got {value!r}"
        )
    return float(value) if math.isfinite(value) else None
