"""Fresh groups: who samples what is a function of the step, and nothing sampled is lost."""

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from agro_train.config import TrainConfig
from agro_train.data.mix import plan
from agro_train.engines.engine import BrokenEngine, Snapshot
from agro_train.fresh import (
    Ahead,
    Group,
    InStep,
    Questioner,
    groups_of_json,
    groups_to_json,
    results,
)
from agro_train.ranks import Ranks
from agro_train.refusal import Refusal
from agro_train.rewards.functions import load_rewards
from agro_train.types import Prompt, Rollout
from tests.train.models import rollout

CONFIG = TrainConfig(
    steps=6,
    prompts_per_step=2,
    num_generations=2,
    reward=["tests.train.reward_functions:first_even"],
    max_staleness=1,
)
PROMPTS = [Prompt(str(n), str(n), (n,), {}) for n in range(2, 7)]
LONG_S = 30.0


@dataclass
class Beside:
    """An `EngineAhead` whose completions say which weights made them, and which can be held up."""

    policy: int = 0  # steps that it has taken
    weights: int | None = None
    log: list[tuple[str, int]] = field(default_factory=list)
    may_sample: threading.Event = field(default_factory=threading.Event)
    dies_at: int | None = None  # with the weights of that many steps

    def __post_init__(self) -> None:
        self.may_sample.set()

    def snapshot(self, step: int, prompt: Prompt) -> Snapshot:
        del prompt
        assert step == self.policy
        self.log.append(("copy", step))
        return Snapshot(step)

    def load(self, snapshot: Snapshot) -> None:
        self.weights = snapshot.step
        self.log.append(("load", snapshot.step))

    def sample(
        self, prompts: Sequence[Prompt], *, num_generations: int, step: int | None, **_: Any
    ) -> Iterator[tuple[int, list[Rollout]]]:
        assert self.may_sample.wait(LONG_S)
        assert step == self.weights
        if step == self.dies_at:
            raise BrokenEngine("sampling: expected an engine, got none")
        for place in reversed(range(len(prompts))):  # groups come in any order
            ids = prompts[place].ids
            made = replace(rollout(prompts[place].group, list(ids), [2 + step, 1]), step=step)
            yield place, [replace(made, sampling_logprobs=(-0.5, -0.25))] * num_generations

    def close(self) -> None:
        self.log.append(("close", self.policy))


def questioner(config: TrainConfig = CONFIG, ranks: Ranks | None = None) -> Questioner:
    rewards = load_rewards(config)
    return Questioner(config, PROMPTS, plan(config), ranks or Ranks(), rewards, {})


def beside(config: TrainConfig) -> tuple[Beside, Ahead]:
    engine = Beside()
    return engine, Ahead(questioner(config), engine, 0)


def run(ahead: Ahead, engine: Beside, steps: range) -> list[list[Group]]:
    taken = []
    for step in steps:
        engine.policy = step
        taken.append(ahead.take(step))
    return taken


def sampled_by(taken: Sequence[Sequence[Group]]) -> list[int | None]:
    found = []
    for groups in taken:
        (step,) = {r.step for group in groups for r in group.rollouts}
        found.append(step)
    return found


@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_groups_of_step_t_are_sampled_after_t_minus_k_updates(k: int) -> None:
    engine = Beside()
    ahead = Ahead(questioner(replace(CONFIG, max_staleness=k)), engine, 0)
    taken = run(ahead, engine, range(6))
    assert sampled_by(taken) == [max(0, step - k) for step in range(6)]
    copies = [step for what, step in engine.log if what == "copy"]
    assert copies == list(range(max(1, 6 - k)))  # one an update, while there are steps to sample
    assert [step for what, step in engine.log if what == "load"] == copies


def test_same_prompts_are_asked_in_the_same_order_whoever_samples() -> None:
    engine = Beside()
    ahead = Ahead(questioner(), engine, 0)

    class Now:
        def complete(self, prompts: Sequence[Prompt], **_: Any) -> list[Rollout]:
            return [rollout(p.group, list(p.ids), [3, 1]) for p in prompts for _ in range(2)]

    in_step = InStep(questioner(), Now())  # type: ignore[arg-type]
    for step in range(6):
        engine.policy = step
        ours, theirs = ahead.take(step), in_step.take(step)
        assert [(g.step, g.number) for g in ours] == [(step, 0), (step, 1)]
        assert [[r.group for r in g.rollouts] for g in ours] == [
            [r.group for r in g.rollouts] for g in theirs
        ]


def test_rows_bring_the_samplers_sum_and_their_rewards() -> None:
    engine = Beside()
    for group in Ahead(questioner(), engine, 0).take(0):
        for row in group.rollouts:
            assert row.sampling_logprob == -0.75 and row.sampling_logprobs is None
            assert row.reward == 1.0  # first_even of token 2


def test_sampling_goes_on_while_the_policy_is_updated() -> None:
    engine = Beside()
    ahead = Ahead(questioner(), engine, 0)
    engine.may_sample.clear()
    ahead.advance(0)  # asks for steps 0 and 1, and returns while nothing has been sampled
    assert not any(future.done() for future in ahead.pending.values())
    engine.may_sample.set()
    assert sampled_by([ahead.take(0)]) == [0]
    results(ahead.pending[1])  # that of step 1 goes on by itself
    engine.policy = 1
    engine.may_sample.clear()  # step 2 has to wait
    ahead.take(1)
    assert ahead.metrics()["async/queue"] == 0.0
    engine.may_sample.set()


@pytest.mark.parametrize("k", [1, 3])
def test_a_checkpoints_groups_are_what_earlier_policies_sampled(k: int) -> None:
    config = replace(CONFIG, max_staleness=k)
    engine, ahead = beside(config)
    whole = run(ahead, engine, range(6))

    engine, ahead = beside(config)
    run(ahead, engine, range(2))
    engine.policy = 2
    ahead.advance(2)
    held = ahead.in_flight(2)
    assert [g.step for g in held] == [step for step in range(2, min(2 + k, 6)) for _ in range(2)]
    restored = list(groups_of_json(groups_to_json(held)))
    assert restored == held
    again = Beside(policy=2)
    resumed = Ahead(questioner(config), again, 2, restored)
    assert run(resumed, again, range(2, 6)) == whole[2:]


def test_an_engine_that_ends_is_told_where_its_groups_are_needed() -> None:
    engine = Beside(dies_at=1)
    ahead = Ahead(questioner(), engine, 0)
    run(ahead, engine, range(2))  # steps 0 and 1 are of the first weights
    engine.policy = 2
    with pytest.raises(BrokenEngine, match="expected an engine, got none"):
        ahead.take(2)
    assert ahead.in_flight(2) == []


def test_groups_of_a_step_without_fresh_ones_are_none() -> None:
    config = replace(CONFIG, replay_fraction=1.0, replay_max_staleness=2)
    engine, ahead = beside(config)
    counts = []
    for step in range(6):
        engine.policy = step
        counts.append(len(ahead.take(step)))
    assert counts == [mix.fresh for mix in plan(config)] and 0 in counts


def test_groups_behind_a_step_without_fresh_ones_are_restored() -> None:
    """Steps 1 and 2 replay step 0's groups; with three steps ahead, step 3's lie in the checkpoint
    after step 1."""
    config = replace(CONFIG, replay_fraction=1.0, replay_max_staleness=2, max_staleness=3)
    assert [mix.fresh for mix in plan(config)] == [2, 0, 0, 2, 0, 0]
    engine, ahead = beside(config)
    run(ahead, engine, range(1))
    engine.policy = 1
    ahead.advance(1)
    held = ahead.in_flight(1)
    assert [(g.step, g.number) for g in held] == [(3, 0), (3, 1)]
    again = Beside(policy=1)
    resumed = Ahead(questioner(config), again, 1, held)
    taken = []
    for step in range(1, 6):
        again.policy = step
        taken.append(resumed.take(step))
    assert taken[2] == held and not any(taken[:2] + taken[3:])
    assert "load" not in [what for what, _ in again.log]  # nothing was sampled again


def test_groups_of_the_step_in_hand_are_there_until_its_update() -> None:
    """A step that is interrupted before its update is taken again, with the groups it had."""
    engine = Beside()
    ahead = Ahead(questioner(), engine, 0)
    first = run(ahead, engine, range(2))
    assert [g for g in ahead.in_flight(1) if g.step == 1] == first[1]
    engine.policy = 2
    ahead.advance(2)
    assert {g.step for g in ahead.in_flight(2)} == {2}


def test_what_waits_is_not_begun_after_the_end() -> None:
    engine = Beside()
    engine.may_sample.clear()
    ahead = Ahead(questioner(), engine, 0)
    ahead.advance(0)  # step 0 is being sampled, step 1 waits
    while ("load", 0) not in engine.log:
        time.sleep(0.001)
    ahead.close()
    engine.may_sample.set()
    ahead.pending[0].result(LONG_S)
    time.sleep(0.05)
    assert not ahead.pending[1].done()


def test_ranks_share_a_steps_groups() -> None:
    numbers = []
    for rank in range(2):
        ask = questioner(replace(CONFIG, prompts_per_step=5), Ranks(rank, 2))
        numbers.append(ask.numbers(0))
    assert numbers == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_staleness": -1}, "max_staleness: expected at least 0, got -1"),
        (
            {"max_staleness": 2, "recorded": ["a.jsonl"], "recorded_fraction": 1.0},
            "max_staleness: expected 0 where every group is recorded, got 2",
        ),
        ({"max_staleness": 1, "lr_weight": 1.0}, "lr_weight: expected 0 with max_staleness=1"),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        replace(TrainConfig(), **settings).check()
