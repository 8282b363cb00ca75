"""An answer as people and models write it, in the LaTeX that math-verify reads by value.

math-verify is the judge of what is equal. Here stands only what it misreads: Unicode, numbers in
other spellings, words, and bases. What it cannot read is compared as text, and is no number.
"""
# ruff: noqa: RUF001  (the characters that look like others are what this is about)

import re
import unicodedata
from dataclasses import dataclass

from agro_train.rewards.final_answer import closing, final_answer, is_prose

UNICODE = {
    "−": "-",
    "－": "-",
    "–": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "÷": r"\div ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "∅": r"\emptyset ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "±": r"\pm ",
    "²": "^{2}",
    "³": "^{3}",
    "½": r"\frac{1}{2}",
    "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}",
    "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}",
    "\u00a0": " ",
    "\u2009": " ",
    "\u202f": " ",
}
TRANSLATED = str.maketrans(UNICODE)
DEGREES = re.compile(r"[°º]\s?[CF]?(?![A-Za-z])")
DELIMITERS = re.compile(r"(?<!\\)\$|(?<!\\)\\[()\[\]](?!\d*(?:pt|em|ex|mm|cm)\])|\\displaystyle")
TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal|sf)?|mbox|mathrm|mathbf|operatorname)\s*\{")
# Between groups of three digits, other than the comma, which math-verify knows.
_THIN = r"(?<!\\)\\[,;:! ]"  # and not the end of a matrix's row, two backslashes and a space
SPACE = rf"(?:{_THIN}|~| |'|\{{,\}}|,?\s*\\!\s*,?\s*)"
GROUPED = re.compile(rf"(?<![\d.])\d{{1,3}}(?:{SPACE}\d{{3}})+(?!\d)")
SCIENTIFIC = re.compile(
    r"(?<![\w.^/])(\d+(?:\.\d+)?)"
    r"(?:[eE]([-+]?\d{1,3})(?![\w.])|\s*\\(?:times|cdot)\s*10\s*\^\s*(?:(\d)(?!\d)|\{([-+]?\d{1,3})\}))"
)
CURRENCY = re.compile(r"\\\$|[€£¥₹]|\b(?:USD|EUR|US)(?![A-Za-z])")
FUNCTION = re.compile(r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln|infty)(?![a-zA-Z])")
ROOT = re.compile(r"\\sqrt\s*\(")
SPACES = re.compile(rf"{_THIN}|\\q?quad\b|~")
BASE = re.compile(
    r"(-?[0-9][0-9A-Za-z]*(?:\.[0-9A-Za-z]+)?)\s*_\s*\{?(?:\\text\s*\{)?\s*(?:base\s*\}?\s*)?(\w+?)\s*\}*"
)
NUMERALS = "zero one two three four five six seven eight nine ten eleven twelve".split()
SIDE_BY_SIDE = re.compile(r"(?<![\w^_{])\d[\d.]*\s+\d")  # two numbers: math-verify adds them
# Letters that are no product of variables.
WORDS = re.compile(r"(?:[^\W\d_]{2,}[ -])+[^\W\d_]{2,}|[^\W\d_]{4,}|yes|no|odd|all", re.I)
LEADING_RELATION = re.compile(r"(?:=|\\(?:approx|equiv)\b)\s*")  # the end of "... = 42"
LEADING_TEXT = re.compile(r"(?:is|are|be|:|=|equals)\s*\Z", re.I)


@dataclass(frozen=True)
class Answer:
    """One answer, ready for the judge."""

    latex: str
    base: int | None = None  # of the number system that the answer names

    def in_base(self, base: int) -> "Answer":
        """The same digits as a number of that base."""
        digits = self.latex.lstrip("-")
        if not re.fullmatch(r"[0-9A-Za-z]+", digits) or digits.isdigit():
            return Answer(self.latex, base)
        return Answer(_readable_digits(self.latex), base)


def read(text: str, *, together: bool = True) -> Answer | None:
    """The final answer of a text. None: there is none.

    Args:
        together: whether boxes that "and", "or" or a comma connects are one answer.
    """
    found = final_answer(without_unicode(text), together=together)
    return None if found is None else normalised(found)


def without_unicode(text: str) -> str:
    """The text with LaTeX in place of mathematical signs and full-width letters."""
    text = "".join(_usual(character) for character in unicodedata.normalize("NFC", text))
    text = re.sub(r"√\s*(\d+|\w)", r"\\sqrt{\1}", text).replace("√", r"\sqrt")
    return DEGREES.sub("", text).translate(TRANSLATED)


def normalised(answer: str) -> Answer | None:
    """An answer, without what surrounds it, in LaTeX that math-verify reads by value. None: it
    cannot be one."""
    text = _without_relation(_trimmed(DELIMITERS.sub("", answer)))
    text = _without_text(text)
    based = BASE.fullmatch(text)
    if based and (base := _base(based[2])) is not None:
        return Answer(_readable_digits(based[1]), base)
    text = GROUPED.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = SPACES.sub(" ", text)
    text = CURRENCY.sub("", text).strip()
    text = SCIENTIFIC.sub(_expanded, text)
    text = text.replace("**", "^").replace("*", r" \cdot ")
    text = text.replace(r"\varnothing", r"\emptyset")
    text = FUNCTION.sub(r"\\\1 ", text)
    text = _rooted(text)
    text = _trimmed(text)
    if WORDS.fullmatch(text) and not is_prose(text):
        text = rf"\text{{{text}}}"
    elif is_prose(text):
        inner = final_answer(text)
        if inner is not None and inner != text:
            return normalised(inner)
    if not text or SIDE_BY_SIDE.search(text):
        return None
    return Answer(text)


def _without_relation(text: str) -> str:
    """The right side of "= 42"."""
    relation = LEADING_RELATION.match(text)
    return text if relation is None else text[relation.end() :]


def _usual(character: str) -> str:
    """Full-width letters, digits and signs in their usual form; any other character as it is."""
    wide = unicodedata.east_asian_width(character) == "F"
    return unicodedata.normalize("NFKC", character) if wide else character


def _trimmed(text: str) -> str:
    """Without what surrounds an answer: spaces, Markdown's asterisks, a full stop."""
    before = None
    while text != before:
        before = text
        text = text.strip().strip("*`").strip()
        text = re.sub(r"(?<!\\)[.,;:。]+\Z", "", text)
        text = re.sub(rf"(?:{_THIN}|\\q?quad|\\)\Z", "", text)
    return text


def _without_text(text: str) -> str:
    """\\text{13} as 13, and "\\text{The answer is } 7" as 7."""
    while found := TEXT.search(text):
        end = closing(text, found.end() - 1)
        if end is None:
            return text
        content, rest = text[found.end() : end].strip(), text[end + 1 :].strip()
        alone = not text[: found.start()].strip()
        if alone and rest and LEADING_TEXT.search(content):
            text = rest
        elif alone and not rest and re.fullmatch(r"[-+]?[\d.,]*\d", content):
            return content
        elif alone and not rest and is_prose(content) and re.search(r"\b(?:is|are)\b|:", content):
            return final_answer(content) or text
        else:
            return text
    return text


def _base(text: str) -> int | None:
    name = text.lower()
    base = NUMERALS.index(name) if name in NUMERALS else int(text) if text.isdigit() else 0
    return base if 2 <= base <= 36 else None


def _readable_digits(digits: str) -> str:
    """Digits of another base that are letters, as one number: 152A and 15A2 differ as products
    of letters do not."""
    whole = digits.lstrip("-")
    if whole.isdigit() or "." in whole or len(whole) > 200:
        return digits
    return digits[: len(digits) - len(whole)] + str(int(whole, 36))


def _expanded(match: re.Match[str]) -> str:
    """1.2e-4 and 1.2 \\cdot 10^{-4} written out, exactly; where that takes more than 30 zeros, as
    a power of ten."""
    whole, _, fraction = match[1].partition(".")
    exponent = int(match[2] or match[3] or match[4])
    if abs(exponent) > 30:
        return rf"{match[1]} \cdot 10^{{{exponent}}}"
    digits, point = whole + fraction, len(whole) + exponent
    if point <= 0:
        return "0." + "0" * -point + digits
    digits = digits.ljust(point, "0")
    return digits[:point] + ("." + digits[point:] if digits[point:] else "")


def _rooted(text: str) -> str:
    """\\sqrt(2), which is no LaTeX, as \\sqrt{2}."""
    while found := ROOT.search(text):
        end = closing(text, found.end() - 1)
        if end is None:
            break
        text = f"{text[: found.start()]}\\sqrt{{{text[found.end() : end]}}}{text[end + 1 :]}"
    return text
