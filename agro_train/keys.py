"""What a setting is: its type, default, limits and meaning, in one place, a field of a dataclass.

`key` makes such a field. The conversion of what a YAML file or a command line has, the checks, the
help of `agro train` and docs/configuration.md are all made from it.
"""

import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from agro_train.refusal import Refusal

KINDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[str]: "a list of texts",
    list[float]: "a list of numbers",
    dict[str, Any]: "names and values, {name: value}",
}
TRUE, FALSE = ("yes", "y", "on", "true"), ("no", "n", "off", "false")


@dataclass(frozen=True)
class Key:
    """Everything that is known of a setting."""

    name: str
    kind: Any  # one of KINDS, or a Literal of texts
    default: Any
    meaning: str
    heading: str = ""  # of the group that begins with this setting
    least: float | None = None
    above: float | None = None  # as `least`, without the number itself
    most: float | None = None
    below: float | None = None
    infinite: bool = False  # whether inf is a value
    rule: tuple[str, Callable[[Any], bool]] | None = None  # any other limit: in words, as a test
    hint: str = ""  # for the end of the sentence that refuses a value
    verbatim: bool = False  # of a list: a text alone is one member, commas and all
    resumable: bool = False  # whether it may change when a run is resumed
    several: bool = False  # a text that may hold several, with commas; a list is taken for that
    older: Any = None  # what a run does that began before there was the setting; None: the default

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def limits(self) -> str:
        """In words, what a value of the type must be; empty where each will do."""
        if self.rule:
            return self.rule[0]
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.least is not None and self.most is not None:
            return f"{self.least} to {self.most}"
        if self.least is not None and self.below is not None:
            return f"a number from {self.least} to below {self.below}"
        parts = (
            ("at least", self.least),
            ("a number above", self.above),
            ("at most", self.most),
            ("below", self.below),
        )
        return ", ".join(f"{words} {limit}" for words, limit in parts if limit is not None)

    @property
    def values(self) -> str:
        """In words, what a value is: of which type, and within which limits."""
        kind = KINDS.get(self.kind, "")
        if self.kind in (int, float) and not self.limits.startswith(kind):
            return f"{kind}, {self.limits}" if self.limits else kind
        return self.limits or kind

    def read(self, given: Any) -> Any:
        """What YAML has, in the setting's type. Raises Refusal where that is another."""
        if self.verbatim and isinstance(given, str):
            given = [given]
        if self.several and isinstance(given, list) and given:
            given = ",".join(map(str, given))
        try:
            return _converted(given, self.kind)
        except (ValueError, TypeError, OverflowError):
            wanted = KINDS.get(self.kind, self.limits)
            got = "nothing" if given is None else repr(given)
            raise Refusal(
                f"{self.name}: expected {wanted}, got {got}{self._advice(given)}"
            ) from None

    def _advice(self, given: Any) -> str:
        """What to write instead of a value that YAML takes for something else."""
        if self.kind is str and given is None:
            return "; write \"''\" for empty text, with both kinds of quotes in a shell"
        if self.kind is str and isinstance(given, list | dict):
            return "; quote it for YAML, and the quotes for the shell"
        return "; write [] for none" if get_origin(self.kind) is list and given is None else ""

    def check(self, value: Any) -> None:
        """Raises Refusal, in one sentence, for a value beyond the limits."""
        beyond = isinstance(value, float) and not math.isfinite(value)
        if beyond and not (self.infinite and value == math.inf):
            raise Refusal(f"{self.name}: expected a finite number, got {value}")
        if not self._allows(value):
            hint = f"; {self.hint}" if self.hint else ""
            raise Refusal(f"{self.name}: expected {self.limits}, got {value!r}{hint}")

    def _allows(self, value: Any) -> bool:
        return (
            (not self.choices or value in self.choices)
            and (self.rule is None or bool(self.rule[1](value)))
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    @property
    def setting(self) -> str:
        """`key=default`, as a command line takes it."""
        return f"{self.name}={_as_yaml(self.default)}"


def key(default: Any, meaning: str, **more: Any) -> Any:
    """The field of a setting; `more` are further attributes of its Key."""
    known = {"meaning": meaning, **more}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=known)
    return field(default=default, metadata=known)


def keys_of(settings: type) -> dict[str, Key]:
    """The settings of a dataclass, by name and in its order."""
    found = {}
    for item in fields(settings):
        made = item.default_factory
        default = item.default if made is MISSING else made()
        found[item.name] = Key(item.name, item.type, default, **item.metadata)
    return found


def unknown(name: str, known: Iterable[str]) -> Refusal:
    """The sentence for a setting that there is not, which names those that are spelt like it."""
    return Refusal(
        f"{name}: expected one of the known keys, got an unknown one; {nearest(name, known)}agro "
        "train --help lists them all"
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """For a sentence about a mistyped name: those that are spelt like it, the nearest first; empty
    where none is."""
    near = get_close_matches(name, list(known), n=3)
    return f"nearest: {', '.join(near)}; " if near else ""


def as_text(keys: Iterable[Key], width: int = 100) -> str:
    """The settings by group, for a terminal: each with its default, its meaning and its limits."""
    lines: list[str] = []
    for one in keys:
        if one.heading:
            lines += ["", f"{one.heading}:"]
        about = "; ".join(filter(None, [one.meaning, one.limits]))
        lines.append(f"  {one.setting}")
        lines.append(textwrap.indent(textwrap.fill(about, width - 6), " " * 6))
    return "\n".join(lines[1:]) + "\n"


def as_markdown(keys: Iterable[Key]) -> str:
    """The same as a table a group; * is behind the names of settings that --resume may change."""
    lines: list[str] = []
    for one in keys:
        if one.heading:
            lines += ["", f"## {one.heading}", "", "| key | default | values | meaning |"]
            lines.append("|---|---|---|---|")
        star = " *" if one.resumable else ""
        default = f"`{_as_yaml(one.default)}`"
        lines.append(f"| `{one.name}`{star} | {default} | {one.values} | {one.meaning} |")
    return "\n".join(lines[1:]) + "\n"


def _as_yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_as_yaml(one)}' for name, one in value.items())}}}"
    return "''" if value == "" else str(value)


def _converted(given: Any, kind: Any) -> Any:
    """Raises ValueError, TypeError or OverflowError where `given` is not of the kind."""
    if get_origin(kind) is list:
        (of,) = get_args(kind)
        if isinstance(given, str):  # a,b: without brackets YAML has no list
            given = [part.strip() for part in given.split(",") if part.strip()]
        elif given is not None and not isinstance(given, list | dict):
            given = [given]
        if not isinstance(given, list):
            raise TypeError
        return [_converted(part, of) for part in given]
    if get_origin(kind) is dict:
        if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
            raise TypeError
        return given
    if given is None or isinstance(given, list | dict | bytes):
        raise TypeError
    if given is False and "no" in get_args(kind):
        return "no"  # YAML's word for false
    if kind is bool:
        word = str(given).lower()
        return word in TRUE if word in TRUE + FALSE else int(word) != 0
    if kind in (int, float):
        if isinstance(given, bool) or (kind is int and isinstance(given, float)):
            raise TypeError
        return kind(given)
    return str(given)
