"""Checkpoints in shards: written beside the run, whole or not there, and read with any placement.

One rank (gloo) is enough for it; tests/train/test_resume.py has two and three.
"""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, get_scheduler

from agro_train import durable
from agro_train.config import TrainConfig
from agro_train.policy import checkpoint, export, shards, tiny
from agro_train.policy.checkpoint import Learner, TrainerState
from agro_train.policy.load import load_model
from agro_train.policy.policy import Policy, shard
from agro_train.policy.saver import Saver, in_shards
from agro_train.ranks import Ranks
from agro_train.run_folder import RunFolder
from tests.train.files import largest_file, names

TOKENIZER = tiny.build_tokenizer()


pytestmark = pytest.mark.usefixtures("group_of_one")


class Training:
    """A policy with an optimiser that has taken a step, and a saver."""

    def __init__(self, folder: Path, *, sharded: bool = True) -> None:
        self.folder = folder
        self.policy: Any = Policy(tiny.build_model(len(TOKENIZER), 0))
        if sharded:
            shard(self.policy, "no", init_device_mesh("cpu", (1,)))
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.1, fused=True)
        self.scheduler = get_scheduler("linear", self.optimizer, 0, 4)
        self.saver = Saver(folder, Ranks(), keep=2)

    def step(self) -> None:
        for number, parameter in enumerate(self.policy.parameters()):
            parameter.grad = torch.full_like(parameter, 1.0 + number)
        self.optimizer.step()
        self.scheduler.step()

    def save(self, step: int) -> Path:
        state = TrainerState(step=step, base_model="base")
        self.saver.save(state, self.learner(), ahead="ahead\n")
        return self.folder / f"checkpoint-{step}"

    def learner(self) -> Learner:
        return Learner(self.policy, TOKENIZER, self.optimizer, self.scheduler)

    def weights(self) -> dict[str, torch.Tensor]:
        tensors = shards.saved_tensors(self.policy.model)
        return {name: shards.local_rows(t)[0].clone() for name, t in tensors.items()}


@pytest.fixture
def training(tmp_path: Path) -> Training:
    training = Training(tmp_path)
    training.step()
    return training


def test_what_is_saved_is_what_there_was_when_it_began(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on while the disk writes, and there is no checkpoint before all is on it."""
    written, before = threading.Event(), training.weights()
    write = shards.write

    def late(*arguments: Any) -> None:
        assert written.wait(60)
        write(*arguments)

    monkeypatch.setattr(shards, "write", late)
    path = training.save(3)
    assert training.saver.busy and not RunFolder(training.folder).checkpoints()
    training.step()
    written.set()
    assert training.saver.complete() == 3
    assert training.saver.complete() is None and not training.saver.busy
    assert checkpoint.damage(path) is None
    assert (path / checkpoint.AHEAD).read_text() == "ahead\n"
    (file,) = (path / shards.FOLDER).iterdir()
    saved = load_file(file)
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in saved)
    after = training.weights()
    assert not any(torch.equal(saved[name], after[name]) for name in saved)


def test_disk_that_is_full_leaves_the_checkpoint_before(training: Training) -> None:
    older = training.save(2)
    training.saver.complete()
    training.save(4)
    training.saver.complete()
    size = next((older / checkpoint.MOMENTS).iterdir()).stat().st_size
    with largest_file(size - 1):
        training.save(6)
        with pytest.raises(RuntimeError) as caught:
            training.saver.complete()
    assert durable.no_room(caught.value) == os.strerror(errno.EFBIG)
    assert names(training.folder) == {"checkpoint-2", "checkpoint-4", "latest_checkpoint"}
    training.saver.save(TrainerState(step=6, base_model="base"), training.learner())
    assert training.saver.complete() == 6
    assert names(training.folder) == {"checkpoint-4", "checkpoint-6", "latest_checkpoint"}


@pytest.mark.parametrize("sharded", [True, False])
def test_another_process_has_the_same_weights_moments_and_rates(
    sharded: bool, training: Training, tmp_path: Path
) -> None:
    path = training.save(1)
    training.saver.complete()
    loaded = load_model(str(path), TrainConfig())
    expected = training.weights()
    found = dict(loaded.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    other = Training(tmp_path / "other", sharded=sharded)
    with torch.no_grad():
        for name, tensor in shards.saved_tensors(other.policy.model).items():
            shards.local_rows(tensor)[0].copy_(expected[name])
    checkpoint.load_optimizer(path, other.policy, other.optimizer, other.scheduler)
    for each in (training, other):
        each.step()
    ours, theirs = other.weights(), training.weights()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert other.scheduler.get_last_lr() == training.scheduler.get_last_lr()


def test_run_that_has_taken_no_step_has_no_moments(tmp_path: Path) -> None:
    """As one whose first steps were all skipped."""
    training = Training(tmp_path)
    path = training.save(1)
    assert training.saver.complete() == 1 and checkpoint.damage(path) is None
    checkpoint.load_optimizer(path, training.policy, training.optimizer, training.scheduler)
    assert not training.optimizer.state


def test_run_that_is_not_sharded_keeps_its_format(tmp_path: Path) -> None:
    training = Training(tmp_path, sharded=False)
    training.step()
    path = training.save(1)
    assert not training.saver.busy and not in_shards(training.policy)
    assert training.saver.complete() == 1
    assert {"model.safetensors", "optimizer.pt"} <= names(path)
    assert not (path / shards.FOLDER).exists()


@pytest.mark.parametrize("sharded", [True, False])
def test_exported_one_is_loaded_by_transformers(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path, sharded=sharded)
    training.step()
    path, out = training.save(1), tmp_path / "out"
    training.saver.complete()
    monkeypatch.setattr(export, "FILE_SIZE", "400KB")  # several files of a model of 1.2 MB
    durable.partial_of(out).mkdir()  # of an export that was killed
    export.export(path, out, TrainConfig())
    assert ("model.safetensors.index.json" in names(out)) == sharded
    assert not names(out) & {"optimizer.pt", checkpoint.STATE, checkpoint.AHEAD}
    assert "tokenizer.json" in names(out)
    found = dict(AutoModelForCausalLM.from_pretrained(out).named_parameters())
    expected = training.weights()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
