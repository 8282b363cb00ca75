"""What an environment is. Where a new one starts."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Protocol

from agro_train.refusal import Refusal

Message = dict[str, str]  # role and content
Messages = str | Sequence[Mapping[str, str]]  # a text alone is one message of the user's

METHODS = ("reset", "step")


class Environment(Protocol):
    """One rollout's counterpart. It is made without arguments for each rollout, and lives as long.

    Either method may be `async def`. What it raises ends the rollout, without a reward.
    """

    def reset(self, **columns: Any) -> Messages | None:
        """The prompt of the rollout, from the columns of the dataset's row; None: the row's own.

        It must be the same for all rollouts of one row, for they are compared with each other.
        """

    def step(self, completion: str) -> tuple[Messages | None, float | None]:
        """What comes after a turn of the model's, and what the turn earned.

        Args:
            completion: the turn's text, without special tokens.

        Returns:
            messages for the model, which then has another turn, or None where the rollout is done;
            and a number, or None where there is none. A rollout's numbers are summed.
        """

    # def close(self) -> None: if there is one, it is called when the rollout is over.


def messages_of(method: str, value: Any) -> list[Message] | None:
    """What `reset` or `step` said, as messages of texts. Raises Refusal for anything else."""
    if value is None:
        return None
    given = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if isinstance(given, list | tuple) and given and all(map(_is_message, given)):
        return [dict(message) for message in given]
    raise Refusal(
        f"environment: expected {method} to say a text, one or more messages with role and "
        f"content, all texts, or None, got {str(value)[:60]!r}"
    )


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and {"role", "content"} <= value.keys()
        and all(isinstance(text, str) for text in value.values())
    )


def step_of(value: Any) -> tuple[list[Message] | None, float | None]:
    """What `step` returned. Raises Refusal for what is not a pair of messages and a reward."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise Refusal(
            "environment: expected step to return two things, (messages or None, reward or None), "
            f"got {str(value)[:60]!r}"
        )
    messages, reward = value
    reward = reward.item() if hasattr(reward, "item") else reward
    if reward is not None and not (isinstance(reward, Real) and math.isfinite(reward)):
        raise Refusal(
            f"environment: expected a finite number or None as reward from step, got {reward!r}"
        )
    return messages_of("step", messages), None if reward is None else float(reward)
