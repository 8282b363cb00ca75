"""The calculator answers sums, and nothing else."""

import pytest

from agro_train.environments.calculator import Calculator


@pytest.mark.parametrize(
    ("turn", "answer"),
    [
        ("7+8=", "15"),
        (",3+5+1=", "9"),
        ("So 12 + 30 = ", "42"),
        ("x1+2=", "3"),
        ("7+8=15", None),
        ("7-8=", None),
        ("+8=", None),
        ("=", None),
        ("", None),
    ],
)
def test_a_sum_before_the_turns_last_sign_is_worked_out(turn: str, answer: str | None) -> None:
    calculator = Calculator()
    calculator.reset(prompt="7+8=", answer="15")
    assert calculator.step(turn) == (answer, None)
