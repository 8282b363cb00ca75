"""What each step is made of: fresh, replayed and recorded groups, as functions of (seed, step).

Replayed groups are the run's own past ones, read back from its record, so a resumed run that
rewinds its record replays exactly what the uninterrupted one did.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from agro_train.config import TrainConfig
from agro_train.data.rollout_log import read_rollouts
from agro_train.refusal import Refusal
from agro_train.seeds import derive_seed, shuffled
from agro_train.types import Rollout

T = TypeVar("T")


@dataclass(frozen=True)
class Mix:
    """The groups of one step, in this order."""

    fresh: int
    replayed: int
    recorded: int
    first_fresh: int  # fresh groups of all earlier steps together
    replayable: int  # of the fresh ones, those that later steps may replay: all, or none


def plan(config: TrainConfig, past: Mapping[int, int | None] | None = None) -> list[Mix]:
    """The mix of every step of a run.

    A step replays `replayed_prompts_per_step` groups, each at most once and none older than
    `replay_max_staleness` steps. While there are fewer (there are none in the first step), fresh
    groups take their place.

    Args:
        past: where some of a resumed run's record is gone: by past step, the first is 0, how many
            fresh groups its record has; None where there is none, which cannot be replayed.
    """
    return list(itertools.islice(_steps(config, past or {}), config.steps))


def steps_of_epochs(config: TrainConfig, num_prompts: int, num_recorded: int) -> int:
    """The steps in which a run comes through its `num_train_epochs`: the first after which it has
    seen each prompt so often, or each recorded group where all are recorded."""
    wanted = config.num_train_epochs * (num_recorded if config.offline else num_prompts)
    number = seen = 0
    steps = _steps(config, {})
    while seen < wanted:  # it ends: what is replayed was fresh at some time
        step = next(steps)
        seen += step.recorded if config.offline else step.fresh
        number += 1
    return number


def _steps(config: TrainConfig, past: Mapping[int, int | None]) -> Iterator[Mix]:
    """The mix of step after step, without an end."""
    recorded = config.recorded_prompts_per_step
    window: deque[int] = deque(maxlen=config.replay_max_staleness)
    first_fresh = available = 0
    for number in itertools.count():
        replayed = min(config.replayed_prompts_per_step, available)
        own = config.prompts_per_step - recorded
        # Of a past step, what it had: it was planned while more was there to replay.
        made = past.get(number)
        fresh = own - replayed if made is None else made
        replayed = own - fresh
        kept = 0 if number in past and made is None else fresh
        yield Mix(fresh, replayed, recorded, first_fresh, kept)
        first_fresh += fresh
        available += kept - (window[0] if len(window) == window.maxlen else 0)
        window.append(kept)


def in_recorded_order(groups: Sequence[T], first: int, count: int, seed: int) -> list[T]:
    """Recorded groups first .. first + count of a run. Their order is not that of the fresh
    prompts: in a record of all prompts each group would come beside a fresh one of its own prompt.
    """
    return shuffled(groups, first, count, seed, "recorded order")


def replayed_groups(
    record: Callable[[int], Path], steps: Sequence[Mix], step: int, config: TrainConfig
) -> list[list[Rollout]]:
    """The groups that `step` (0 is the first) takes from the steps before it.

    `record` says where a step's rollouts were logged; it counts the steps from 1.
    """
    oldest = max(0, step - config.replay_max_staleness)
    candidates = [(past, i) for past in range(oldest, step) for i in range(steps[past].replayable)]
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "replay", step))
    order = torch.randperm(len(candidates), generator=generator).tolist()
    chosen = [candidates[i] for i in order[: steps[step].replayed]]
    size = config.num_generations
    fresh = {
        past: [r for r in read_rollouts(record(past + 1)) if r.source == "fresh"]
        for past in sorted({past for past, _ in chosen})
    }
    for past, rollouts in fresh.items():
        if len(rollouts) != steps[past].fresh * size:
            raise Refusal(
                f"replay: expected {steps[past].fresh * size} fresh rollouts in "
                f"{record(past + 1)}, got {len(rollouts)}; the run's own record is needed as it "
                "was written"
            )
        if config.truncates and not all(r.kept_ids for r in rollouts):
            raise Refusal(
                f"replay: expected kept_ids of every fresh rollout in {record(past + 1)}, got one "
                "without; with top_k, top_p or min_p a completion is scored over the ids that its "
                "tokens were drawn from: the run's own record is needed as it was written"
            )
    return [
        [replace(r, source="replayed") for r in fresh[past][i * size : (i + 1) * size]]
        for past, i in chosen
    ]
