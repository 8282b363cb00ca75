"""Checkpoints: a folder transformers can load, with the optimiser and the step beside the weights.
Those of a sharded run have the weights and moments in shards, see `saver.py`.

All randomness of a run is a function of its seed and the step, so there is no other state. A
checkpoint is written under another name, with the size and the checksum of each of its files, and
renamed when it is complete and on the disk. One that is not as it was written is refused by name.
"""

import gc
import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_optimizer_state_dict,
)

from agro_train import durable
from agro_train.policy import adapter, shards
from agro_train.policy.policy import unwrap
from agro_train.refusal import Refusal
from agro_train.run_folder import RunFolder

# Not shards, on the CPU, and of a model with an adapter only the adapter.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
# To load: there cpu_offload would first copy the optimiser's empty state to the CPU.
ONTO_DEVICES = replace(WHOLE, cpu_offload=False)
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"
MOMENTS = "moments"  # folder of the optimiser's, where the weights are in shards, too
KINDS = ("exp_avg", "exp_avg_sq")  # of AdamW's moments
AHEAD = "ahead.jsonl"  # groups that earlier policies have sampled for steps to come


@dataclass(frozen=True)
class TrainerState:
    step: int  # optimiser steps taken
    base_model: str  # fingerprint of the weights the run started from
    # (bytes, crc32) of every other file of the checkpoint
    files: dict[str, tuple[int, int]] = field(default_factory=dict)


class Learner(NamedTuple):
    """What a checkpoint is of."""

    policy: nn.Module
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    scheduler: Any


def save(
    folder: Path,
    state: TrainerState,
    learner: Learner,
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
    policy, tokenizer, optimizer, scheduler = learner
    state_dict, moments = get_state_dict(policy, optimizer, options=WHOLE)
    if not main:
        return
    run = RunFolder(folder)
    final = run.checkpoint(state.step)
    drop_unfinished(folder)
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
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        write_state(partial, state, described(partial, files))
    keep_newest(run, final, keep)


def drop_unfinished(folder: Path) -> None:
    """Deletes what saves that were killed have left."""
    for stale in folder.glob(f"{durable.PARTIAL}checkpoint-*"):
        shutil.rmtree(stale)


def described(folder: Path, files: Sequence[Path]) -> dict[str, tuple[int, int]]:
    """The (bytes, crc32) of files in a folder, by their names in it."""
    return {str(path.relative_to(folder)): (path.stat().st_size, checksum(path)) for path in files}


def write_state(folder: Path, state: TrainerState, files: dict[str, tuple[int, int]]) -> None:
    (folder / STATE).write_text(json.dumps(vars(replace(state, files=files)), indent=2) + "\n")


def keep_newest(run: RunFolder, newest: Path, keep: int) -> None:
    """Names the newest checkpoint, and then deletes the oldest beyond `keep`."""
    durable.replace(run.latest_checkpoint, f"{newest.name}\n")
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
        state = read_state(path)
    except (ValueError, TypeError) as error:
        raise Refusal(
            f"model: expected a checkpoint as it was written, got {str(path)!r}, whose "
            f"{STATE} cannot be read ({error}); give another one"
        ) from error
    # Of the rest of a folder people may have kept the weights alone.
    lacking = missing(path, [name for name in state.files if Path(name).parts[0] == shards.FOLDER])
    if lacking is not None:
        raise Refusal(
            f"model: expected a checkpoint as it was written, got {str(path)!r}, where {lacking}; "
            "give another one, or put a copy of that file back"
        )
    return str(path), state.step


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if it is as it was written."""
    try:
        state = read_state(path)
    except (OSError, ValueError, TypeError) as error:
        return f"{STATE} cannot be read ({error})"
    if path != RunFolder(path.parent).checkpoint(state.step) or not state.files:
        return f"{STATE} is not this checkpoint's"
    if (lacking := missing(path, list(state.files))) is not None:  # quick, so first
        return lacking
    for name, (_, crc) in state.files.items():
        if checksum(path / name) != crc:
            return f"{name} has other bytes than were written"
    return None


def missing(path: Path, names: Sequence[str]) -> str | None:
    """Which of a checkpoint's files is not there as long as it was written, in words; None: all
    are."""
    files = read_state(path).files
    for name in names:
        file, (size, _) = path / name, files[name]
        if not file.is_file():
            return f"{name} is missing"
        if (got := file.stat().st_size) != size:
            return f"{name} has {got} bytes of {size}"
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
    if "steps" in saved:
        _load_moments(path / MOMENTS, policy, optimizer, saved)
    else:
        set_optimizer_state_dict(policy, optimizer, saved["optimizer"], options=ONTO_DEVICES)
        for moments in optimizer.state.values():
            for name, moment in moments.items():
                if moment.device.type == "cpu":  # still the file's pages, which will be deleted
                    moments[name] = moment.clone()
        gc.collect()  # torch's loading leaves a circle of objects that holds the file's pages
    scheduler.load_state_dict(saved["scheduler"])
    # The optimiser's rate is that of the schedule it was saved with; more steps may make another.
    for group, rate, factor in zip(
        optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = rate * factor(scheduler.last_epoch)


def moments_of(
    policy: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The moments in this rank's shards, by KIND/NAME, and what else `load_optimizer` wants of a
    sharded run's optimiser."""
    moments: dict[str, Tensor] = {}
    steps: dict[str, float] = {}
    for name, parameter in unwrap(policy).model.named_parameters():
        if (kept := optimizer.state.get(parameter)) is not None:
            steps[name] = float(kept["step"])
            moments |= {f"{kind}/{name}": kept[kind] for kind in KINDS}
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return moments, {"steps": steps, "groups": groups}


def _load_moments(
    folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]
) -> None:
    """Each rank reads what belongs to its own shards, or all where it has whole weights."""
    stored = shards.stored(folder)
    parameters = dict(unwrap(policy).model.named_parameters())
    for name, step in saved["steps"].items():
        parameter = parameters[name]
        state = {"step": torch.tensor(step, dtype=torch.float32, device=parameter.device)}
        for kind in KINDS:
            state[kind] = torch.zeros_like(parameter.detach())
            stored.read(f"{kind}/{name}", state[kind])
        optimizer.state[parameter] = state
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(values)
