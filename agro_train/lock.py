"""One writer a folder: a lock that the kernel holds for a process, and drops when the process ends,
however it ends. After a `kill -9` nothing has to be cleared away.
"""

import errno
import fcntl
import os
import socket
import sys
import weakref
from datetime import UTC, datetime
from pathlib import Path

from agro_train import durable
from agro_train.refusal import Refusal, writing_to

# What a file system says that has no such locks, as some network ones have none.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class FolderLock:
    """The lock of a run's folder. Its file says who holds it, and goes when it is released.

    Not filelock's: that empties the file of a lock that another process holds, so that nobody can
    be named.
    """

    def __init__(self, path: Path) -> None:
        self.path = path  # of the lock's file; its parent is the folder
        self._made: list[Path] = []  # folders that were made for it, the innermost first
        self._close: weakref.finalize[[int], FolderLock] | None = None

    def take(self) -> None:
        """Makes the folder, if need be, and takes the lock.

        Raises:
            Refusal: another process holds it, or the folder cannot be written. Nothing is left.
        """
        folder = self.path.parent
        try:
            with writing_to(folder, "output_dir"):
                self._made = durable.missing(folder)
                folder.mkdir(parents=True, exist_ok=True)
                while not self._taken():
                    pass
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Drops the lock, its file, and the folders that were made for it and are still empty. Does
        nothing where it is not held."""
        if self._close is not None:
            self.path.unlink(missing_ok=True)  # while it is held: afterwards it may be another's
            self._close()
            self._close = None
        made, self._made = self._made, []
        durable.remove_empty(made)

    def _taken(self) -> bool:
        """Whether the lock is held now; if not, the file has gone in the meantime, with the process
        that held it."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        close = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            close()
            raise Refusal(
                f"output_dir: expected a folder that no other run writes to, got "
                f"{str(self.path.parent)!r}, which belongs to {holder or 'another process'}; wait "
                "for its end, or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                close()
                raise
            print(
                f"{self.path.parent}: this file system has no locks ({error.strerror}): see to it "
                "that no second run writes here",
                file=sys.stderr,
            )
        if not self._is_the_file(descriptor):
            close()
            return False
        os.ftruncate(descriptor, 0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        os.write(descriptor, f"process {os.getpid()} of {socket.gethostname()}, {since}\n".encode())
        self._close = close
        return True

    def _is_the_file(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False
