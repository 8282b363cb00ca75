"""What a reward is. Where a new one starts."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Self

from agro_train.config import TrainConfig
from agro_train.types import Failure, Prompt, Rollout


@dataclass(frozen=True)
class Outcome:
    """What a reward says of one completion."""

    value: float | None  # None: no opinion
    failure: Failure | None = None  # why it could not be scored as it should be; it is counted


@dataclass(frozen=True)
class Gold:
    """The right answer, which the dataset gives and a reward compares with."""

    columns: tuple[str, ...]  # the first one that a prompt has counts
    kind: str = "text"  # what is expected there, for the message
    pattern: str = r"(?s:.*)"  # that all of the text must match

    def find(self, columns: Mapping[str, Any]) -> Any:
        """The value in the dataset's columns of one prompt, numbers as text; None where there is
        none."""
        found = (columns[name] for name in self.columns if columns.get(name) is not None)
        return number_as_text(next(found, None))

    def accepts(self, value: object) -> bool:
        return isinstance(value, str) and re.fullmatch(self.pattern, value) is not None


class Reward(ABC):
    """A reward function, built in or the user's own.

    What is known of the dataset before any completion exists is a matter of the class; an instance
    scores, and may own processes that do.
    """

    name: ClassVar[str]  # of a built-in reward, for `reward=`
    gold: ClassVar[Gold | None] = None  # what every prompt must have; None: nothing

    @classmethod
    def start(cls, spec: str, config: TrainConfig) -> Self:
        """The reward that the configuration names `spec`. Raises Refusal where it cannot be had."""
        return cls()

    @classmethod
    def readable(cls, prompts: Sequence[Prompt], config: TrainConfig) -> list[bool]:
        """For each prompt: can its gold answer be compared with? If not, the prompt is left out."""
        return [True] * len(prompts)

    @abstractmethod
    def outcomes(self, rollouts: Sequence[Rollout]) -> list[Outcome]:
        """One for each rollout, in their order. A completion it cannot score raises nothing."""

    def answers(self, rollouts: Sequence[Rollout]) -> list[Hashable | None]:
        """What each completion votes for in a majority vote, by default its text; None: it has no
        answer and does not vote."""
        return [rollout.completion.strip() for rollout in rollouts]


def number_as_text(value: Any) -> Any:
    """A finite number as people write it, without an exponent and without a point where it is
    whole (42.0: "42"); anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return value
    number = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    if not number.is_finite():
        return value
    return format(
        number.to_integral_value() if number == number.to_integral_value() else number, "f"
    )
