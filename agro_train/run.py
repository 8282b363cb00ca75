"""A run: everything the loop needs, loaded and checked before the output folder is touched."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from agro_train.callbacks import Callbacks
from agro_train.config import TrainConfig
from agro_train.data.mix import Mix
from agro_train.data.recorded import Recorded
from agro_train.engines.engine import Engine
from agro_train.fresh import FreshGroups
from agro_train.interrupt import Interrupted, Interrupts
from agro_train.lock import FolderLock
from agro_train.questions import Questions
from agro_train.ranks import Ranks
from agro_train.rewards.functions import Rewards
from agro_train.run_folder import RunFolder
from agro_train.types import Rollout


@dataclass(frozen=True)
class Start:
    """Where a run begins: at step 0, or after its newest checkpoint."""

    step: int = 0  # steps already taken
    checkpoint: Path | None = None
    base_model: str | None = None  # fingerprint of the weights that the checkpoint's run began with
    evaluated: bool = False  # whether the record has the evaluation after those steps


@dataclass(frozen=True)
class Models:
    """The policy and its frozen reference, on their devices, and how they are spelled."""

    policy: torch.nn.Module
    reference: torch.nn.Module
    tokenizer: Any
    end_tokens: set[int]
    base_model: str  # fingerprint of the reference's weights
    reference_id: str  # identity of the reference; empty where no cache is read by it
    num_weights: int  # of the policy, an adapter's included


@dataclass(frozen=True)
class Run:
    """What `setup` puts together. On every rank; only the main one writes to the folder."""

    config: TrainConfig
    folder: RunFolder
    accelerator: Accelerator
    start: Start
    models: Models
    questions: Questions
    recorded: Recorded
    mix: list[Mix]  # of every step
    rewards: Rewards
    demonstrations: Mapping[tuple[str, str], Rollout]  # by group and text; empty: none are used
    engine: Engine
    fresh: FreshGroups
    optimizer: torch.optim.Optimizer
    scheduler: Any
    summary: str
    callbacks: Callbacks
    lock: FolderLock  # of the folder; only the main rank holds it
    interrupts: Interrupts = field(default_factory=Interrupts)

    @property
    def ranks(self) -> Ranks:
        return Ranks.of(self.accelerator)

    @property
    def main(self) -> bool:
        return self.ranks.main

    def check_interrupts(self) -> None:
        """Raises Interrupted on all ranks if a signal has reached one of them. Every rank must call
        it."""
        number = max(self.ranks.gather([self.interrupts.received or 0]))
        if number:
            raise Interrupted(number)

    @contextmanager
    def droppable(self) -> Iterator[None]:
        """What this block does is dropped when a signal comes, which raises Interrupted. On several
        ranks it is finished, and then looked for one: they wait for each other."""
        if self.ranks.world == 1:
            with self.interrupts.raised():
                yield
        else:
            yield

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row of metrics.jsonl, and the same numbers to the trackers, which take finite ones."""
        if self.main:
            self.folder.log(step, metrics)
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            self.accelerator.log(finite, step=step)
