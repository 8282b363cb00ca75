"""Where a page's numbers are, and others put in their place.

A table stands between two comments, which nobody sees on the page:

    <!-- table: trainer.ahead -->
    ...
    <!-- end -->

Of a number in a sentence the comment comes after it, on the same line or the next:

    takes 1.14 to 1.15<!-- n: gpu.time.range provider=cce form=forward --> of our time

A name is asked for with what follows it, KEY=VALUE or KEY=VALUE,VALUE. A source of numbers gives as
many as it has, and these replace as many before its comment, each with the digits and the sign that
the page gave it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Query = Mapping[str, Sequence[str]]
Table = Callable[[Query], Sequence[str]]
"""The lines of one."""
Numbers = Callable[[Query], Sequence[float]]

TABLE = re.compile(r"<!-- table: (.*?) -->\n.*?<!-- end -->", flags=re.S)
COMMENT = re.compile(r"<!--.*?-->", flags=re.S)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")


class Sources(NamedTuple):
    """What a page may ask for, by name."""

    tables: Mapping[str, Table]
    numbers: Mapping[str, Numbers]


def rewritten(text: str, sources: Sources) -> str:
    """The text with every table and number of its markers as the sources have them now.

    Raises ValueError where a marker asks for what there is not, or stands behind too few numbers.
    """
    tables = TABLE.sub(lambda found: _table(found[1], sources), text)
    parts: list[str] = []
    done = 0
    for comment in COMMENT.finditer(tables):
        before = tables[done : comment.start()]
        asked = re.fullmatch(r"<!-- n: (.*?) -->", comment[0])
        parts += [_numbers(before, asked[1], sources) if asked else before, comment[0]]
        done = comment.end()
    return "".join([*parts, tables[done:]])


def styled(old: str, value: float) -> str:
    """The value as the page wrote the old one: its decimals, its exponent, a comma, a plus.

    >>> styled("+0.5", 2.0), styled("3e-5", 4.2e-5), styled("5,220", 999.6)
    ('+2.0', '4e-5', '1,000')
    """
    mantissa, power, _ = old.partition("e")
    decimals = len(mantissa.partition(".")[2])
    sign = "+" if old[0] in "+-" else ""
    if power:
        found, _, exponent = f"{value:{sign}.{decimals}e}".partition("e")
        return f"{found}e{int(exponent)}"
    grouped = "" if re.search(r"\d{4}", mantissa) else ","
    text = f"{value:{sign}{grouped}.{decimals}f}"
    return text.replace("-", "+", 1) if float(text.replace(",", "")) == 0 and sign else text


def _table(asked: str, sources: Sources) -> str:
    name, query = _asked(asked, sources.tables)
    lines = sources.tables[name](query)
    return "\n".join([f"<!-- table: {asked} -->", "", *lines, "", "<!-- end -->"])


def _numbers(before: str, asked: str, sources: Sources) -> str:
    """The text up to a marker with its last numbers replaced."""
    name, query = _asked(asked, sources.numbers)
    values = sources.numbers[name](query)
    places = list(NUMBER.finditer(before))[-len(values) :] if values else []
    if not values or len(places) < len(values):
        raise ValueError(
            f"<!-- n: {asked} -->: expected as many numbers as it gives, {len(values)}, and one at "
            f"least, between it and the comment before, got {before[-60:]!r}; write them, rounded "
            "as they are to be"
        )
    for place, value in zip(reversed(places), reversed(values), strict=True):
        before = before[: place.start()] + styled(place[0], value) + before[place.end() :]
    return before


def _asked(asked: str, known: Mapping[str, object]) -> tuple[str, Query]:
    name, *words = asked.split()
    if name not in known:
        raise ValueError(f"<!-- {asked} -->: expected one of {', '.join(known)}, got {name}")
    pairs = (word.partition("=") for word in words)
    return name, {key: values.split(",") for key, _, values in pairs}
