"""math-verify in killable processes: right on real answers, alive after answers that hang."""

import time

import pytest

from agro_train.config import TrainConfig
from agro_train.rewards import math_verify, math_worker
from agro_train.rewards.functions import load_rewards, score, with_readable_gold
from agro_train.rewards.math_verify import check, gold_text, parseable
from agro_train.rewards.math_worker import work
from agro_train.rewards.workers import CannotStart, Lost, Workers
from agro_train.types import Prompt, Rollout

HANGS = r"$\boxed{9^{9^{9^{9}}}}$"
TIMEOUT = 5.0  # one pool for all tests, so that its workers start once


def test_math_compares_final_answers_by_value() -> None:
    completions = [
        r"So the answer is $\boxed{\frac{1}{2}}$.",
        r"The answer is $\boxed{0.5}$",
        r"The answer is $\boxed{2}$",
        "I do not know.",
        r"The answer is $\boxed{50\%}$",
        "So it is 1/2",
    ]
    gold = gold_text({"solution": r"... $\boxed{\frac12}$", "answer": "3"}) or ""
    found = check([gold] * 6, completions, TIMEOUT)
    assert [one.reward for one in found] == [1, 1, 0, 0, 1, 1]
    assert [one.answer for one in found] == ["1/2", "1/2", "2", None, "1/2", "1/2"]
    text = gold_text({"answer": "6*7 = 42\n#### 42"}) or ""
    assert [one.reward for one in check([text], ["It is 42."], TIMEOUT)] == [1]


def test_right_answer_that_cannot_be_spelled_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(answer: object) -> str:
        raise ValueError(answer)

    monkeypatch.setattr(math_worker, "spell", fails)
    assert work({"gold": "2", "completion": "2"}) == {"gold": True, "equal": True, "answer": None}


def test_gold_answer_that_cannot_be_parsed_gives_none_and_its_prompt_is_left_out() -> None:
    assert check(["no answer here"], [r"$\boxed{2}$"], TIMEOUT)[0].reward is None
    assert parseable(["2", "no answer here", r"\boxed{x^2}", "2"], TIMEOUT) == [1, 0, 1, 1]
    prompts = [Prompt(str(i), "", (1,), {"answer": a}) for i, a in enumerate(["2", "nothing"])]
    assert with_readable_gold(prompts, TrainConfig(reward=["math"])) == prompts[:1]
    assert with_readable_gold(prompts, TrainConfig(reward=["number"])) == prompts


def test_check_that_hangs_is_killed_counted_and_the_rest_goes_on() -> None:
    rollouts = [
        Rollout("g", "", (1,), text, (1,), "stop", None, columns={"answer": "7"})
        for text in (r"$\boxed{7}$", HANGS, r"$\boxed{7.0}$", HANGS, "7")
    ]
    rewards = load_rewards(TrainConfig(reward=["math"], math_timeout_s=0.5))
    began = time.monotonic()
    scored = score(rollouts, rewards)
    assert time.monotonic() - began < 60  # 9^9^9^9 alone would take for ever
    assert [r.reward for r in scored] == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert [r.failure for r in scored] == [None, "timeout", None, "timeout", None]
    assert [r.reward for r in score(rollouts[:1], rewards)] == [1.0]
    math_verify._pools.clear()  # ends the workers of this test's time limit


class OneLateOneDead:
    """Stands for a pool."""

    def map(self, jobs: list[dict[str, str]]) -> list[Lost]:
        assert len(jobs) == 2
        return [Lost.LATE, Lost.DIED]


def test_check_that_ends_its_process_is_an_error_and_no_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(math_verify, "_pool", lambda _: OneLateOneDead())
    rollouts = [Rollout("g", "", (1,), "7", (1,), "stop", None, columns={"answer": "7"})] * 2
    scored = score(rollouts, load_rewards(TrainConfig(reward=["math"])))
    assert [(r.reward, r.failure) for r in scored] == [(0.0, "timeout"), (0.0, "error")]


@pytest.mark.parametrize("kind", ["prints", "dies"])
def test_worker_may_print_and_may_die(kind: str) -> None:
    workers = Workers("tests.train.worker_main", size=1, timeout_s=20.0)
    jobs = ["a", kind, "b"]
    assert workers.map(jobs) == ["a", Lost.DIED if kind == "dies" else kind, "b"]


def test_job_that_a_dead_worker_cannot_take_is_done_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = Workers("tests.train.worker_main", size=1, timeout_s=20.0)
    assert workers.map(["a"]) == ["a"]
    dead = workers._workers[0].process
    dead.kill()
    dead.wait()
    monkeypatch.setattr(dead, "poll", lambda: None)  # as if it died just after it was asked
    assert workers.map(["b"]) == ["b"]


def test_worker_that_cannot_start_is_an_error_and_no_timeout() -> None:
    message = r"no.such.module: expected its process to start, got none \(exit status 1\)"
    with pytest.raises(ValueError, match=message):
        Workers("no.such.module", size=1, timeout_s=1.0).map(["job"])


def test_worker_that_stops_reading_is_late_with_a_job_of_any_size() -> None:
    workers = Workers("tests.train.worker_main", size=1, timeout_s=1.0)
    large = "x" * (1 << 20)  # more than a pipe holds
    assert workers.map(["deaf", large, "b"]) == ["deaf", Lost.LATE, "b"]
    assert workers.map([large]) == [large]


def test_workers_that_do_not_stay_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "_give", lambda *_: False)  # as if each had died just before
    workers = Workers("tests.train.worker_main", size=1, timeout_s=20.0)
    with pytest.raises(CannotStart, match="expected its process to wait for work, got 4 that end"):
        workers.map(["job"])
