"""Where a resumed run goes on, and what of its past is still there."""

from collections import Counter
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from agro_train.config import TrainConfig, load_resumed
from agro_train.data.rollout_log import read_rollouts
from agro_train.fresh import Group, Questioner, groups_of_json
from agro_train.policy import checkpoint
from agro_train.ranks import Ranks
from agro_train.refusal import Refusal
from agro_train.run import Start
from agro_train.run_folder import RunFolder


def changes(folder: RunFolder, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """What a resumed run does in another way from now on: its settings before, and now."""
    before, now = (vars(c) for c in (load_resumed(folder.path), config))
    return {name: (before[name], now[name]) for name in now if before[name] != now[name]}


def resume_point(folder: RunFolder, accelerator: Accelerator) -> Start:
    """Where a resumed run goes on."""
    newest = newest_checkpoint(folder.path, accelerator)
    if newest is None:
        return Start()
    state = checkpoint.read_state(newest)
    return Start(state.step, newest, state.base_model, folder.evaluated(state.step))


def newest_checkpoint(folder: Path, accelerator: Accelerator) -> Path | None:
    """The run's newest checkpoint; None for a run that has to start again, for it was ended before
    its first one. The main rank reads the files for all.
    """

    def find() -> Path | None:
        found = checkpoint.newest(folder, accelerator.print)
        if found is None:
            accelerator.print(f"{folder}: no checkpoint was written yet; starting again at step 0")
        return found

    return Ranks.of(accelerator).from_main(find)


def check_unfinished(config: TrainConfig, folder: RunFolder, start: Start) -> None:
    """Raises Refusal for a resumed run that has nothing left to do."""
    ended = folder.page.exists() and (start.evaluated or not config.evaluates)
    if start.step > config.steps or (start.step == config.steps and ended):
        name = "num_train_epochs" if config.num_train_epochs else "steps"
        raise Refusal(
            f"{name}: expected more than the {start.step} steps that {folder.path} has already "
            f"taken, got {config.steps}; add {name}=N to go on"
        )


def past_groups(
    config: TrainConfig, folder: RunFolder, start: Start, accelerator: Accelerator
) -> dict[int, int | None]:
    """By past step, the first is 0, the fresh groups in its record, None where that is gone; empty
    where all are there, or none might be replayed."""
    there = folder.all_rollouts()
    lost = [step for step in range(start.step) if step + 1 not in there]
    if not (lost and config.replayed_prompts_per_step):
        return {}
    accelerator.print(
        f"{folder.path}: the rollouts of {len(lost)} past steps are gone; fresh groups take "
        "the place of those that would be replayed"
    )
    past: dict[int, int | None] = dict.fromkeys(lost)
    for step in set(range(start.step)) - past.keys():
        rows = read_rollouts(there[step + 1])
        past[step] = sum(row.source == "fresh" for row in rows) // config.num_generations
    return past


def groups_in_flight(start: Start, ask: Questioner) -> list[Group]:
    """This rank's part of what the checkpoint holds of the steps to come: of each such step all its
    groups, or none where the engine ended before they were there."""
    path = None if start.checkpoint is None else start.checkpoint / checkpoint.AHEAD
    if path is None or not path.is_file():
        return []
    groups = list(groups_of_json(path.read_text()))
    count = Counter(group.step for group in groups)
    last = start.step
    while last < len(ask.mix) and count[last] == ask.mix[last].fresh:
        last += 1
    return [g for g in groups if g.step < last and g.number in ask.numbers(g.step)]
