"""`reward=number`: the last integer of a completion against the gold answer."""

import re
from collections.abc import Sequence
from typing import Any


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
