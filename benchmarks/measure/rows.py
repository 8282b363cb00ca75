"""Dataclasses as lines of a CSV file: fields of str, bool and int, and float or None."""

from dataclasses import fields
from typing import Any, TypeVar

R = TypeVar("R")


def column_names(row: Any) -> list[str]:
    """Of a row or of its class, in the order of the file."""
    return [field.name for field in fields(row)]


def texts(row: Any) -> list[str]:
    """What a line of the file holds in those columns: five digits of a number, nothing for None."""
    return [_text(getattr(row, name)) for name in column_names(row)]


def parsed(kind: type[R], columns: dict[str, str]) -> R:
    """A row from its line; other columns are left alone."""
    parse = {str: str, bool: "True".__eq__, int: int, float | None: _number}
    types = kind.__annotations__
    return kind(**{name: parse[types[name]](columns[name]) for name in column_names(kind)})


def _number(text: str) -> float | None:
    return float(text) if text else None


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)
