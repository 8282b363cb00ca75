"""A run: everything the loop needs, loaded and checked before the output folder is touched."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from agro_train.config import TrainConfig
from agro_train.data.mix import Mix
from agro_train.data.recorded import Recorded
from agro_train.engines.engine import Engine
from agro_train.rewards.functions import Rewards
from agro_train.run_folder import RunFolder
from agro_train.types import Prompt, Rollout


@dataclass(frozen=True)
class Run:
    """What `setup` puts together. On every rank; only the main one writes to the folder."""

    config: TrainConfig
    folder: RunFolder
    accelerator: Accelerator
    policy: torch.nn.Module
    reference: torch.nn.Module
    tokenizer: Any
    engine: Engine
    optimizer: torch.optim.Optimizer
    scheduler: Any
    prompts: list[Prompt]
    held_out: list[Prompt]
    recorded: Recorded
    mix: list[Mix]  # of every step
    rewards: Rewards
    demonstrations: Mapping[str, Rollout]  # worked answers by group; empty: none are learned from
    base_model: str  # fingerprint of the reference's weights
    start: int  # steps already taken
    evaluated: bool  # whether the record has the evaluation after them
    summary: str

    @property
    def main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """A row of metrics.jsonl, and the same numbers to the trackers, which take finite ones."""
        if self.main:
            self.folder.log(step, metrics)
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            self.accelerator.log(finite, step=step)

    @property
    def share(self) -> slice:
        """Which items of a list this rank works on."""
        return slice(self.accelerator.process_index, None, self.accelerator.num_processes)
