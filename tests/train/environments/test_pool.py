"""Environments in a process that may be killed: a failure costs its own rollout."""

import random
from typing import Any

import pytest

from agro_train.environments.pool import Environments, Episode, Said
from agro_train.refusal import Refusal
from agro_train.rewards.own_code import Failed
from agro_train.rewards.workers import NoResult

ODD = "tests.train.environments.odd"


def pool(name: str, timeout_s: float = 60.0) -> Environments:
    return Environments(f"{ODD}:{name}", timeout_s)


def begun(environments: Environments, count: int) -> list[Episode]:
    episodes = [environments.episode({"answer": "4"}, 7, number) for number in range(count)]
    assert all(isinstance(said, Said) for said in environments.ask(episodes))
    return episodes


def say(environments: Environments, episodes: list[Episode], *texts: str) -> list[Said | Failed]:
    for episode, text in zip(episodes, texts, strict=True):
        episode.texts.append(text)
    return list(environments.ask(episodes))


def numbers(found: list[Said | Failed]) -> list[str | None]:
    """What each said, or how it failed."""
    return [
        one.failure if isinstance(one, Failed) else one.messages and one.messages[0]["content"]
        for one in found
    ]


def test_every_rollout_has_an_environment_of_its_own() -> None:
    environments = pool("Counts")
    first, second = begun(environments, 2)
    assert numbers(say(environments, [first], "a")) == ["1"]
    assert numbers(say(environments, [first, second], "a", "b")) == ["2", "1"]
    (done,) = say(environments, [first], "a")
    assert done == Said(None, 3.0)
    assert environments.close([first, second]) is None


def test_a_killed_process_costs_the_rollout_that_it_was_killed_for() -> None:
    environments = pool("Hangs", timeout_s=2.0)
    episodes = begun(environments, 3)
    assert numbers(say(environments, episodes, "a", "a", "a")) == ["1", "1", "1"]
    found = say(environments, episodes, "hang", "a", "die")
    assert numbers(found) == ["timeout", "2", "error"]
    assert isinstance(found[0], Failed) and found[0].why == "took longer than 2 s"
    assert isinstance(found[2], Failed) and found[2].why == "ended its process"
    (done,) = say(environments, episodes[1:2], "a")
    assert done == Said(None, 3.0)


def test_an_environment_that_does_not_repeat_itself_is_told_so() -> None:
    environments = pool("Fickle")
    episodes = begun(environments, 2)
    say(environments, episodes, "a", "a")
    _, found = say(environments, episodes, "die", "a")
    assert isinstance(found, Failed) and "the same answers to the same turns" in found.why


def test_calls_that_are_made_again_have_the_time_of_a_call_each() -> None:
    environments = pool("Slow", timeout_s=1.8)
    dies, lives = begun(environments, 2)
    for _ in range(2):
        say(environments, [lives], "a")
    found = say(environments, [dies, lives], "die", "a")  # three turns of 0.7 s in a new process
    assert numbers(found[:1]) == ["error"] and found[1] == Said(None, 3.0)


def test_only_newest_calls_that_are_late_end_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = pool("Counts")
    episodes = begun(environments, 5)
    say(environments, episodes, *"aaaaa")

    def answers(jobs: list[dict[str, Any]]) -> list[Any]:
        ((kind, number),) = ((job["key"], job["number"]) for job in jobs)
        if kind < 4:  # a new process, in which the first turn hangs
            return [{"made": 1} if number == 2 else NoResult.TIMED_OUT]
        return [{"messages": None, "reward": 1.0}]

    monkeypatch.setattr(environments.workers, "map", answers)
    found = say(environments, episodes, *"aaaaa")
    assert numbers(found[:4]) == ["timeout"] * 4 and found[4] == Said(None, 1.0)
    monkeypatch.setattr(environments.workers, "map", lambda _: [NoResult.TIMED_OUT])
    whys = [one.why for one in environments.ask(episodes) if isinstance(one, Failed)]
    assert whys == ["took longer than 60 s"] * 3 + ["was not called"] * 2


def test_random_numbers_are_functions_of_seed_rollout_and_turn() -> None:
    environments = pool("Asks")
    episodes = begun(environments, 2)
    random.seed(episodes[0].seeds()[0])
    content = f"4+{random.randrange(10)}="
    for episode in episodes:
        assert episode.said[0].messages == [{"role": "user", "content": content}]
    first = numbers(say(environments, episodes, "a", "a"))
    assert first[0] != first[1]
    again = begun(pool("Asks"), 2)
    assert numbers(say(environments, again[1:], "a")) == first[1:]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Raises", "failed: KeyError('a')"),
        ("NoPair", "failed: environment: expected step to return two things, (messages or None, "),
    ],
)
def test_what_the_users_code_raises_is_the_reason(name: str, why: str) -> None:
    environments = pool(name)
    (found,) = say(environments, begun(environments, 1), "a")
    assert isinstance(found, Failed) and found.why.startswith(why) and "Traceback" in found.trace


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "NoReset",
            "expected a class with the methods reset and step in .*, got one without reset",
        ),
        ("Missing", "expected a function Missing in .*odd.py, got None"),
    ],
)
def test_a_class_that_is_none_is_refused_at_once(name: str, message: str) -> None:
    with pytest.raises(Refusal, match=f"environment: {message}"):
        pool(name)
