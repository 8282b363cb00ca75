"""Rewards: their sum, the user's own by name, and functions that fail."""

import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agro_train.config import TrainConfig
from agro_train.metrics import describe
from agro_train.rewards import (
    Guarded,
    Part,
    Rewards,
    call,
    check_columns,
    load_reward,
    load_rewards,
    number_reward,
    refuse_broken,
    score,
)
from agro_train.types import Prompt, Rollout
from tests.train.models import ragged_rollouts, rollout


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


def guarded(function: Any, timeout_s: float = 5.0) -> Rewards:
    return (Part("f", 1.0, Guarded(function, "my:f", timeout_s)),)


def by_length(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


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
    def halves(completions: list[str], **_: object) -> list[float | None]:
        return [0.5] * 3 + [None] * (len(completions) - 3)

    def nothing(completions: list[str], **_: object) -> list[None]:
        return [None] * len(completions)

    parts = [(by_length, 2.0, "length"), (halves, -1.0, "halves"), (nothing, 1.0, "nothing")]
    rewards = tuple(Part(name, w, Guarded(f, name, 5.0)) for f, w, name in parts)
    scored = score(ragged_rollouts(), rewards)
    for i, row in enumerate(scored):
        assert row.reward == 2 * len(row.completion_ids) - (0.5 if i < 3 else 0.0)
        assert list(row.rewards) == ["length", "halves", "nothing"]
        assert row.rewards["nothing"] is None
    assert [r.reward for r in score(ragged_rollouts(), rewards[2:])] == [None] * 9


def test_weights_and_names_come_from_the_configuration() -> None:
    specs = ["number", "tests.train.models:even_share"]
    config = TrainConfig(reward=specs, reward_weights=[1.0, 0.25])
    named = [(part.name, part.weight) for part in load_rewards(config)]
    assert named == [("number", 1.0), ("even_share", 0.25)]


def raising(completion_ids: list[list[int]], **_: object) -> list[float]:
    if [3] in [ids[:1] for ids in completion_ids]:
        raise KeyError("three")
    return by_length(completion_ids)


def hanging(completion_ids: list[list[int]], **_: object) -> list[float]:
    while [3] in [ids[:1] for ids in completion_ids]:
        try:
            time.sleep(1000)
        except Exception:  # which code that waits for a server may well do
            pass
    return by_length(completion_ids)


def shapeless(completion_ids: list[list[int]], **_: object) -> Any:
    return ["a"] if [3] in [ids[:1] for ids in completion_ids] else by_length(completion_ids)


@pytest.mark.parametrize(
    ("function", "failure", "message"),
    [
        (raising, "error", "my:f failed: KeyError('three')"),
        (shapeless, "error", "expected a list of 9 numbers from the reward function, got 1"),
        (hanging, "timeout", "my:f took longer than 0.2 s"),
    ],
)
def test_prompt_on_which_a_function_fails_is_left_out_and_counted(
    function: Any, failure: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    rollouts = [rollout("g", [p], [p, c]) for p in (2, 3, 4) for c in (5, 6, 7)]
    scored = score(rollouts, guarded(function, timeout_s=0.2))
    assert [r.reward for r in scored] == [2.0] * 3 + [None] * 3 + [2.0] * 3
    assert [r.failure for r in scored] == [None] * 3 + [failure] * 3 + [None] * 3
    assert message in caplog.text and "1 of 3 prompts stay without rewards" in caplog.text
    assert describe(scored, 0, [1.0] * 9)[f"rewards/{failure}_rate"] == pytest.approx(1 / 3)
    refuse_broken(scored)


def test_prompts_without_ids_are_told_apart_by_their_group() -> None:
    def raises_for_b(completions: list[str], **_: object) -> list[float]:
        if "b" in completions:
            raise SystemExit("no server")  # which would end a run, too
        return [1.0] * len(completions)

    rollouts = [replace(rollout(g, [], [1]), completion=g) for g in "aabb"]
    scored = score(rollouts, guarded(raises_for_b))
    assert [r.reward for r in scored] == [1.0, 1.0, None, None]


def test_function_that_always_hangs_is_given_up_after_three_calls() -> None:
    calls = []

    def never(**_: object) -> list[float]:
        calls.append(1)
        time.sleep(1000)
        return []

    rollouts = [rollout("g", [p], [p]) for p in range(2, 12)]
    scored = score(rollouts, guarded(never, timeout_s=0.1))
    assert len(calls) == 3 and {r.failure for r in scored} == {"timeout"}
    with pytest.raises(ValueError, match="rewards for the first step, got a failure .timeout. for"):
        refuse_broken(scored)


def test_alarm_is_off_and_the_handler_back_after_a_call() -> None:
    before = signal.getsignal(signal.SIGALRM)
    score(ragged_rollouts(), guarded(by_length))
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


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
def test_reward_function_that_returns_nonsense_is_named(values: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=f"reward: expected {message}"):
        call(lambda **_: values, ragged_rollouts())  # type: ignore[arg-type, return-value]
