"""Checkpoints: a folder transformers can load, with the optimiser and the step beside the weights.

All randomness of a run is a function of its seed and the step, so there is no other state. A
checkpoint is written under another name and renamed when it is complete.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_optimizer_state_dict,
)

from agro_train.model import unwrap

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # not shards, and on the CPU
STATE = "trainer_state.json"


@dataclass(frozen=True)
class TrainerState:
    step: int  # optimiser steps taken
    base_model: str  # fingerprint of the weights the run started from


def save(
    folder: Path,
    state: TrainerState,
    policy: nn.Module,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    *,
    keep: int,
    main: bool,
) -> None:
    """Writes folder/checkpoint-N and deletes the oldest beyond `keep`.

    Every rank must call it: sharded tensors are gathered to the main one, which alone writes.
    """
    weights, moments = get_state_dict(policy, optimizer, options=WHOLE)
    if not main:
        return
    final = folder / f"checkpoint-{state.step}"
    partial = folder / f".partial-checkpoint-{state.step}"
    shutil.rmtree(partial, ignore_errors=True)
    model = unwrap(policy).model
    model.save_pretrained(
        partial, state_dict={name.removeprefix("model."): w for name, w in weights.items()}
    )
    tokenizer.save_pretrained(partial)
    torch.save(
        {"optimizer": moments, "scheduler": scheduler.state_dict()}, partial / "optimizer.pt"
    )
    (partial / STATE).write_text(json.dumps(vars(state), indent=2) + "\n")
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def latest(folder: Path) -> Path:
    """The newest checkpoint of a run."""
    found = checkpoints(folder)
    if not found:
        raise ValueError(
            f"--resume: expected a run with a checkpoint, got {str(folder)!r}; "
            "there is none in it (save_every sets how often one is written)"
        )
    return found[-1]


def read_state(path: Path) -> TrainerState:
    return TrainerState(**json.loads((path / STATE).read_text()))


def load_optimizer(
    path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any
) -> None:
    """Puts a checkpoint's optimiser and schedule back, onto however many ranks there are now."""
    saved = torch.load(path / "optimizer.pt", weights_only=True)
    set_optimizer_state_dict(policy, optimizer, saved["optimizer"], options=WHOLE)
    scheduler.load_state_dict(saved["scheduler"])
