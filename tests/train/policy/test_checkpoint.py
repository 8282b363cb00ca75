"""Checkpoints are whole or refused by name, and writing one never costs the one before it."""

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from agro_train import durable
from agro_train.policy import checkpoint, tiny
from agro_train.policy.checkpoint import Learner, TrainerState
from agro_train.policy.policy import Policy
from agro_train.run_folder import RunFolder
from tests.train.files import largest_file, names

TOKENIZER = tiny.build_tokenizer()


class Training:
    """A policy with an optimiser that has taken a step, and a folder for its checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy: nn.Module = Policy(tiny.build_model(len(TOKENIZER), 0))
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        for parameter in self.policy.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def save(self, step: int, keep: int = 2, main: bool = True) -> Path:
        checkpoint.save(
            self.folder,
            TrainerState(step=step, base_model="base"),
            Learner(self.policy, TOKENIZER, self.optimizer, self.scheduler),
            keep=keep,
            main=main,
        )
        return self.folder / f"checkpoint-{step}"


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path)


def test_state_lists_every_file(training: Training) -> None:
    path = training.save(3)
    state = checkpoint.read_state(path)
    assert state.step == 3 and state.base_model == "base"
    assert state.files.keys() == names(path) - {checkpoint.STATE}
    assert {"model.safetensors", "optimizer.pt", "tokenizer.json", "config.json"} <= names(path)
    assert all(state.files[name][0] == (path / name).stat().st_size for name in state.files)


def test_other_ranks_write_nothing(training: Training) -> None:
    training.save(3, main=False)
    assert not names(training.folder)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = [
    (cut_short, "model.safetensors", r"model\.safetensors has \d+ bytes of \d+"),
    (one_bit, "model.safetensors", r"model\.safetensors has other bytes than were written"),
    (cut_short, "optimizer.pt", r"optimizer\.pt has \d+ bytes of \d+"),
    (emptied, "tokenizer.json", r"tokenizer\.json has 0 bytes of \d+"),
    (Path.unlink, "config.json", r"config\.json is missing"),
    (cut_short, checkpoint.STATE, r"trainer_state\.json cannot be read"),
    (Path.unlink, checkpoint.STATE, r"trainer_state\.json cannot be read"),
]


@pytest.mark.parametrize(
    ("spoil", "name", "reason"),
    DAMAGE,
    ids=[f"{spoil.__name__}-{name}" for spoil, name, _ in DAMAGE],
)
def test_damaged_one_is_refused_by_name_and_the_one_before_it_used(
    spoil: Callable[[Path], object], name: str, reason: str, training: Training
) -> None:
    older, newer = training.save(2), training.save(4)
    assert checkpoint.newest(training.folder, lambda text: pytest.fail(text)) == newer
    spoil(newer / name)
    said: list[str] = []
    assert checkpoint.newest(training.folder, said.append) == older
    (warning,) = said
    assert re.search(f"checkpoint-4, where {reason}.* checkpoint-2 is used", warning), warning
    # The run comes to step 4 again, and the damaged one is not in its way.
    checkpoint.set_aside(training.folder, 2)
    assert list(RunFolder(training.folder).checkpoints().values()) == [older]
    training.save(4, keep=1)
    assert list(RunFolder(training.folder).checkpoints().values()) == [newer]
    assert checkpoint.damage(newer) is None
    assert "damaged-checkpoint-4" in names(training.folder)


def test_without_a_whole_one_there_is_one_error_that_names_them_all(training: Training) -> None:
    for step in (2, 4):
        cut_short(training.save(step) / "optimizer.pt")
    with pytest.raises(
        ValueError, match=r"got only damaged ones: checkpoint-4, .*; checkpoint-2, "
    ):
        checkpoint.newest(training.folder, lambda text: pytest.fail(text))


def test_run_that_never_had_one_is_told_from_one_that_has_lost_them(training: Training) -> None:
    assert checkpoint.newest(training.folder, lambda text: pytest.fail(text)) is None
    shutil.rmtree(training.save(2))
    with pytest.raises(ValueError, match="there is none left in it"):
        checkpoint.newest(training.folder, lambda text: pytest.fail(text))


def test_state_of_another_checkpoint_is_refused(training: Training) -> None:
    copied = training.folder / "checkpoint-9"
    shutil.copytree(training.save(2), copied)
    assert checkpoint.damage(copied) == "trainer_state.json is not this checkpoint's"


def test_oldest_go_only_when_the_new_one_is_there(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, seen = os.replace, []

    def watch(source: Path, target: Path) -> None:
        seen.append((Path(source).name, Path(target).name))
        replace(source, target)

    training.save(9)
    training.save(10)
    (training.folder / "checkpoint-notes").mkdir()  # the user's own
    monkeypatch.setattr(os, "replace", watch)
    training.save(11)
    assert names(training.folder) == {
        *("checkpoint-10", "checkpoint-11", "checkpoint-notes", "latest_checkpoint")
    }
    assert seen == [
        (".partial-checkpoint-11", "checkpoint-11"),
        (".partial-latest_checkpoint", "latest_checkpoint"),
        ("checkpoint-9", ".partial-checkpoint-9"),
    ]
    assert (training.folder / "latest_checkpoint").read_text() == "checkpoint-11\n"


def test_everything_is_on_the_disk_before_it_has_its_name(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut keeps what was synced and may keep or lose everything else."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watch_replace(source: Path, target: Path) -> None:
        events.append(("rename", str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    final = training.save(3)
    named = events.index(("rename", str(final)))
    partial = training.folder / ".partial-checkpoint-3"
    wanted = {("sync", str(partial)), *(("sync", str(partial / name)) for name in names(final))}
    assert wanted <= set(events[:named])
    assert events[named + 1] == ("sync", str(training.folder))


def test_what_a_killed_save_left_is_cleared_by_the_next(training: Training) -> None:
    stale = training.folder / ".partial-checkpoint-7"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"x")
    assert RunFolder(training.folder).checkpoints() == {}
    training.save(3)
    assert names(training.folder) == {"checkpoint-3", "latest_checkpoint"}


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors", "optimizer.pt"])
def test_full_disk_leaves_the_checkpoint_before(file: str, training: Training) -> None:
    """The error says so whichever library met it, and nothing of the new one takes up room."""
    older = training.save(2)
    size = (older / file).stat().st_size
    with pytest.raises(Exception) as caught, largest_file(size - 1):  # noqa: PT011
        training.save(4)
    assert durable.no_room(caught.value) == os.strerror(errno.EFBIG)
    assert names(training.folder) == {"checkpoint-2", "latest_checkpoint"}
    assert checkpoint.newest(training.folder, lambda text: pytest.fail(text)) == older
    assert checkpoint.damage(training.save(4)) is None


def test_loaded_moments_are_the_saved_ones_and_no_pages_of_the_file(training: Training) -> None:
    training.scheduler = get_scheduler("constant", training.optimizer)
    path = training.save(2)
    saved = {
        parameter: {name: value.clone() for name, value in moments.items()}
        for parameter, moments in training.optimizer.state.items()
    }
    training.optimizer.state.clear()  # as in a process that has taken no step
    training.optimizer.zero_grad()
    checkpoint.load_optimizer(path, training.policy, training.optimizer, training.scheduler)
    assert training.optimizer.state.keys() == saved.keys()
    for parameter, moments in training.optimizer.state.items():
        assert moments.keys() == saved[parameter].keys()
        assert all(torch.equal(moments[name], saved[parameter][name]) for name in moments)
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_longer_schedule_takes_over_at_once(training: Training) -> None:
    def schedule(steps: int) -> Any:
        training.optimizer.param_groups[0].update(lr=0.1, initial_lr=0.1)
        return get_scheduler("linear", training.optimizer, 0, steps)

    training.scheduler = schedule(2)
    for _ in range(2):
        training.scheduler.step()
    path = training.save(2)
    assert training.optimizer.param_groups[0]["lr"] == 0.0
    for steps, rate in ((2, 0.0), (8, 0.1 * 6 / 8)):
        scheduler = schedule(steps)
        checkpoint.load_optimizer(path, training.policy, training.optimizer, scheduler)
        assert training.optimizer.param_groups[0]["lr"] == rate
        assert scheduler.last_epoch == 2
