"""What a step is made of: shares, staleness, and replay as a function of (seed, step)."""

from pathlib import Path

import pytest

from agro_train.config import TrainConfig
from agro_train.data.mix import Mix, plan, replayed_groups, steps_of_epochs
from agro_train.data.rollout_log import write_rollouts
from agro_train.run_folder import RunFolder
from agro_train.types import Rollout


def config(**changes: object) -> TrainConfig:
    settings = {"steps": 6, "prompts_per_step": 8, "num_generations": 2, "replay_max_staleness": 2}
    return TrainConfig(**{**settings, **changes})  # type: ignore[arg-type]


def log(folder: Path, mix: list[Mix], step: int, size: int = 2) -> None:
    """The record of a step: `fresh` groups whose completions name step and group, and one replayed
    and one recorded group that must not come again."""
    rows = [
        Rollout(f"g{i}", "", (2,), "", (step + 3, i + 2), "stop", 0.5, step=step)
        for i in range(mix[step].fresh)
        for _ in range(size)
    ]
    old = [
        Rollout("x", "", (2,), "", (9, 9), "stop", 0.5, step=step, source=source)
        for source in ("replayed", "recorded")
    ]
    path = RunFolder(folder).rollouts(step + 1)
    path.parent.mkdir(exist_ok=True)
    write_rollouts(path, rows + old)


def test_fresh_groups_stand_in_until_there_are_some_to_replay() -> None:
    steps = plan(config(replay_fraction=0.5))
    assert [(s.fresh, s.replayed) for s in steps] == [(8, 0)] + [(4, 4)] * 5
    assert [s.first_fresh for s in steps] == [0, 8, 12, 16, 20, 24]


def test_steps_whose_record_is_gone_are_not_replayed(tmp_path: Path) -> None:
    settings = config(replay_fraction=0.5)
    steps = plan(settings, dict.fromkeys([0, 1]))
    assert [(s.fresh, s.replayed) for s in steps] == [(8, 0)] * 3 + [(4, 4)] * 3
    log(tmp_path, steps, 2)
    replayed = replayed_groups(RunFolder(tmp_path).rollouts, steps, 3, settings)
    assert len(replayed) == 4 and {group[0].step for group in replayed} == {2}


def test_past_steps_have_what_their_record_has() -> None:
    """The first of them is gone, from which the second and third replayed."""
    settings = config(replay_fraction=1.0, replay_max_staleness=4)
    planned = [(s.fresh, s.replayed) for s in plan(settings)]
    assert planned == [(8, 0), (0, 8), (0, 8), (0, 8), (0, 8), (8, 0)]
    past = {0: None, 1: 0, 2: 0}
    steps = plan(settings, past)
    # Of the past what was; the next step has nothing to replay.
    assert [(s.fresh, s.replayed) for s in steps[1:]] == [(0, 8), (0, 8), (8, 0), (0, 8), (0, 8)]
    assert [s.replayable for s in steps[:4]] == [0, 0, 0, 8]


@pytest.mark.parametrize(
    ("changes", "epochs", "steps"),
    [
        ({}, 1, 3),  # 24 prompts, 8 a step
        ({}, 0.5, 2),
        ({}, 2, 6),
        ({"replay_fraction": 0.5}, 1, 5),  # 8 fresh groups, then 4 a step
        ({"replay_fraction": 1.0}, 1, 7),  # 8, 0, 0, 8, 0, 0, 8
        ({"recorded": ["a"]}, 1, 5),  # 40 recorded groups
        ({"recorded": ["a"], "recorded_fraction": 0.5}, 1, 6),  # 4 fresh prompts a step
    ],
)
def test_epochs_are_passes_over_the_prompts_or_the_recorded_groups(
    changes: dict[str, object], epochs: float, steps: int
) -> None:
    settings = config(num_train_epochs=epochs, **changes)
    assert steps_of_epochs(settings, num_prompts=24, num_recorded=40) == steps


def test_shares_of_all_three_sources() -> None:
    both = config(recorded=["a.jsonl"], recorded_fraction=0.25, replay_fraction=0.5)
    both.check()
    assert [(s.fresh, s.replayed, s.recorded) for s in plan(both)[:2]] == [(6, 0, 2), (2, 4, 2)]


def test_nothing_but_replay_generates_when_the_record_is_too_old() -> None:
    steps = plan(config(replay_fraction=1.0))
    assert [s.fresh for s in steps] == [8, 0, 0, 8, 0, 0]


@pytest.mark.parametrize("staleness", [1, 3])
def test_replay_is_no_older_than_allowed_and_takes_no_group_twice(
    staleness: int, tmp_path: Path
) -> None:
    settings = config(replay_fraction=0.5, replay_max_staleness=staleness)
    steps = plan(settings)
    seen = set()
    for step in range(6):
        groups = replayed_groups(RunFolder(tmp_path).rollouts, steps, step, settings)
        assert len(groups) == steps[step].replayed
        assert all(len(group) == 2 and group[0].group == group[1].group for group in groups)
        for group in groups:
            assert all(r.source == "replayed" and r.step is not None for r in group)
            ages = {step - (r.step or 0) for r in group}
            assert len(ages) == 1 and 1 <= min(ages) <= staleness
            seen |= ages
        assert len({group[0].completion_ids for group in groups}) == len(groups)
        log(tmp_path, steps, step)
    assert seen == set(range(1, staleness + 1))


def test_replay_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    settings = config(replay_fraction=0.5)
    steps = plan(settings)
    for step in range(4):
        log(tmp_path, steps, step)
    first = replayed_groups(RunFolder(tmp_path).rollouts, steps, 4, settings)
    assert replayed_groups(RunFolder(tmp_path).rollouts, steps, 4, settings) == first
    other = config(replay_fraction=0.5, seed=1)
    assert replayed_groups(RunFolder(tmp_path).rollouts, steps, 4, other) != first


def test_record_that_was_changed_is_refused(tmp_path: Path) -> None:
    settings = config(replay_fraction=1.0)
    steps = plan(settings)
    log(tmp_path, steps, 0, size=1)
    with pytest.raises(ValueError, match="expected 16 fresh rollouts in .*000001.jsonl, got 8"):
        replayed_groups(RunFolder(tmp_path).rollouts, steps, 1, settings)


def test_record_without_kept_ids_is_refused_where_they_are_scored_over(tmp_path: Path) -> None:
    settings = config(replay_fraction=1.0, top_k=4)
    steps = plan(settings)
    log(tmp_path, steps, 0)
    with pytest.raises(ValueError, match="replay: expected kept_ids of every fresh rollout in"):
        replayed_groups(RunFolder(tmp_path).rollouts, steps, 1, settings)
