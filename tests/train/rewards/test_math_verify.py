"""math-verify in killable processes: right on real answers, alive after answers that hang."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from agro_train.config import TrainConfig
from agro_train.rewards import math_worker
from agro_train.rewards.functions import load_rewards, score, with_readable_gold
from agro_train.rewards.math_verify import MathReward, gold_text, parseable, shared_pool
from agro_train.rewards.math_worker import work
from agro_train.rewards.workers import Workers
from agro_train.types import Prompt, Rollout
from tests.train.rewards import odd_worker

HANGS = r"$\boxed{9^{9^{9^{9}}}}$"


def completed(texts: Sequence[str], **columns: Any) -> list[Rollout]:
    return [Rollout("g", "", (1,), text, (1,), "stop", None, columns=columns) for text in texts]


@pytest.fixture(scope="module")
def math() -> Iterator[MathReward]:
    """With one worker for all tests, which takes a second to start."""
    return MathReward(Workers(math_worker.__name__, size=1, timeout_s=60.0))


@pytest.mark.parametrize(
    ("columns", "gold"),
    [
        ({"solution": r"... $\boxed{\frac12}$", "answer": "3"}, r"... $\boxed{\frac12}$"),
        ({"solution": None, "answer": "6*7 = 42\n#### 42"}, "6*7 = 42\n#### 42"),
        ({"solution": "6*7 = 42\n#### 42", "answer": "3"}, "6*7 = 42\n#### 42"),
        ({"solution": "as required in part 2.", "answer": "3"}, "3"),
        ({"solution": "It is 7.", "answer": 3}, "3"),
        ({"solution": "so it is 7."}, "so it is 7."),
        ({"answer": 0.5}, "0.5"),
        ({"other": "1"}, ""),
    ],
)
def test_gold_answer_is_in_solution_or_answer(columns: dict[str, Any], gold: str) -> None:
    assert gold_text(columns) == gold


def test_gold_answer_is_in_the_column_that_is_named(math: MathReward) -> None:
    columns = {"solution": r"\boxed{1}", "answer": "2", "reward_model": {"ground_truth": "3"}}
    for column, gold in (("", r"\boxed{1}"), ("answer", "2"), ("reward_model.ground_truth", "3")):
        assert gold_text(columns, column) == gold
        named = MathReward(math.workers, column)
        texts = [r"\boxed{1}", r"\boxed{2}", r"\boxed{3}"]
        right = [float(text.strip("\\boxed{}") == gold.strip("\\boxed{}")) for text in texts]
        assert [one.value for one in named.outcomes(completed(texts, **columns))] == right
    assert gold_text(columns, "absent") == ""


def test_math_compares_final_answers_by_value(math: MathReward) -> None:
    texts = [
        r"So the answer is $\boxed{\frac{1}{2}}$.",
        r"The answer is $\boxed{0.5}$",
        r"The answer is $\boxed{2}$",
        "I do not know.",
        r"The answer is $\boxed{50\%}$",
        "So it is 1/2",
    ]
    rollouts = completed(texts, solution=r"... $\boxed{\frac12}$", answer="3")
    assert [one.value for one in math.outcomes(rollouts)] == [1, 1, 0, 0, 1, 1]
    assert math.answers(rollouts) == ["1/2", "1/2", "2", None, "1/2", "1/2"]
    (one,) = math.outcomes(completed(["It is 42."], answer="6*7 = 42\n#### 42"))
    assert one.value == 1


def test_right_answer_that_cannot_be_spelled_is_right() -> None:
    """As an exact number it has more digits than Python writes out."""
    power = r"$\boxed{1.5^{20000}}$"
    assert work({"gold": power, "completion": power}) == {
        "gold": True,
        "equal": True,
        "answer": None,
    }


def test_gold_answer_that_cannot_be_parsed_gives_none_and_its_prompt_is_left_out(
    math: MathReward,
) -> None:
    (one,) = math.outcomes(completed([r"$\boxed{2}$"], answer="no answer here"))
    assert one.value is None and one.failure is None
    golds = ["2", "no answer here", r"\boxed{x^2}", "2"]
    assert parseable(golds, math.workers) == [True, False, True, True]
    answers = ["2", "no answer here"]
    prompts = [Prompt(str(i), "", (1,), {"answer": a}) for i, a in enumerate(answers)]
    assert with_readable_gold(prompts, TrainConfig(reward=["math"])) == prompts[:1]
    assert with_readable_gold(prompts, TrainConfig(reward=["number"])) == prompts
    assert with_readable_gold(prompts, TrainConfig(reward=["number", "math"])) == prompts[:1]


def test_check_that_hangs_is_killed_counted_and_the_rest_goes_on() -> None:
    rollouts = completed([r"$\boxed{7}$", HANGS, r"$\boxed{7.0}$", HANGS, "7"], answer="7")
    rewards = load_rewards(TrainConfig(reward=["math"], math_timeout_s=0.5))
    began = time.monotonic()
    scored = score(rollouts, rewards)
    assert time.monotonic() - began < 60  # 9^9^9^9 alone would take for ever
    assert [r.reward for r in scored] == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert [r.failure for r in scored] == [None, "timeout", None, "timeout", None]
    assert [r.reward for r in score(rollouts[:1], rewards)] == [1.0]
    shared_pool.cache_clear()  # ends the workers of this test's time limit


def test_check_that_ends_its_process_is_an_error_and_no_timeout() -> None:
    reward = MathReward(Workers(odd_worker.__name__, "checks", size=1, timeout_s=1.0))
    rollouts = completed(["hang", "die", "right"], answer="7")
    found = [(one.value, one.failure) for one in reward.outcomes(rollouts)]
    assert found == [(0.0, "timeout"), (0.0, "error"), (1.0, None)]
    assert reward.answers(rollouts) == [None, None, "right"]
