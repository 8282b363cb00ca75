"""Files are complete or not there, and what a full disk says is recognised."""

import errno
import os
from pathlib import Path

import pytest

from agro_train import durable
from tests.train.files import largest_file, names


def test_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with durable.writing(path) as file:
        file.write("half \ud83d")
        assert names(tmp_path) == {".partial-log"}
    assert path.read_bytes() == b"half \xed\xa0\xbd" and names(tmp_path) == {"log"}


@pytest.mark.parametrize("shared", [False, True])
def test_file_stays_as_it_was_where_writing_fails(shared: bool, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), durable.writing(path, shared=shared) as file:
        file.write("new")
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="File too large"), largest_file(10):
        durable.replace(path, "too long a text", shared=shared)
    assert path.read_text() == "old" and names(tmp_path) == {"log"}


def test_processes_that_share_a_file_write_under_names_of_their_own(tmp_path: Path) -> None:
    with durable.writing(tmp_path / "log", shared=True):
        assert names(tmp_path) == {f".partial-{os.getpid()}-log"}


def test_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with pytest.raises(ValueError, match="no"), durable.writing_folder(folder) as partial:
        (partial / "a").write_text("a")
        raise ValueError("no")
    assert not names(tmp_path)
    with durable.writing_folder(folder) as partial:
        (partial / "a").write_text("a")
        assert names(tmp_path) == {".partial-made"}
    assert names(tmp_path) == {"made"} and names(folder) == {"a"}
    durable.delete_folder(folder)
    assert not names(tmp_path)


def test_other_errors_are_no_full_disk() -> None:
    for error in (ValueError("no"), OSError(errno.EACCES, "no"), RuntimeError("(os error 13)")):
        assert durable.no_room(error) is None
    for error in (OSError(errno.ENOSPC, ""), RuntimeError("I/O error (os error 28)")):
        assert durable.no_room(error) == os.strerror(errno.ENOSPC)


def test_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for folder in (tmp_path / "a", tmp_path / "b" / "c"):
        durable.check_writable(folder)
    assert names(tmp_path) == {"a"} and not names(tmp_path / "a")


@pytest.mark.parametrize("below", ["", "b", "b/c"])
def test_file_is_no_folder_to_write_in(below: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(NotADirectoryError) as error:
        durable.check_writable(tmp_path / "a" / below)
    assert error.value.strerror == "Not a directory"
    assert names(tmp_path) == {"a"}
