"""Rows of JSONL and parquet files, each with its place in the file."""

import json
from pathlib import Path

from agro_train.data.tasks import Row
from agro_train.refusal import Refusal


def read_jsonl(path: Path) -> list[Row]:
    """One JSON object a line; blank lines are skipped. Errors name file and line."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: Path) -> list[tuple[int, Row]]:
    """The rows of a JSONL or parquet file, each with its line (its row) counted from 1."""
    if not path.is_file():
        raise Refusal(
            f"data: expected a JSONL or parquet file, got {str(path)!r}; there is no such file"
        )
    if path.suffix == ".parquet":
        return list(enumerate(_parquet_rows(path), start=1))
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise Refusal(
                    f"data: expected a JSON object in {path}, line {number}, got {line[:60]!r}"
                ) from error
            if not isinstance(row, dict):
                raise Refusal(
                    f"data: expected a JSON object in {path}, line {number}, got {line[:60]!r}"
                )
            rows.append((number, row))
    return rows


def _parquet_rows(path: Path) -> list[Row]:
    # pyarrow comes with datasets, and few runs need it.
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except ArrowException as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(f"data: expected a parquet file, got {str(path)!r}: {reason}") from error
    return rows
