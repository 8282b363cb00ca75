"""Rewards: the built-in ones on real answers, the user's own by name, bad ones refused."""

from pathlib import Path

import pytest

from agro_train.rewards import check_columns, load_reward, math_reward, number_reward, score
from agro_train.types import Prompt, Rollout
from tests.train.models import ragged_rollouts


def test_number_is_the_last_integer() -> None:
    completions = ["56", "7 times 8 is 56.", "56 or 57", "none", "-56"]
    assert number_reward(completions, ["56"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_math_compares_final_answers_by_value() -> None:
    completions = [
        r"So the answer is $\boxed{\frac{1}{2}}$.",
        r"The answer is $\boxed{0.5}$",
        r"The answer is $\boxed{2}$",
        "I do not know.",
    ]
    assert math_reward(completions, solution=[r"... $\boxed{\frac12}$"] * 4) == [1, 1, 0, 0]
    assert math_reward(["It is 42."], answer=["6*7 = 42\n#### 42"]) == [1]


def test_math_has_no_opinion_where_the_gold_answer_cannot_be_parsed() -> None:
    assert math_reward([r"$\boxed{2}$"], solution=["no answer here"]) == [None]


@pytest.mark.parametrize(
    ("reward", "columns", "message"),
    [
        ("math", {"gold": "2"}, "text in column solution or answer for reward=math, got None"),
        ("number", {"solution": "2"}, "integer as text in column answer for reward=number, got No"),
        ("number", {"answer": "x"}, "an integer as text in column answer .* got 'x'"),
    ],
)
def test_prompt_without_the_gold_answer_is_refused(
    reward: str, columns: dict[str, str], message: str
) -> None:
    good = Prompt("a", "1+1", (1,), {"solution": "2", "answer": "2"})
    check_columns(reward, [good])
    with pytest.raises(ValueError, match=f"reward: expected .*{message}.* prompt '1\\+2'"):
        check_columns(reward, [good, Prompt("b", "1+2", (1,), columns)])


def test_users_function_gets_columns_and_its_opinions_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, completions, completion_ids, answer, **columns):\n"
        "    assert answer == [None] * len(completions), answer\n"
        "    values = [float(len(ids)) for ids in completion_ids]\n"
        "    return [None, float('inf'), *values[2:]]\n"
    )
    monkeypatch.chdir(tmp_path)
    rollouts = [Rollout(**{**vars(r), "columns": {"answer": None}}) for r in ragged_rollouts()]
    scored = score(rollouts, load_reward("my_rewards:length"))
    assert [r.reward for r in scored[:2]] == [None, None]
    assert [r.reward for r in scored[2:]] == [len(r.completion_ids) for r in rollouts[2:]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("best", "expected number, math or module:function, got 'best'"),
        ("no_such_module:f", "expected an importable module in 'no_such_module:f'"),
        ("agro_train.rewards:absent", "expected a function absent"),
    ],
)
def test_unknown_reward_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"reward: {message}"):
        load_reward(spec)


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0], "a list of 9 numbers .* got 1"), (["a"] * 9, "a number or None .* got 'a'")],
)
def test_reward_function_that_returns_nonsense_is_refused(
    values: list[object], message: str
) -> None:
    with pytest.raises(ValueError, match=f"reward: expected {message}"):
        score(ragged_rollouts(), lambda **_: values)  # type: ignore[arg-type, return-value]
