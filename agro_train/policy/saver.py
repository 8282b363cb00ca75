"""Writing a run's checkpoints: whole ones by the main rank, or shards by all, beside the steps.

A sharded checkpoint is a folder like any other, in which two folders of safetensors files stand for
one file each: `weights`, and `moments` of the optimiser. Every rank writes its own rows of every
tensor, and the files say which, so that any number of ranks can read them.
"""

import copy
import threading
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.fsdp import FSDPModule

from agro_kernels import ModelHead
from agro_train import durable
from agro_train.policy import adapter, checkpoint, shards
from agro_train.policy.checkpoint import Learner, TrainerState
from agro_train.policy.policy import unwrap
from agro_train.ranks import Ranks
from agro_train.refusal import Refusal
from agro_train.run_folder import RunFolder

LONGEST_WRITE = timedelta(hours=3)  # that a rank waits for the others' disks
LAST_WAIT_S = 60.0  # for a save in progress, by a run that breaks


def in_shards(policy: nn.Module) -> bool:
    """Whether the policy is saved in shards: if a model of its kind can also be read from them. An
    adapter is small: one file, whoever trains it."""
    if not isinstance(policy, FSDPModule):
        return False
    model = unwrap(policy).model
    return ModelHead.is_told_by(model.config) and not adapter.has_adapter(model)


class Saver:
    """Writes checkpoints, one after the other. Every rank must call each method.

    Shards are copied to the host's memory and written by a thread of each rank, so that the run
    can go on: `complete` says when they are a checkpoint.
    """

    def __init__(self, folder: Path, ranks: Ranks, *, keep: int) -> None:
        """keep: how many checkpoints are kept; the oldest go once a new one is complete."""
        self.run, self.ranks, self.keep = RunFolder(folder), ranks, keep
        self._begun: int | None = None  # steps of the checkpoint that `complete` has not told of
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._group: Any = None  # what the threads talk in: the steps have a group of their own

    @property
    def busy(self) -> bool:
        """Whether a thread may still be writing; the same on every rank."""
        return self._thread is not None

    def save(self, state: TrainerState, learner: Learner, *, ahead: str = "") -> None:
        """Begins a checkpoint; a whole one is complete then. `ahead`: as in `checkpoint.save`."""
        assert self._begun is None, "`complete` comes before the next one"
        self._begun = state.step
        policy, tokenizer, optimizer, scheduler = learner
        if not in_shards(policy):
            checkpoint.save(
                self.run.path, state, learner, ahead=ahead, keep=self.keep, main=self.ranks.main
            )
            return
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass the root's weights are whole
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=LONGEST_WRITE)
        model = unwrap(policy).model
        moments, rest = checkpoint.moments_of(policy, optimizer)
        parts = {
            folder: BlockingAsyncStager().stage(tensors)  # copies, also of what is on the CPU
            for folder, tensors in (
                (shards.FOLDER, shards.saved_tensors(model)),
                (checkpoint.MOMENTS, moments),
            )
        }
        final = self.run.checkpoint(state.step)
        with ExitStack() as stack:
            partial = durable.partial_of(final)
            if self.ranks.main:
                checkpoint.drop_unfinished(self.run.path)
                stack.enter_context(durable.writing_folder(final))
                # What save_pretrained notes, too.
                model.config.architectures = [type(model).__name__]
                model.config.dtype = str(model.dtype).removeprefix("torch.")
                model.config.save_pretrained(partial)
                model.generation_config.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
                rest["scheduler"] = copy.deepcopy(scheduler.state_dict())
                with (partial / checkpoint.OPTIMIZER).open("wb") as file:
                    torch.save(rest, file)
                if ahead:
                    (partial / checkpoint.AHEAD).write_text(ahead)
            arguments = (stack.pop_all(), partial, state, parts)
        self._thread = threading.Thread(target=self._write, args=arguments, daemon=True)
        self._thread.start()

    def complete(self) -> int | None:
        """Waits until the checkpoint that was begun has its name. Returns the steps of one that was
        begun since the last call; raises what kept it from being written."""
        self._join(None)
        begun, self._begun = self._begun, None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return begun

    def close(self) -> None:
        """Lets a save in progress come to its end, for a while: for a run that breaks, whose other
        ranks may be gone. Raises nothing."""
        self._join(LAST_WAIT_S)

    def _join(self, timeout_s: float | None) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)
            self._thread = None

    def _write(
        self,
        closing: ExitStack,
        partial: Path,
        state: TrainerState,
        parts: dict[str, dict[str, Tensor]],
    ) -> None:
        """In a thread of its own. `closing` gives the main rank's folder its name."""
        try:
            with closing:
                dist.barrier(self._group)  # the main rank has made the folder
                for folder, tensors in parts.items():
                    shards.write(partial / folder, tensors, self._group)
                mine = [
                    path
                    for folder in parts
                    for path in shards.written_by(partial / folder, self.ranks.rank)
                ]
                files: list[Any] = [None] * self.ranks.world
                dist.all_gather_object(files, checkpoint.described(partial, mine), self._group)
                if self.ranks.main:
                    self._write_state(partial, state, files)
            if self.ranks.main:
                checkpoint.keep_newest(self.run, self.run.checkpoint(state.step), self.keep)
            dist.barrier(self._group)  # on every rank it is complete when it is on the main one
        except BaseException as error:  # `complete` raises it
            self._error = error

    def _write_state(
        self, partial: Path, state: TrainerState, shards_of: list[dict[str, tuple[int, int]]]
    ) -> None:
        everything = {name: known for files in shards_of for name, known in files.items()}
        for name in everything:
            if not (partial / name).is_file():
                raise Refusal(
                    "output_dir: expected a folder that every process sees, got "
                    f"{str(self.run.path)!r}, where {name} of another one is missing; with "
                    "fsdp=true give one on a file system that all machines share"
                )
        small = [path for path in sorted(partial.iterdir()) if path.is_file()]
        checkpoint.write_state(partial, state, checkpoint.described(partial, small) | everything)
