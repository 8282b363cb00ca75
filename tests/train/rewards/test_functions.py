"""The configured rewards: by name, checked against the data, and summed."""

from dataclasses import replace
from decimal import Decimal

import pytest
import torch

from agro_train.config import TrainConfig
from agro_train.metrics import describe
from agro_train.refusal import Refusal
from agro_train.rewards.functions import (
    BrokenReward,
    check_columns,
    load_rewards,
    refuse_broken,
    refuse_unasked,
    score,
)
from agro_train.types import Prompt
from tests.train.models import ragged_rollouts, rollout

FUNCTIONS = "tests.train.reward_functions"


@pytest.mark.parametrize("value", [True, float("nan"), float("inf"), Decimal("nan"), ["3"], None])
def test_gold_answer_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(Refusal, match="reward: expected .* in column answer for reward=number"):
        check_columns("number", [Prompt("g", "q", (1,), {"answer": value})])


def test_number_and_math_take_columns_of_numbers() -> None:
    rollouts = [
        replace(rollout("g", [1], [1]), completion=text, columns={"answer": gold})
        for text, gold in (("= 42", 42), ("= 42", 42.0), ("= 41", 42), ("= 3.5", Decimal("3.50")))
    ]
    for spec in ("number", "math"):
        check_columns(spec, [Prompt("g", "q", (1,), r.columns) for r in rollouts])
        scored = score(rollouts, load_rewards(TrainConfig(reward=[spec])))
        assert [r.reward for r in scored] == [1.0, 1.0, 0.0, 1.0]


def test_completions_vote_for_their_answers() -> None:
    """By number its last number in one spelling, by a function of the user's own its text."""
    rollouts = [replace(rollout("g", [1], [1]), completion=text) for text in ("= 007", "no\n")]
    ((number,), (function,)) = (
        load_rewards(TrainConfig(reward=[spec])) for spec in ("number", f"{FUNCTIONS}:by_length")
    )
    assert number.reward.answers(rollouts) == ["7", None]
    assert function.reward.answers(rollouts) == ["= 007", "no"]


@pytest.mark.parametrize(
    ("reward", "columns", "message"),
    [
        (
            "math",
            {"gold": "2"},
            "text or a number in column solution or answer for .*, got None",
        ),
        ("number", {"solution": "2"}, "a number in column answer for reward=number, got None"),
        ("number", {"answer": "x"}, "a number in column answer .* got 'x'"),
    ],
)
def test_prompt_without_the_gold_answer_is_refused(
    reward: str, columns: dict[str, str], message: str
) -> None:
    good = Prompt("a", "1+1", (1,), {"solution": "2", "answer": "2"})
    check_columns(reward, [good])
    with pytest.raises(ValueError, match=f"reward: expected .*{message}.* prompt '1\\+2'"):
        check_columns(reward, [good, Prompt("b", "1+2", (1,), columns)])


def test_rewards_are_weighted_and_those_without_an_opinion_left_out() -> None:
    parts = [("by_length", 2.0), ("halves", -1.0), ("nothing", 1.0)]
    config = TrainConfig(
        reward=[f"{FUNCTIONS}:{name}" for name, _ in parts], reward_weights=[w for _, w in parts]
    )
    rewards = load_rewards(config)
    scored = score(ragged_rollouts(), rewards)
    for i, row in enumerate(scored):
        assert row.reward == 2 * len(row.completion_ids) - (0.5 if i < 3 else 0.0)
        assert list(row.rewards) == ["by_length", "halves", "nothing"]
        assert row.rewards["nothing"] is None
    assert [r.reward for r in score(ragged_rollouts(), rewards[2:])] == [None] * 9


def test_first_step_on_which_no_function_has_an_opinion_is_refused() -> None:
    config = TrainConfig(reward=[f"{FUNCTIONS}:nothing"])
    scored = score(ragged_rollouts(), load_rewards(config))
    with pytest.raises(
        BrokenReward,
        match="^reward: expected a number for some completion of the first step, got None from "
        "nothing for all 9; None means no opinion, .* return a number where the function can judge",
    ):
        refuse_broken(scored)
    failed = [replace(scored[0], failure="error"), *scored[1:]]
    with pytest.raises(BrokenReward, match="for all 9, 1 of them after a failure; None means"):
        refuse_broken(failed)
    refuse_broken([replace(scored[0], reward=0.0), *scored[1:]])
    refuse_broken([])


def test_weights_and_names_come_from_the_configuration() -> None:
    specs = ["number", "tests.train.reward_functions:even_share"]
    config = TrainConfig(reward=specs, reward_weights=[1.0, 0.25])
    named = [(part.name, part.weight) for part in load_rewards(config)]
    assert named == [("number", 1.0), ("even_share", 0.25)]


def test_metrics_of_the_completions() -> None:
    rows = [replace(r, step=2, rewards={"f": r.reward}) for r in ragged_rollouts()]
    rows[0] = replace(rows[0], source="recorded", step=99, finish="length")
    rows[1] = replace(rows[1], source="replayed", step=1)
    # The recorded row's age is unknown, whatever its share; the last one moves nothing.
    found = describe(rows, 4, [5.0, 4.0, *[1.0] * 6, 0.0])
    assert found["sample/staleness_effective"] == pytest.approx((4 * 3 + 6 * 2) / (4 + 6))
    assert found["sample/staleness_mean"] == pytest.approx((7 * 2 + 3) / 8)
    assert found["sample/staleness_max"] == 3
    assert found["sample/recorded"] == found["sample/replayed"] == pytest.approx(1 / 9)
    assert found["completions/clipped_ratio"] == pytest.approx(1 / 9)
    lengths = torch.tensor([float(len(r.completion_ids)) for r in rows])
    assert found["completions/mean_length"] == pytest.approx(float(lengths.mean()))
    assert found["completions/mean_terminated_length"] == pytest.approx(float(lengths[1:].mean()))
    assert found["completions/min_terminated_length"] == float(lengths[1:].min())
    assert found["completions/max_terminated_length"] == float(lengths[1:].max())
    rewards = torch.tensor([r.reward or 0.0 for r in rows])
    assert found["reward_std"] == found["rewards/f/std"] == pytest.approx(float(rewards.std()))


@pytest.mark.parametrize("spec", ["best", "best:", ":best"])
def test_unknown_reward_is_refused(spec: str) -> None:
    message = f"^reward: expected number, math, environment or module:function, got '{spec}'$"
    with pytest.raises(ValueError, match=message):
        load_rewards(TrainConfig(reward=[spec]))


def test_environments_numbers_are_a_reward_and_a_failed_one_has_none() -> None:
    config = TrainConfig(reward=["environment", "number"], reward_weights=[2.0, 1.0])
    row = replace(rollout("a", [2], [3], None), completion="7", columns={"answer": "7"})
    rows = [
        replace(row, environment_reward=0.5),
        replace(row, environment_reward=3.0, failure="error"),
        row,
    ]
    found = score(rows, load_rewards(config))
    assert [r.reward for r in found] == [2.0, None, 1.0]
    assert [dict(r.rewards) for r in found] == [
        {"environment": 0.5, "number": 1.0},
        {},
        {"environment": None, "number": 1.0},
    ]
    assert found[1] is rows[1]
    refuse_unasked(found)
    assert score(rows[1:2], load_rewards(config)) == rows[1:2]


def test_numbers_that_no_reward_counts_are_one_sentence() -> None:
    row = replace(rollout("a", [2], [3], None), completion="7", columns={"answer": "7"})
    unasked = score([replace(row, environment_reward=0.5)], load_rewards(TrainConfig()))
    with pytest.raises(BrokenReward, match="with reward=number, got 0.5; reward=environment takes"):
        refuse_unasked(unasked)
    failed = replace(row, failure="timeout")
    with pytest.raises(BrokenReward, match="^environment: expected rewards .* .timeout. for all 1"):
        refuse_broken([failed])
