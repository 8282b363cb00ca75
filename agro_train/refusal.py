"""What the command line shows as one sentence: a mistake of the user's, or of the user's files.

Any other exception is a bug and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Refusal(ValueError):
    """Names the argument, what was expected, what came, and what to do next."""


@contextmanager
def writing_to(folder: Path, key: str, next_step: str = "choose another") -> Iterator[None]:
    """What this block cannot write to the folder, of the setting `key`, is a Refusal."""
    try:
        yield
    except OSError as error:
        raise Refusal(
            f"{key}: expected a folder that can be written, got {str(folder)!r}: "
            f"{error.strerror}; {next_step}"
        ) from error
