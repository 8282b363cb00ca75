"""The ids that each token of a completion was drawn from, as one short text: encode and decode.

A nucleus has a few ids or a thousand, and a step has tens of thousands of tokens: lists of numbers
would make a log many times as large as the completions themselves.
"""

import base64
import binascii
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np


def encode(sets: Sequence[Any]) -> str:
    """The text for the ids kept for each token: lists or arrays, in any order, of one or more each.
    Raises ValueError for anything else.

    It is the base64 of the zlib of int32 numbers, little-endian: how many tokens; how many ids each
    has; and all ids, those of one token in rising order and each as its distance to the one before.
    """
    rising = [np.unique(ids).astype(np.int64) for ids in map(_whole_numbers, sets)]
    counts = [len(ids) for ids in rising]
    steps = [np.diff(ids, prepend=0) for ids in rising]
    numbers = np.concatenate([[len(counts)], counts, *steps]).astype("<i4")
    return base64.b64encode(zlib.compress(numbers.tobytes())).decode()


def _whole_numbers(ids: Any) -> Any:
    found = np.asarray(ids)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ValueError(f"expected one or more ids, got {str(ids)[:40]}")
    return found


def decode(text: str) -> list[Any]:
    """The ids of each token, int64 arrays in rising order. Raises ValueError for another text."""
    try:
        numbers = np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), "<i4")
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"not the base64 of zlib of int32 numbers ({error})") from error
    count = int(numbers[0]) if len(numbers) else -1
    counts, steps = numbers[1 : 1 + count], numbers[1 + count :]
    if len(counts) != count or (counts < 1).any() or counts.sum() != len(steps):
        raise ValueError("cut short")
    return [np.cumsum(part, dtype=np.int64) for part in np.split(steps, np.cumsum(counts)[:-1])]
