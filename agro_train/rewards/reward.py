"""What a reward is. Where a new one starts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Self

from agro_train.config import TrainConfig
from agro_train.data.rows import at
from agro_train.types import Failure, Prompt, Rollout


@dataclass(frozen=True)
class Outcome:
    """What a reward says of one completion."""

    value: float | None  # None: no opinion
    failure: Failure | None = None  # why it could not be scored as it should be; it is counted


def is_text(value: object) -> bool:
    return isinstance(value, str)


@dataclass(frozen=True)
class Gold:
    """The right answer, which the dataset gives and a reward compares with."""

    columns: tuple[str, ...]  # the first one that a prompt has counts, unless gold_column names one
    kind: str = "text"  # what is expected there, for the message
    accepts: Callable[[Any], bool] = is_text  # whether a value can be one

    def find(self, columns: Mapping[str, Any], column: str = "") -> Any:
        """The value in the dataset's columns of one prompt; None where there is none.

        Args:
            column: the setting `gold_column`; a dot leads into a column that holds a mapping.
        """
        if column:
            return at(columns, column)
        return next((columns[name] for name in self.columns if columns.get(name) is not None), None)


def number_as_text(value: object) -> str | None:
    """A number that stands in a column as one, and not as text. None: it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return None
    text = str(value)
    return text if text.lstrip("-")[:1].isdigit() else None  # nan and inf are no answers


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
