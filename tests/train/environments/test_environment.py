"""What an environment may say."""

from typing import Any

import numpy as np
import pytest

from agro_train.environments.environment import messages_of, step_of
from agro_train.refusal import Refusal

USER = {"role": "user", "content": "a"}


def test_a_text_is_one_message_of_the_users() -> None:
    assert messages_of("step", "a") == [USER] == messages_of("step", (USER,))
    assert messages_of("reset", None) is None
    tool = {"role": "tool", "content": "4", "name": "calculator"}
    assert messages_of("step", [tool]) == [tool]


@pytest.mark.parametrize(
    "value", [5, [], ["a"], [{"role": "user"}], [{**USER, "content": 5}], b"a", {"a": 1}], ids=repr
)
def test_what_is_no_message_is_one_sentence(value: Any) -> None:
    with pytest.raises(Refusal, match="^environment: expected step to say a text, one or more mes"):
        messages_of("step", value)


def test_a_step_is_a_pair_and_rewards_are_numbers_of_any_kind() -> None:
    assert step_of((None, np.float32(0.5))) == (None, 0.5)
    assert step_of(("a", True)) == ([USER], 1.0)
    assert step_of(("a", None)) == ([USER], None)


@pytest.mark.parametrize("value", [None, "ab", (None,), [None, 1.0], (None, 1.0, {})], ids=repr)
def test_what_is_no_pair_is_one_sentence(value: Any) -> None:
    with pytest.raises(Refusal, match="^environment: expected step to return two things"):
        step_of(value)


@pytest.mark.parametrize("reward", ["1", float("nan"), float("inf"), 1j], ids=repr)
def test_what_is_no_number_is_one_sentence(reward: Any) -> None:
    with pytest.raises(Refusal, match="^environment: expected a finite number or None as reward"):
        step_of((None, reward))
