"""The last number of a completion: how models write it, and what gold answers may look like."""
# ruff: noqa: RUF001  (the characters that look like others are what this is about)

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest

from agro_train.config import TrainConfig
from agro_train.data.tasks import TASKS
from agro_train.rewards.functions import check_columns, load_rewards, score
from agro_train.rewards.number import gold_number, last_number, number_reward, spell
from agro_train.types import Prompt, Rollout


def rollout(text: str, prompt: str = "", **columns: Any) -> Rollout:
    return Rollout("g", prompt, (1,), text, (1,), "stop", None, columns=columns)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        # Which one: the last, or the one after GSM8K's mark, or the one after the thinking.
        ("56", "56"),
        ("7 times 8 is 56.", "56"),
        ("56 or 57", "57"),
        ("none", None),
        ("", None),
        ("x = 42\n#### Done", "42"),
        ("1,5 and then\n#### 1,000\n", "1000"),
        ("#### 1,000", "1000"),
        ("#### $1,000.00", "1000"),
        ("####", None),
        # Spelling.
        ("so it is 72.0", "72"),
        ("007", "7"),
        ("-0", "0"),
        ("3.14.", "3.14"),
        (".5", "0.5"),
        ("72.", "72"),
        ("１２", "12"),
        ("1.5e3", "1500"),
        ("1.2e-4", "0.00012"),
        ("1.2E−4", "0.00012"),
        # Thousands.
        ("The answer is 1,234", "1234"),
        ("1,234,567.89", "1234567.89"),
        ("12,34,567", "1234567"),
        ("1\u202f234", "1234"),
        ("1\u00a0234", "1234"),
        ("1'234", "1234"),
        ("1_000", "1000"),
        ("1\\,234", "1234"),
        ("1,\\!234", "1234"),
        ("1{,}234", "1234"),
        # No thousands: two numbers.
        ("1,5", "5"),
        ("1,234,56", "56"),
        ("3,4,500", "500"),
        ("12 345", "345"),
        # Currency, percent, Markdown, units.
        ("$72", "72"),
        ("\\$72", "72"),
        ("US$5", "5"),
        ("18€", "18"),
        ("€18.50", "18.5"),
        ("72%", "72"),
        ("**72**", "72"),
        ("`72`.", "72"),
        ("$\\boxed{72}$", "72"),
        ("144 m^2", "144"),
        ("144 cm²", "144"),
        # Signs.
        ("-3", "-3"),
        ("−3", "-3"),
        ("–3", "-3"),
        ("-.5", "-0.5"),
        ("x=-7", "-7"),
        ("答案是−7。", "-7"),
        ("(-7)", "-7"),
        ("7 (−2)", "-2"),
        ("5 -7", "-7"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("-1,234", "-1234"),
        ("+7", "7"),
        # No signs: between two numbers, after a word, before a space.
        ("5-7", "7"),
        ("5–7", "7"),
        ("5−7", "7"),
        ("$5-$7", "7"),
        ("(5)-7", "7"),
        ("50%-20%", "20"),
        ("5 - 7", "7"),
        ("COVID-19", "19"),
        ("the answer—7", "7"),
        ("- 7", "7"),
        # What is not worked out.
        ("3/4", "4"),
        ("12:30", "30"),
        ("2026-11-29", "29"),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    found = last_number(text)
    assert (None if found is None else spell(found)) == number


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (72, "72"),
        (72.0, "72"),
        (0.5, "0.5"),
        (1e22, "10000000000000000000000"),
        (Decimal("1.10"), "1.1"),
        ("72", "72"),
        ("1,234", "1234"),
        ("$1,234.50", "1234.5"),
        ("−3", "-3"),
        ("18%", "18"),
        ("**7**.", "7"),
        ("Half of 2,000 is 2000/2 = <<2000/2=1000>>1000.\n#### 1,000", "1000"),
        ("6*7 is 42\n#### -42", "-42"),
        # No numbers, or more than one.
        (None, None),
        (True, None),
        (float("nan"), None),
        (float("inf"), None),
        ([7], None),
        ("", None),
        ("x", None),
        ("18 dollars", None),
        ("3/4", None),
        ("2 and 3", None),
        ("5-7", None),
        ("Half of it. #### many", None),
    ],
)
def test_gold_answer_is_a_number_in_any_spelling(value: object, number: str | None) -> None:
    found = gold_number(value)
    assert (None if found is None else spell(found)) == number
    prompts = [Prompt("g", "q", (1,), {"answer": value})]
    if number is not None:
        check_columns("number", prompts)
        assert number_reward([f"It is {number}.", "It is 41."], [value, value]) == [1.0, 0.0]
    else:
        with pytest.raises(ValueError, match="reward: expected a number in column answer for"):
            check_columns("number", prompts)


def test_wrong_numbers_earn_nothing() -> None:
    pairs = [("1,234", "234"), ("72.5", "72"), ("-7", "7"), ("7", "-7"), ("0.72", "72%"), ("", "0")]
    texts, golds = zip(*pairs, strict=True)
    assert number_reward(texts, golds) == [0.0] * len(pairs)


def test_number_knows_gsm8ks_form_on_either_side() -> None:
    gold = "Half of 2,000 is 2000/2 = <<2000/2=1000>>1000.\n#### 1,000"
    completions = ["#### 1000", "so 1000", "1,5 and then\n#### 1,000\n", gold, "#### 1", "####"]
    assert number_reward(completions, [gold] * 6) == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("prompt", "text", "reward"),
    [
        ("", "<think>6*7=42</think>41", 0.0),
        ("", "<think>6*7=41</think>42", 1.0),
        ("", "<think>6*7=42", 0.0),
        ("<think>\n", "6*7=42", 0.0),
        ("<think>\n", "6*7=41</think> 42", 1.0),
        ("<think>\n\n</think>\n", "42", 1.0),
    ],
)
def test_number_comes_after_the_thinking(prompt: str, text: str, reward: float) -> None:
    rewards = load_rewards(TrainConfig(reward=["number"]))
    (one,) = score([rollout(text, prompt, answer=42)], rewards)
    assert one.reward == reward


@pytest.mark.parametrize("name", ["tiny-arithmetic", "graded-sums", "long-sums"])
def test_commas_of_the_built_in_sums_separate_steps(name: str) -> None:
    """A worked sum ends in "14,145", which is two numbers there."""
    rows = TASKS[name]("eval")
    answers, solutions, slips = ([row[c] for row in rows] for c in ("answer", "solution", "slip"))
    assert number_reward(solutions, answers, solutions) == [1.0] * len(rows)
    assert number_reward(slips, answers, solutions) == [0.0] * len(rows)
    (grouped, separate) = number_reward(["14,145"] * 2, ["145"] * 2, ["so 145", "5+9=14,145"])
    assert (grouped, separate) == (0.0, 1.0)


def test_gold_column_is_named_by_a_setting() -> None:
    def rewarded(column: str, rows: Sequence[dict[str, Any]]) -> list[float | None]:
        rewards = load_rewards(TrainConfig(reward=["number"], gold_column=column))
        return [one.reward for one in score([rollout("It is 7.", **r) for r in rows], rewards)]

    nested = {"reward_model": {"ground_truth": "7", "style": "rule"}, "answer": "8"}
    assert rewarded("", [nested]) == [0.0]
    assert rewarded("reward_model.ground_truth", [nested]) == [1.0]
    assert rewarded("a.b", [{"a.b": 7}]) == [1.0]
    prompts = [Prompt("g", "q", (1,), nested)]
    check_columns("number", prompts, "reward_model.ground_truth")
    for missing in ("target", "reward_model.style", "answer.b"):
        with pytest.raises(ValueError, match=f"expected a number in column {missing} for reward="):
            check_columns("number", prompts, missing)
