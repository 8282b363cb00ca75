"""The results folder, and dataclasses as lines of a CSV file in it.

A row is a dataclass with fields of str, bool and int, and float or None.
"""

import csv
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")

RESULTS = Path(__file__).parents[1] / "results"


def read_csv(path: Path) -> list[dict[str, str]]:
    """All lines, a mapping from column to text each."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column_names(row: Any) -> list[str]:
    """The columns of a row or of its class, in the order of the file."""
    return [field.name for field in fields(row)]


def texts(row: Any) -> list[str]:
    """The cells of a row: five digits of a float, nothing for None."""
    return [_text(getattr(row, name)) for name in column_names(row)]


def parsed(kind: type[R], columns: dict[str, str]) -> R:
    """A row from its line; columns that the class has no field for are ignored."""
    parse: dict[object, Callable[[str], Any]] = {
        str: str,
        bool: "True".__eq__,
        int: int,
        float | None: _number,
    }
    types = kind.__annotations__
    return kind(**{name: parse[types[name]](columns[name]) for name in column_names(kind)})


def error_text(error: Exception) -> str:
    """An exception as a status says it: its type and the first line of its message."""
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first}"


def _number(text: str) -> float | None:
    return float(text) if text else None


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
