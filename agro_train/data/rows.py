"""Rows of a file: JSON lines, a JSON list, CSV or parquet, each with its place in the file.

JSON and CSV are read here and not by the `datasets` library, which wants one type a column (answers
are numbers in one row and text in the next), guesses the types of CSV cells (an empty cell makes
42 into 42.0) and cannot say which line is broken.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, cast

from agro_train.data.tasks import Row
from agro_train.refusal import Refusal

JSON_LINES = (".jsonl", ".ndjson")
CSV_SEPARATORS = {".csv": ",", ".tsv": "\t"}
# What a file of rows may end in. All but parquet, which compresses by itself, also with .gz.
SUFFIXES = (*JSON_LINES, ".json", *CSV_SEPARATORS, ".parquet")
CELL_LIMIT = 2**27  # characters; the csv module's own limit is shorter than some solutions


def read_jsonl(path: Path) -> list[Row]:
    """One JSON object a line; blank lines are skipped. Errors name file and line."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: Path, key: str = "data") -> list[tuple[int, Row]]:
    """The rows of a file, each with its line (in a list, a table or CSV its row) counted from 1.

    A cell of CSV is text, and an empty one null.

    Args:
        key: the setting that names the file, for messages.
    """
    check_file(path, key)
    kind = suffix(path)
    if kind == ".parquet":
        return list(enumerate(_parquet_rows(path, key), start=1))
    try:
        if kind in CSV_SEPARATORS:
            return list(enumerate(_csv_rows(path, key, CSV_SEPARATORS[kind]), start=1))
        with _opened(path) as file:
            if kind == ".json" and file.read(64).lstrip().startswith(b"["):
                file.seek(0)
                return list(enumerate(_listed_rows(path, key, file.read()), start=1))
        with _opened(path) as file:
            return list(_line_rows(path, key, file))
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise Refusal(f"{key}: expected a gzip file, got {str(path)!r}: {error}") from error


def check_file(path: Path, key: str) -> None:
    """Raises Refusal where there is no such file, or it cannot be read as it is. Reads nothing."""
    if not path.is_file():
        raise Refusal(
            f"{key}: expected a file of rows, got {str(path)!r}; there is no such file{near(path)}"
        )
    if path.name.lower().endswith(".parquet.gz"):
        raise Refusal(f"{key}: expected a parquet file as it is, got {str(path)!r}; unpack it")


def near(path: Path) -> str:
    """What beside `path` is spelt like it, for the end of a sentence; empty where nothing is."""
    beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    found = get_close_matches(path.name, beside, n=2, cutoff=0.7)
    return f"; nearest: {', '.join(str(path.parent / name) for name in found)}" if found else ""


def suffix(path: Path) -> str:
    """What says how to read it: the name's ending, without the .gz behind it."""
    name = Path(path.name.lower().removesuffix(".gz"))
    return name.suffix


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Its bytes, unpacked where it ends in .gz."""
    with path.open("rb") as file:
        if path.name.lower().endswith(".gz"):
            with gzip.open(file) as unpacked:
                yield cast("IO[bytes]", unpacked)
        else:
            yield file


def _line_rows(path: Path, key: str, lines: IO[bytes]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise Refusal(
                f"{key}: expected a JSON object in {path}, line {number}, got {line[:60]!r}"
            ) from error
        if not isinstance(row, dict):
            raise Refusal(
                f"{key}: expected a JSON object in {path}, line {number}, got {line[:60]!r}"
            )
        yield number, row


def _listed_rows(path: Path, key: str, content: bytes) -> list[Row]:
    try:
        rows: list[Row] = json.loads(content)
    except ValueError as error:
        raise Refusal(f"{key}: expected a JSON list in {path}: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise Refusal(
                f"{key}: expected a JSON object in {path}, row {number}, got {str(row)[:60]!r}"
            )
    return rows


def _csv_rows(path: Path, key: str, separator: str) -> list[Row]:
    csv.field_size_limit(CELL_LIMIT)
    rows: list[Row] = []
    with _opened(path) as file:
        lines = (line.decode("utf-8-sig" if i == 0 else "utf-8") for i, line in enumerate(file))
        reader = csv.DictReader(lines, delimiter=separator, strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():  # more cells than columns, or fewer
                    raise Refusal(
                        f"{key}: expected {len(reader.fieldnames or ())} cells in {path}, row "
                        f"{len(rows) + 1} (line {reader.line_num}), got another number; quote "
                        "cells that hold the separator"
                    )
                rows.append({name: cell or None for name, cell in row.items()})
        except (csv.Error, UnicodeDecodeError) as error:
            raise Refusal(
                f"{key}: expected CSV in UTF-8 in {path}, line {reader.line_num + 1}, got what "
                f"cannot be read: {error}"
            ) from error
    return rows


def _parquet_rows(path: Path, key: str) -> list[Row]:
    # pyarrow comes with datasets, and few runs need it.
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except ArrowException as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(f"{key}: expected a parquet file, got {str(path)!r}: {reason}") from error
    return rows


def at(row: Mapping[str, Any], path: str) -> Any:
    """What `path` leads to: a column of that name, or else name by name, as in `a.b`. None where
    there is nothing."""
    if path in row:
        return row[path]
    found: Any = row
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def as_text(value: Any) -> str:
    """One spelling for what compares equal in a column: 42 and "42"."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
