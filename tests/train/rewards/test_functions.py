"""Rewards: their sum, the user's own by name, and functions that fail."""

import threading
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch

from agro_train.config import TrainConfig
from agro_train.metrics import describe
from agro_train.rewards.functions import (
    Part,
    Rewards,
    check_columns,
    load_rewards,
    refuse_broken,
    score,
)
from agro_train.rewards.number import number_reward
from agro_train.rewards.own import OwnFunction
from agro_train.rewards.own_worker import call, load_function
from agro_train.types import Prompt, Rollout
from tests.train.models import ragged_rollouts, rollout

FUNCTIONS = "tests.train.reward_functions"


def test_number_is_the_last_integer() -> None:
    completions = ["56", "7 times 8 is 56.", "56 or 57", "none", "-56"]
    assert number_reward(completions, ["56"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


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


def own(name: str, timeout_s: float = 60.0) -> Rewards:
    config = TrainConfig(reward_timeout_s=timeout_s)
    return (Part("f", 1.0, OwnFunction.start(f"{FUNCTIONS}:{name}", config)),)


def test_users_function_gets_columns_and_its_opinions_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, completions, completion_ids, answer, **columns):\n"
        "    assert answer == [None] * len(completions), answer\n"
        "    print('scoring', len(completions))\n"
        "    values = [float(len(ids)) for ids in completion_ids]\n"
        "    return [None, float('inf'), *values[2:]]\n"
    )
    monkeypatch.chdir(tmp_path)
    rollouts = [Rollout(**{**vars(r), "columns": {"answer": None}}) for r in ragged_rollouts()]
    config = TrainConfig(reward=["my_rewards:length"])
    scored = score(rollouts, load_rewards(config))
    assert [r.reward for r in scored[:2]] == [None, None]
    assert [r.failure for r in scored[:3]] == [None, "error", None]
    assert [r.reward for r in scored[2:]] == [len(r.completion_ids) for r in rollouts[2:]]
    assert [r.rewards["length"] for r in scored] == [r.reward for r in scored]


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


def test_weights_and_names_come_from_the_configuration() -> None:
    specs = ["number", "tests.train.reward_functions:even_share"]
    config = TrainConfig(reward=specs, reward_weights=[1.0, 0.25])
    named = [(part.name, part.weight) for part in load_rewards(config)]
    assert named == [("number", 1.0), ("even_share", 0.25)]


@pytest.mark.parametrize(
    ("name", "failure", "message"),
    [
        ("raising", "error", "raising failed: KeyError('three')"),
        ("dying", "error", "dying ended its process"),
        ("shapeless", "error", "expected a list of 9 numbers from the reward function, got 1"),
        ("hanging", "timeout", "hanging took longer than 2 s"),
        ("hanging_in_native_code", "timeout", "hanging_in_native_code took longer than 2 s"),
    ],
)
def test_prompt_on_which_a_function_fails_is_left_out_and_counted(
    name: str, failure: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    rollouts = [rollout("g", [p], [p, c]) for p in (2, 3, 4) for c in (5, 6, 7)]
    scored = score(rollouts, own(name, timeout_s=2.0 if failure == "timeout" else 60.0))
    assert [r.reward for r in scored] == [2.0] * 3 + [None] * 3 + [2.0] * 3
    assert [r.failure for r in scored] == [None] * 3 + [failure] * 3 + [None] * 3
    assert message in caplog.text and "1 of 3 prompts stay without rewards" in caplog.text
    assert describe(scored, 0, [1.0] * 9)[f"rewards/{failure}_rate"] == pytest.approx(1 / 3)
    refuse_broken(scored)


def test_prompts_without_ids_are_told_apart_by_their_group() -> None:
    rollouts = [replace(rollout(g, [], [1]), completion=g) for g in "aabb"]
    scored = score(rollouts, own("leaving"))  # SystemExit would end a run, too
    assert [r.reward for r in scored] == [1.0, 1.0, None, None]


OF_A_USER = """
import os, sys, time

calls = 0

def never(**_):
    with open("calls", "a") as file:
        file.write("x")
    print("called")
    assert sys.stdin.read() == "", "the jobs are not for it"
    if os.fork() == 0:  # and its child holds every file it had
        time.sleep(1000)
    time.sleep(1000)

def counting(completions, day, **_):
    global calls
    calls += 1
    assert {d.year for d in day} == {2024}
    return [calls] * len(completions)
"""


@pytest.fixture
def of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "of_a_user.py").write_text(OF_A_USER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_function_that_always_hangs_is_given_up_after_three_calls(of_a_user: Path) -> None:
    rollouts = [rollout("g", [p], [p]) for p in range(2, 12)]
    config = TrainConfig(reward=["of_a_user:never"], reward_timeout_s=0.5)
    scored = score(rollouts, load_rewards(config))
    assert (of_a_user / "calls").read_text() == "xxx"
    assert {r.failure for r in scored} == {"timeout"}
    with pytest.raises(ValueError, match="rewards for the first step, got a failure .timeout. for"):
        refuse_broken(scored)


def test_function_keeps_what_it_counts_and_gets_columns_json_has_no_word_for(
    of_a_user: Path,
) -> None:
    rewards = load_rewards(TrainConfig(reward=["of_a_user:counting"]))
    rollouts = [replace(rollout("g", [2], [2]), columns={"day": date(2024, 1, 2)})]
    assert [score(rollouts, rewards)[0].reward for _ in range(3)] == [1.0, 2.0, 3.0]


def test_function_may_be_called_from_another_thread() -> None:
    rewards, found = own("hanging", timeout_s=2.0), list[Rollout]()
    rollouts = [rollout("g", [p], [p]) for p in (2, 3)]
    thread = threading.Thread(target=lambda: found.extend(score(rollouts, rewards)))
    thread.start()
    thread.join()
    assert [r.failure for r in found] == [None, "timeout"]


def test_function_that_cannot_be_started_again_costs_only_its_rewards(
    of_a_user: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewards = load_rewards(TrainConfig(reward=["of_a_user:never"], reward_timeout_s=0.5))
    (of_a_user / "of_a_user.py").write_text("raise RuntimeError('no such model')")
    scored = score([rollout("g", [p], [p]) for p in (2, 3)], rewards)
    assert [r.failure for r in scored] == ["timeout"] * 2
    assert "could not be started again: reward: expected an importable module" in caplog.text
    assert "RuntimeError('no such model')" in caplog.text


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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:f", "expected an importable module in 'no_such_module:f'"),
        ("agro_train.rewards.functions:absent", "expected a function absent"),
    ],
)
def test_function_that_is_not_there_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^reward: {message}"):
        load_function(spec)


@pytest.mark.parametrize("spec", ["best", "best:", ":best"])
def test_unknown_reward_is_refused(spec: str) -> None:
    message = f"^reward: expected number, math or module:function, got '{spec}'$"
    with pytest.raises(ValueError, match=message):
        load_rewards(TrainConfig(reward=[spec]))


def test_refusal_comes_from_the_process_that_imports_the_function() -> None:
    with pytest.raises(ValueError, match="^reward: expected a function absent in .*, got None$"):
        load_rewards(TrainConfig(reward=[f"{FUNCTIONS}:absent"]))


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0], "a list of 9 numbers .* got 1"), (["a"] * 9, "a number or None .* got 'a'")],
)
def test_reward_function_that_returns_nonsense_is_named(values: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=f"reward: expected {message}"):
        call(lambda **_: values, {"completions": [""] * 9})  # type: ignore[arg-type, return-value]
