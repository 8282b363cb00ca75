"""Arithmetic tasks made on the spot, split once and for all into train and held-out.

A task is a function split -> list of rows with the columns `prompt` and `answer`, the form a JSONL
file would have. No operands appear in both splits, in either order.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

Split = Literal["train", "eval"]
Row = dict[str, Any]


def tiny_arithmetic(split: Split) -> list[Row]:
    """Two-digit sums whose ones carry, for the embedded tiny model: '37+58=' with answer 95.

    `solution` works the sum out; `slip` does too, but forgets the carry. The tiny model's warm
    start mixes them, a share `slip_rate` of slips, so that the reward has something to decide.
    """
    return [
        {
            "prompt": f"{a}+{b}=",
            "answer": str(a + b),
            "solution": worked_sum(a, b, carry=1),
            "slip": worked_sum(a, b, carry=0),
            "slip_rate": 0.6,
        }
        for a, b in _carrying_sums(split)
    ]


def graded_sums(split: Split, tens: Sequence[int] = range(1, 10)) -> list[Row]:
    """The same sums in a few tokens, '15,95' for '37+58=', and of all difficulties: the teacher's
    slip rate goes up with the first number's tens, from 1/18 at 1 to 17/18 at 9. `tens` keeps some.
    """
    return [
        {
            "prompt": f"{a}+{b}=",
            "answer": str(a + b),
            "solution": f"{a % 10 + b % 10},{a + b}",
            "slip": f"{a % 10 + b % 10},{a + b - 10}",
            "slip_rate": (a // 10 - 0.5) / 9,
        }
        for a, b in _carrying_sums(split)
        if a // 10 in tens
    ]


LONG_LINES = 6  # sums in a row: with the prompt at most 128 tokens, the tiny model's context


def long_sums(split: Split) -> list[Row]:
    """Sums in a row, each worked out, in 100 tokens and more: the answer is the last one.

    The first sum is the prompt's; each further one adds the prompt's second number to the last two
    digits of the result before. The teacher slips once, in one of the sums whose ones carry, as
    often as in `graded_sums`, and goes on from the wrong result.
    """
    rows = []
    for a, b in _carrying_sums(split):
        right = _long_answer(a, b, slip=None)
        carries = [line for line in range(LONG_LINES) if right.ones_carry[line]]
        slip = carries[_digest(f"{a}+{b} slips") % len(carries)]
        rows.append(
            {
                "prompt": f"{a}+{b}=",
                "answer": str(right.result),
                "solution": right.text,
                "slip": _long_answer(a, b, slip).text,
                "slip_rate": (a // 10 - 0.5) / 9,
            }
        )
    return rows


class _LongAnswer(NamedTuple):
    text: str
    result: int
    ones_carry: list[bool]  # line by line


def _long_answer(a: int, b: int, slip: int | None) -> _LongAnswer:
    lines, ones_carry = [], []
    for line in range(LONG_LINES):
        carry = (a % 10 + b % 10) // 10
        ones_carry.append(carry == 1)
        lines.append(worked_sum(a, b, carry=0 if line == slip else carry))
        result = int(lines[-1].rpartition(",")[2])
        a = result % 100
    return _LongAnswer(",".join(lines), result, ones_carry)


def _carrying_sums(split: Split) -> list[tuple[int, int]]:
    pairs = _pairs(10, 99, split, held_out_percent=10)
    return [(a, b) for a, b in pairs if a % 10 + b % 10 >= 10]


def worked_sum(a: int, b: int, carry: int) -> str:
    """A step-by-step answer: ones, tens with the carry, result.

    >>> worked_sum(37, 58, carry=1)
    '7+8=15,3+5+1=9,95'
    >>> worked_sum(37, 58, carry=0)
    '7+8=15,3+5+0=8,85'
    """
    ones = a % 10 + b % 10
    tens = a // 10 + b // 10 + carry
    return f"{a % 10}+{b % 10}={ones},{a // 10}+{b // 10}+{carry}={tens},{tens}{ones % 10}"


def arithmetic(split: Split) -> list[Row]:
    """One-digit products and, one prompt in four, two-digit sums, in words, for a chat model."""
    products = [
        _question(a, b, "times", a * b) for a, b in _pairs(2, 9, split, held_out_percent=20)
    ]
    sums = [_question(a, b, "plus", a + b) for a, b in _pairs(10, 49, split, held_out_percent=20)]
    sums.sort(key=lambda row: _digest(row["prompt"]))
    return products + sums[: len(products) // 3]


def _question(a: int, b: int, operation: str, answer: int) -> Row:
    question = f"What is {a} {operation} {b}? Answer with just the number."
    return {"prompt": question, "answer": str(answer)}


def _pairs(
    low: int, high: int, split: Split, *, held_out_percent: int
) -> Iterator[tuple[int, int]]:
    """All (a, b) of one split; (a, b) and (b, a) are always in the same one."""
    for a in range(low, high + 1):
        for b in range(low, high + 1):
            held_out = _digest(f"{min(a, b)},{max(a, b)}") % 100 < held_out_percent
            if held_out == (split == "eval"):
                yield a, b


def _digest(text: str) -> int:
    """A fixed pseudo-random number for a text, the same on every machine and in every version."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


TASKS: dict[str, Callable[[Split], list[Row]]] = {
    "tiny-arithmetic": tiny_arithmetic,
    "graded-sums": graded_sums,
    "graded-sums-easy": partial(graded_sums, tens=range(1, 5)),
    "graded-sums-hard": partial(graded_sums, tens=range(6, 10)),
    "long-sums": long_sums,
    "arithmetic": arithmetic,
}
