"""Files that are whole whatever happens: after a kill, a power cut or on a full disk there is the
old one or the new one.
"""

import errno
import os
import re
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def replace(path: Path, text: str, *, shared: bool = False) -> None:
    """Puts a file with this text in the place of what is there, or leaves everything as it was.

    `shared`: other processes may write the same file at the same time; the last one's stays.
    """
    writer = f"{os.getpid()}-" if shared else ""
    partial = path.with_name(f".partial-{writer}{path.name}")
    try:
        partial.write_text(text, encoding="utf-8", errors="surrogatepass")
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)  # on a full disk the room is needed
        raise
    sync(path.parent)


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
