"""The user's own functions: what they are called with, and what it costs when they fail."""

import threading
from dataclasses import replace
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agro_train.config import TrainConfig
from agro_train.metrics import describe
from agro_train.rewards.functions import Part, Rewards, load_rewards, refuse_broken, score
from agro_train.rewards.own import OwnFunction
from agro_train.rewards.own_worker import call
from agro_train.types import Rollout
from agro_train.user_function import load_function
from tests.train.models import ragged_rollouts, rollout

FUNCTIONS = "tests.train.reward_functions"


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
    """Three completions each of three prompts. The functions fail for the second one, whose
    completions begin with token 3."""
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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_module:f", "expected an importable module in 'no_such_module:f'"),
        ("agro_train.rewards.functions:absent", "expected a function absent"),
    ],
)
def test_function_that_is_not_there_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^reward: {message}"):
        load_function("reward", spec)


def test_refusal_comes_from_the_process_that_imports_the_function() -> None:
    with pytest.raises(
        ValueError, match="^reward: expected a function absent in .*, got None; define it there$"
    ):
        load_rewards(TrainConfig(reward=[f"{FUNCTIONS}:absent"]))


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0], "a list of 9 numbers .* got 1"), (["a"] * 9, "a number or None .* got 'a'")],
)
def test_reward_function_that_returns_nonsense_is_named(values: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=f"reward: expected {message}"):
        call(lambda **_: values, {"completions": [""] * 9})  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    "values",
    [
        np.array([0.5, 1.0, 0.0], dtype=np.float32),
        np.array([0.5, 1.0, 0.0], dtype=object),
        [np.float32(0.5), np.int64(1), np.bool_(False)],
        torch.tensor([0.5, 1.0, 0.0]),
        torch.tensor([0.5, 1.0, 0.0], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(0.5), torch.tensor([1]), torch.tensor(False)],
        (0.5, True, False),
        [Fraction(1, 2), 1, 0],
    ],
    ids=lambda values: f"{type(values).__name__} of {type(values[0]).__name__}",
)
def test_arrays_tensors_and_truths_are_numbers(values: Any) -> None:
    found = call(lambda **_: values, {"completions": [""] * 3})
    assert found == [0.5, 1.0, 0.0] and {type(value) for value in found} == {float}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 1)), r"a number or None from the reward function, got \[0.0\]"),
        (torch.tensor(1.0), "a list of 2 numbers from the reward function, got 1.0"),
        (torch.zeros(3), "a list of 2 numbers from the reward function, got 3"),
        (None, "a list of 2 numbers from the reward function, got None"),
        ({1: 2.0, 2: 1.0}, "a list of 2 numbers from the reward function, got {1: 2.0, 2: 1.0}"),
        ([1.0, 1j], "a number or None from the reward function, got 1j"),
    ],
)
def test_other_shapes_are_named(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"reward: expected {message}"):
        call(lambda **_: values, {"completions": [""] * 2})


def test_async_function_is_awaited_in_one_loop(of_a_user: Path) -> None:
    (of_a_user / "asks_a_server.py").write_text(
        "import asyncio\n"
        "loops = []\n"
        "async def ask(text):\n"
        "    await asyncio.sleep(0)\n"
        "    loops.append(asyncio.get_running_loop())\n"
        "    return float(loops[0] is loops[-1]) + len(text)\n"
        "async def reward(completions, **_):\n"
        "    return await asyncio.gather(*map(ask, completions))\n"
    )
    rewards = load_rewards(TrainConfig(reward=["asks_a_server:reward"]))
    rollouts = [replace(rollout("g", [2], [2]), completion=text) for text in ("a", "bc")]
    for _ in range(2):
        assert [one.reward for one in score(rollouts, rewards)] == [2.0, 3.0]
