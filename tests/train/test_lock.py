"""One run a folder: the second is told at once, and a killed one leaves no lock behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agro_train.cli import main
from agro_train.lock import FolderLock
from agro_train.refusal import Refusal
from tests.train.files import names

ROOT = Path(__file__).parents[2]


def test_lock_makes_the_folder_and_leaves_nothing(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "runs" / "a" / ".lock")
    lock.take()
    assert names(tmp_path / "runs" / "a") == {".lock"}
    lock.release()
    lock.release()  # once more is nothing
    assert names(tmp_path) == set()
    lock.take()
    (tmp_path / "runs" / "a" / "config.yaml").write_text("")
    lock.release()
    assert names(tmp_path / "runs" / "a") == {"config.yaml"}


def test_second_one_is_told_who_holds_it(tmp_path: Path) -> None:
    first, second = (FolderLock(tmp_path / ".lock") for _ in range(2))
    first.take()
    expected = f"no other run writes to, got '{tmp_path}', which belongs to process {os.getpid()} "
    for _ in range(2):  # to be refused leaves the lock as it was
        with pytest.raises(Refusal, match=f"^output_dir: expected a folder that {expected}"):
            second.take()
    first.release()
    second.take()
    second.release()


def test_lock_that_nobody_releases_ends_with_its_object(tmp_path: Path) -> None:
    forgotten = FolderLock(tmp_path / ".lock")
    forgotten.take()
    del forgotten
    lock = FolderLock(tmp_path / ".lock")
    lock.take()
    lock.release()


def test_lock_whose_file_has_gone_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process before deletes the file between our opening and our locking it."""
    lock = FolderLock(tmp_path / ".lock")
    found = FolderLock._is_the_file
    looked = []

    def deleted_at_first(self: FolderLock, descriptor: int) -> bool:
        if not looked:
            self.path.unlink()
        looked.append(found(self, descriptor))
        return looked[-1]

    monkeypatch.setattr(FolderLock, "_is_the_file", deleted_at_first)
    lock.take()
    assert looked == [False, True]
    with pytest.raises(Refusal):
        FolderLock(tmp_path / ".lock").take()
    lock.release()


def test_killed_process_leaves_nothing_stale(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from agro_train.lock import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1])); lock.take(); print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / ".lock")], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    lock = FolderLock(tmp_path / ".lock")
    with pytest.raises(Refusal, match=f"which belongs to process {holder.pid} of "):
        lock.take()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    lock.take()
    lock.release()


@pytest.mark.parametrize("resume", [False, True])
def test_run_in_the_folder_of_another_is_refused_and_leaves_it_alone(
    resume: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    before = names(tmp_path)
    lock = FolderLock(tmp_path / ".lock")
    lock.take()
    how = ["--resume", str(tmp_path)] if resume else [f"output_dir={tmp_path}"]
    assert main(["train", *how]) == 2
    said = capsys.readouterr().err
    assert said.startswith("agro: output_dir: expected a folder that no other run writes to, got ")
    assert said.count("\n") == 1
    lock.release()
    assert names(tmp_path) == before


def test_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("agro_train.setup.load_tokenizer", lambda _: pytest.fail("too late"))
    monkeypatch.setattr("agro_train.setup.load_rewards", lambda _: pytest.fail("too late"))
    (tmp_path / "file").write_text("")
    assert main(["train", f"output_dir={tmp_path / 'file' / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"agro: output_dir: expected a folder that can be written, got '{tmp_path}/file/run': "
        "Not a directory; choose another\n"
    )
    assert names(tmp_path) == {"file"}
