"""Files that are whole whatever happens: after a kill, a power cut or on a full disk there is the
old one or the new one.

A file or folder has another name, with PARTIAL before its own, until it is complete and on the
disk.
"""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

PARTIAL = ".partial-"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path, *, shared: bool = False, errors: str = "surrogatepass") -> Iterator[TextIO]:
    """A UTF-8 text file that takes the place of `path` when the block ends, and is dropped where
    the block raises.

    Args:
        shared: other processes may write the same file at the same time; the last one's stays.
        errors: what becomes of half of a character pair, which UTF-8 cannot hold; as in `open`.
    """
    writer = f"{os.getpid()}-" if shared else ""
    partial = path.with_name(f"{PARTIAL}{writer}{path.name}")
    try:
        with partial.open("w", encoding="utf-8", errors=errors) as file:
            yield file
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)  # on a full disk the room is needed
        raise
    sync(path.parent)


def partial_of(path: Path) -> Path:
    """The name of a folder until it is complete."""
    return path.with_name(f"{PARTIAL}{path.name}")


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the name `path`, which is free, when the block ends, and is
    deleted where the block raises.
    """
    partial = partial_of(path)
    try:
        partial.mkdir()
        yield partial
        sync_tree(partial)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk the room is needed
        raise
    sync(path.parent)


def replace(path: Path, text: str, *, shared: bool = False) -> None:
    """Puts a file with this text in the place of what is there, or leaves everything as it was.

    `shared`: as in `writing`.
    """
    with writing(path, shared=shared) as file:
        file.write(text)


def append(path: Path, line: str) -> None:
    """Adds a line to a file, or leaves it as it was."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            data = f"{line}\n".encode()
            while data:  # a disk that is nearly full takes a part before it refuses the rest
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(end)
            raise


def check_writable(folder: Path) -> None:
    """Raises OSError if no file can be written in a folder, which need not exist. Nothing is left
    of the attempt."""
    made = missing(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    finally:
        remove_empty(made)


def missing(folder: Path) -> list[Path]:
    """The folder and those that it is in, as far as they are not there, the innermost first. Raises
    NotADirectoryError where one of them is a file."""
    places = (folder, *folder.parents)
    found = [place for place in places if not place.exists()]
    if not places[len(found)].is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return found


def remove_empty(folders: Sequence[Path]) -> None:
    """Removes folders that are there and empty, one after the other, up to the first that is not
    empty."""
    for folder in folders:
        if folder.is_dir():
            if any(folder.iterdir()):
                return
            folder.rmdir()


def delete_folder(path: Path) -> None:
    """Deletes a folder. Killed in between, what is left no longer has the whole one's name."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    os.replace(path, partial)
    shutil.rmtree(partial)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or which files there are in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """The same for a folder and everything in it."""
    for path in sorted(folder.rglob("*")):
        sync(path)
    sync(folder)


def no_room(error: BaseException) -> str | None:
    """The system's words for a disk that takes no more, if that is the root of an error.

    Libraries wrap it: torch raises a RuntimeError while it handles the system's; safetensors, which
    is written in Rust, has its number in the text only.
    """
    cause: BaseException | None = error
    while cause is not None:
        in_text = re.search(r"\(os error (\d+)\)", str(cause))
        number = cause.errno if isinstance(cause, OSError) else None
        if number is None and in_text:
            number = int(in_text[1])
        if number in NO_ROOM:
            return os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    return None
