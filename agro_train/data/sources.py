"""What `data=` names: tasks, files, folders and hub datasets, one or several, and their rows."""

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agro_train.data.rows import SUFFIXES, check_file, near, numbered_rows, suffix
from agro_train.data.tasks import TASKS, Row, Split
from agro_train.refusal import Refusal

HUB_TIMEOUT_S = 5.0  # for the one question whether the hub has the dataset
# id:config@split; the split may be a slice, as train[:100].
HUB_NAME = re.compile(r"(?P<id>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[^@:]+))?(@(?P<split>[^@]+))?")
# The splits that stand for training and for held-out rows, the first that there is.
SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "eval": ("test", "validation", "train"),
}
KNOWN = f"a task ({', '.join(TASKS)}), a file, a folder or a hub dataset"


def read_sources(sources: str, split: Split, key: str = "data") -> list[tuple[str, list[Row]]]:
    """The rows of each source, in their order, with its name.

    Args:
        sources: tasks, files (with wildcards), folders and hub datasets, separated by commas.
        key: the setting that names them, for messages.
    """
    return [(source, _read(source, split, key)) for source in split_sources(sources, key)]


def check_sources(sources: str, key: str = "data") -> None:
    """Raises Refusal for a file or folder that is not there. Reads nothing and asks no hub."""
    for source in split_sources(sources, key):
        if source not in TASKS:
            _local(source, key)


def split_sources(sources: str, key: str) -> list[str]:
    """The single names in a setting: parts between commas, and what wildcards stand for."""
    # A file's name may have commas and brackets, too. Not Path.exists, which raises for long names.
    if os.path.exists(os.path.expanduser(sources)):
        return [sources]
    found: list[str] = []
    for part in filter(None, (part.strip() for part in sources.split(","))):
        if "*" in part:
            matching = sorted(glob.glob(str(Path(part).expanduser()), recursive=True))
            if not matching:
                raise Refusal(f"{key}: expected files, got {part!r}, which matches none")
            found += matching
        else:
            found.append(part)
    if not found:
        raise Refusal(f"{key}: expected {KNOWN}, got {sources!r}")
    return found


def _read(source: str, split: Split, key: str) -> list[Row]:
    if source in TASKS:
        return TASKS[source](split)
    found = _local(source, key)
    if found is None:
        return _hub_rows(source, split, key)
    path, wanted = found
    if path.is_dir():
        return _folder_rows(path, split, wanted, key)
    return [row for _, row in numbered_rows(path, key)]


def _local(source: str, key: str) -> tuple[Path, str | None] | None:
    """The file or folder, and the split that is named behind it; None for a hub dataset's name.

    Raises Refusal for what can only be a file or folder and is not there.
    """
    whole, at, split = source.rpartition("@")
    named = bool(at) and not Path(source).expanduser().exists()
    name, wanted = (whole, split) if named else (source, None)
    path = Path(name).expanduser()
    if path.is_dir():
        return path, wanted
    if path.exists() and suffix(path) in SUFFIXES:
        if wanted is not None:
            raise Refusal(f"{key}: expected no split behind a file, got {source!r}")
        check_file(path, key)
        return path, None
    if path.exists():
        raise Refusal(f"{key}: expected a file of {', '.join(SUFFIXES)} (or .gz), got {source!r}")
    if suffix(path) in SUFFIXES or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise Refusal(
            f"{key}: expected a file or folder, got {source!r}; there is none of that name"
            f"{near(path)}"
        )
    if HUB_NAME.fullmatch(source) is None:
        raise Refusal(
            f"{key}: expected {KNOWN}, got {source!r}; the full name of a hub dataset is "
            "OWNER/NAME:CONFIG@SPLIT"
        )
    return None


def _folder_rows(path: Path, split: Split, wanted: str | None, key: str) -> list[Row]:
    """A folder of `save_to_disk`, or one of data files."""
    from datasets import DatasetDict, load_dataset, load_from_disk  # slow to import
    from datasets.exceptions import DatasetsError

    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        dataset = load_from_disk(str(path)) if saved else load_dataset(str(path))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise Refusal(
            f"{key}: expected a folder of save_to_disk or of data files, got {str(path)!r}: "
            f"{_first_line(error)}"
        ) from error
    if isinstance(dataset, DatasetDict):
        name = next((one for one in _splits(split, wanted) if one in dataset), None)
        if name is None:
            raise Refusal(
                f"{key}: expected a split {' or '.join(_splits(split, wanted))} in {str(path)!r}, "
                f"got {', '.join(dataset)}; name one: {path}@SPLIT"
            )
        dataset = dataset[name]
    elif wanted is not None:
        raise Refusal(
            f"{key}: expected no split, as there is one dataset in {str(path)!r}, got {wanted!r}"
        )
    return [dict(row) for row in dataset]


def _splits(split: Split, wanted: str | None) -> tuple[str, ...]:
    return SPLITS[split] if wanted is None else (wanted,)


def _hub_rows(source: str, split: Split, key: str) -> list[Row]:
    from datasets import load_dataset

    named = HUB_NAME.fullmatch(source)
    assert named is not None, "what is no hub dataset's name was refused before"
    default = "train" if split == "train" else "test"
    arguments = {
        "path": named["id"],
        "name": named["config"],
        "split": named["split"] or default,
    }
    reached = _hub_has(named["id"], source, key)
    try:
        if reached:
            dataset = load_dataset(**arguments)
        else:
            with _offline():  # what was downloaded before is still there
                dataset = load_dataset(**arguments)
    except (OSError, ValueError) as error:
        reason = (
            _first_line(error) if reached else "the hub cannot be reached, and none is kept here"
        )
        raise Refusal(
            f"{key}: expected {KNOWN}, got {source!r}, of which there is no file or folder, and "
            f"from the hub it cannot be loaded: {reason}; a dataset's full name is "
            "OWNER/NAME:CONFIG@SPLIT"
        ) from error
    return [dict(row) for row in dataset]


def _hub_has(name: str, source: str, key: str) -> bool:
    """False where the hub cannot be reached. Asked once, with a timeout: `load_dataset` repeats
    each of its requests for half a minute. Raises Refusal for a name that the hub does not have.
    """
    from huggingface_hub import HfApi, errors

    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_S)
    except errors.HFValidationError as error:
        raise Refusal(f"{key}: expected {KNOWN}, got {source!r}: {_first_line(error)}") from error
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code >= 500:
            return False
        raise Refusal(
            f"{key}: expected {KNOWN}, got {source!r}, which is neither here nor a dataset that "
            f"the hub lets you read: {_first_line(error)}"
        ) from error
    except (errors.HTTPError, OSError):  # type: ignore[attr-defined]  # the HTTP client's own
        return False
    return True


@contextmanager
def _offline() -> Iterator[None]:
    """`datasets` takes what it has kept and asks no hub; it has no argument for that."""
    from datasets import config

    before: Any = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
