"""Checkpoints: a folder transformers can load, with the optimiser and the step beside the weights.

All randomness of a run is a function of its seed and the step, so there is no other state. A
checkpoint is written under another name, with the size and the checksum of each of its files, and
renamed when it is complete and on the disk. One that is not as it was written is refused by name.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_optimizer_state_dict,
)

from agro_train import durable
from agro_train.policy import adapter
from agro_train.policy.policy import unwrap
from agro_train.refusal import Refusal
from agro_train.run_folder import RunFolder

# Not shards, on the CPU, and of a model with an adapter only the adapter.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
# To load: there cpu_offload would first copy the optimiser's empty state to the CPU.
ONTO_DEVICES = replace(WHOLE, cpu_offload=False)
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"
AHEAD = "ahead.jsonl"  # groups that earlier policies have sampled for steps to come


@dataclass(frozen=True)
class TrainerState:
    step: int  # optimiser steps taken
    base_model: str  # fingerprint of the weights the run started from
    # (bytes, crc32) of every other file of the checkpoint
    files: dict[str, tuple[int, int]] = field(default_factory=dict)


def save(
    folder: Path,
    state: TrainerState,
    policy: nn.Module,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    *,
    ahead: str = "",
    keep: int,
    main: bool,
) -> None:
    """Writes folder/checkpoint-N and then deletes the oldest beyond `keep`.

    Every rank must call it: sharded tensors are gathered to the main one, which alone writes.

    Args:
        ahead: what the file AHEAD is to hold; empty: there is none.
    """
    state_dict, moments = get_state_dict(policy, optimizer, options=WHOLE)
    if not main:
        return
    run = RunFolder(folder)
    final = run.checkpoint(state.step)
    for stale in folder.glob(f"{durable.PARTIAL}checkpoint-*"):  # of a save that was killed
        shutil.rmtree(stale)
    model = unwrap(policy).model
    weights: dict[str, Any] = {
        name.removeprefix("model."): weight for name, weight in state_dict.items()
    }
    with durable.writing_folder(final) as partial:
        if adapter.has_adapter(model):
            adapter.save(model, partial, weights)
        else:
            model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        # A file of Python's: what the system says of a write that fails is then in the error.
        with (partial / OPTIMIZER).open("wb") as file:
            torch.save({"optimizer": moments, "scheduler": scheduler.state_dict()}, file)
        if ahead:
            (partial / AHEAD).write_text(ahead)
        files = {
            str(path.relative_to(partial)): (path.stat().st_size, checksum(path))
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        state = replace(state, files=files)
        (partial / STATE).write_text(json.dumps(vars(state), indent=2) + "\n")
    durable.replace(run.latest_checkpoint, f"{final.name}\n")
    for old in list(run.checkpoints().values())[:-keep]:
        durable.delete_folder(old)


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """A run's newest checkpoint that is as it was written; None before the run's first one.

    Newer ones that are damaged are named to `say`. Reads them whole, about 2 GB a second.
    """
    run = RunFolder(folder)
    refused: list[str] = []
    for path in reversed(run.checkpoints().values()):
        found = damage(path)
        if found is None:
            if refused:
                say(f"{folder}: refused as damaged: {'; '.join(refused)}. {path.name} is used.")
            return path
        refused.append(f"{path.name}, where {found}")
    if refused:
        raise Refusal(
            f"checkpoint: expected a whole checkpoint in {str(folder)!r}, got only damaged ones: "
            f"{'; '.join(refused)}"
        )
    if run.latest_checkpoint.exists():  # to start again would drop a record that had been saved
        raise Refusal(
            f"checkpoint: expected a run with one, got {str(folder)!r}; there is none left in it: "
            "put one back, or start another run"
        )
    return None


def find_model(name: str, say: Callable[[str], None]) -> tuple[str, int | None]:
    """What to load for the setting `model`, and the steps it has taken if that is a run, whose
    newest checkpoint is then meant, or a checkpoint."""
    path = Path(name)
    if RunFolder(path).is_run():
        found = newest(path, say)
        if found is None:
            raise Refusal(
                f"model: expected a run with a checkpoint, got {name!r}; there is none in it "
                "(save_every sets how often one is written)"
            )
        path = found
    if not (path / STATE).is_file():
        return name, None
    try:
        return str(path), read_state(path).step
    except (ValueError, TypeError) as error:
        raise Refusal(
            f"model: expected a checkpoint as it was written, got {str(path)!r}, whose "
            f"{STATE} cannot be read ({error}); give another one"
        ) from error


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is as it was written."""
    try:
        state = read_state(path)
    except (OSError, ValueError, TypeError) as error:
        return f"{STATE} cannot be read ({error})"
    if path != RunFolder(path.parent).checkpoint(state.step) or not state.files:
        return f"{STATE} is not this checkpoint's"
    for name, (size, _) in state.files.items():  # quick, so first
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if (got := file.stat().st_size) != size:
            return f"{name} has {got} bytes of {size}"
    for name, (_, crc) in state.files.items():
        if checksum(path / name) != crc:
            return f"{name} has other bytes than were written"
    return None


def checksum(path: Path) -> int:
    """The crc32 of a file: against accidents, not against malice."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return crc


def set_aside(folder: Path, step: int) -> None:
    """Renames checkpoints of later steps, which were refused, to damaged-checkpoint-N: the run
    comes to those steps again.
    """
    for taken, path in RunFolder(folder).checkpoints().items():
        if taken > step:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)


def read_state(path: Path) -> TrainerState:
    return TrainerState(**json.loads((path / STATE).read_text()))


def load_optimizer(
    path: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any
) -> None:
    """Puts a checkpoint's optimiser and schedule back, onto however many ranks there are now.

    The file is mapped: the ranks of a machine share its pages and none holds it whole.
    """
    saved = torch.load(path / OPTIMIZER, weights_only=True, mmap=True)
    set_optimizer_state_dict(policy, optimizer, saved["optimizer"], options=ONTO_DEVICES)
    for moments in optimizer.state.values():
        for name, moment in moments.items():
            if moment.device.type == "cpu":  # still the file's pages, and the file will be deleted
                moments[name] = moment.clone()
    scheduler.load_state_dict(saved["scheduler"])
    # The optimiser's rate is that of the schedule it was saved with; more steps may make another.
    for group, rate, factor in zip(
        optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = rate * factor(scheduler.last_epoch)
