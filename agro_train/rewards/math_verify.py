"""The reward `math`: math-verify, in processes that are killed when an answer takes too long."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agro_train.rewards.workers import Lost, Workers
from agro_train.types import Failure

WORKERS = max(1, min(8, (os.cpu_count() or 1) // 2))
_pools: dict[float, Workers] = {}


@dataclass(frozen=True)
class Check:
    """What came of comparing one completion with its gold answer."""

    reward: float | None  # 1.0 or 0.0; None: the gold answer could not be parsed
    answer: str | None = None  # the completion's answer in one spelling; None: none was found
    failure: Failure | None = None  # the check was killed or ended itself; the reward is 0.0


def gold_text(columns: Mapping[str, Any]) -> str | None:
    """The gold answer: column `solution` (MATH: in \\boxed{}) or `answer` (GSM8K: after ####)."""
    for name in ("solution", "answer"):
        if (value := columns.get(name)) is not None:
            return str(value).split("####")[-1].strip()
    return None


def check(golds: Sequence[str], completions: Sequence[str], timeout_s: float) -> list[Check]:
    """Compares each completion's final answer with the gold one, by value, in at most `timeout_s`
    seconds for each.
    """
    jobs = [{"gold": g, "completion": c} for g, c in zip(golds, completions, strict=True)]
    return [
        Check(reward=0.0, failure=found.value)
        if isinstance(found, Lost)
        else Check(float(found["equal"]) if found["gold"] else None, found["answer"])
        for found in _pool(timeout_s).map(jobs)
    ]


def parseable(golds: Sequence[str], timeout_s: float) -> list[bool]:
    """Which gold answers math-verify can parse, in the time that a check has."""
    distinct = list(dict.fromkeys(golds))
    found = _pool(timeout_s).map([{"gold": gold} for gold in distinct])
    good = {
        gold: not isinstance(one, Lost) and one["gold"]
        for gold, one in zip(distinct, found, strict=True)
    }
    return [good[gold] for gold in golds]


def _pool(timeout_s: float) -> Workers:
    """One pool a process and time limit: workers take seconds to start."""
    if timeout_s not in _pools:
        _pools[timeout_s] = Workers(
            "agro_train.rewards.math_worker",
            size=WORKERS,
            timeout_s=timeout_s,
            advice="install what it needs: pip install math-verify",
        )
    return _pools[timeout_s]
