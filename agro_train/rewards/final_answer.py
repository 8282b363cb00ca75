"""Where in a text its final answer is: after the thinking, in the last box, after "the answer is".

Text in, text out. What the answer means is for `latex.py` and math-verify. math-verify looks for
the answer, too, but among all boxes of a text, thinking and all, and it takes the part of an
expression that it can read for the whole.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

THINKING = re.compile(r"(?:<(/?)(?:think|thinking|thought|reasoning)>|\[(/?)THINK\])")
BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")
MARK = "####"  # GSM8K's

# Between boxes or formulas that are one answer: "$\boxed{3}$ or $x = \boxed{4}$".
_AND = r"(?:,|;|\\quad|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|[和或、])"
_BORDER = r"[\s$]*(?:\\[()])?[\s$]*"
JOIN = re.compile(rf"{_BORDER}{_AND}(?:{_AND}|\s)*{_BORDER}(?:[a-zA-Z]\s*=\s*)?")

ANSWER = re.compile(
    r"\banswers?\b[^.\n]{0,60}?(?:\bis\b|\bare\b|:|=)"
    r"|(?:答案|结果|答)[^。\n]{0,10}?[是为為:]"
    r"|\b(?:r[ée]ponse|respuesta|resposta|antwort|ответ)\b[^.\n]{0,40}?(?:\b(?:est|es|é|ist)\b|:|—)",
    re.I,
)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|。|\n\s*\n|\n(?=\S)")

_NAME = r"(?:sqrt|pi|sin|cos|tan|log|ln|infinity|[A-Za-z])"
_ALONE = rf"(?<![A-Za-z]){_NAME}(?![A-Za-z])"
_NUMBER = (
    r"(?:(?:\\?\$|[€£¥₹])\s?)?(?:\d+(?:(?:,?\\!,?|[.,:]|\\,|\{,\})\d+)*|\.\d+)(?:[eE][-+]?\d+(?!\w))?"
    r"(?:_\{?\d+\}?)?(?:\s?\\?%|\s?[€£¥₹])?"
)
_BRACED = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"
_BRACKETED = (
    rf"[(\[](?:[^()\[\]A-Za-z\n\\]|\\[a-zA-Z]+|{_ALONE}|\((?:[^()A-Za-z\n]|{_ALONE})*\))+[)\]]"
)
_ATOM = (
    rf"(?:\\begin\{{\w+\}}.*?\\end\{{\w+\}}|{_NUMBER}"
    r"|(?<=\d)\s?(?:sqrt|pi)(?![A-Za-z])|(?<=\d)[A-Za-z]{1,3}(?![A-Za-z])|\\[a-zA-Z]+"
    rf"|{_ALONE}|!|{_BRACED}|{_BRACKETED}|(?<=[_^])[-+]?\w)"
)
# With a space behind it only where it cannot be a minus or a list's dash.
_SIGN = r"(?:(?<![A-Za-z\d)\]}.])[-+]|(?:(?<=\bis )|(?<=[=:] ))[-+] )"
_OPERATOR = r"(?:\*\*|[-+*/^_=<>])"
FORMULA = re.compile(
    r"(?<!\\)\$\$(?P<display>.+?)(?<!\\)\$\$"
    r"|(?<!\\)\\\[(?P<brackets>.+?)\\\]"
    r"|(?<!\\)\\\((?P<parentheses>.+?)\\\)"
    r"|(?<![\\\d])\$(?P<dollars>(?:\\\$|[^$\n])+?)(?<!\\)\$"
    rf"|(?P<plain>{_SIGN}?{_ATOM}"
    rf"(?: ?(?:{_ATOM}|{_OPERATOR} ?[-+]? ?{_ATOM}))*"
    r"(?:(?: \* |[*^])(?=\w)\S+)?)",  # a product with what is not known here is no number either
    re.S,
)
MEANS_SOMETHING = re.compile(r"\d|\\(?:pi|infty|emptyset|varnothing)(?![a-zA-Z])|(?<!\w)pi(?!\w)")
COMMAND = re.compile(
    r"\\(?:text\w*|mbox|mathrm|operatorname)\s*\{[^{}]*\}|\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+"
)
EMPHASIS = re.compile(r"(?<![\w)}])\*\*(?=\S)(.+?)(?<=\S)\*\*(?![\w({\\])|`([^`\n]+)`")  # Markdown
# No part of a product, as in 3qr or abc + 1.
WORD = re.compile(
    r"(?<![\w\\{^*/=+-])(?<![-+*/=] )"
    r"(?:[^\W\d_]{3,}|am|an|as|at|be|by|do|he|if|in|is|it|me|my|no|of|on|so|to|us|we)"
    r"(?![\w}^*/=+-])(?! [-+*/=])"
    r"|[^\W\d_a-zA-Z]{2,}",  # scripts that leave no space beside a number
    re.I,
)
NO_WORD = re.compile(rf"(?:and|or|{_NAME})\Z", re.I)


def after_thinking(completion: str, prompt: str = "") -> str:
    """The completion without its thinking; empty where that has no end.

    Args:
        prompt: as the model read it; its chat template may have opened the thinking.
    """
    tags = list(THINKING.finditer(completion))
    if not tags:
        opened = [tag for tag in THINKING.finditer(prompt) if not prompt[tag.end() :].strip()]
        return completion if not opened or _closes(opened[-1]) else ""
    return completion[tags[-1].end() :] if _closes(tags[-1]) else ""


def _closes(tag: re.Match[str]) -> bool:
    return "/" in tag[0]


def final_answer(text: str, *, together: bool = True) -> str | None:
    """The text's final answer, as it is written there, without delimiters. None: there is none.

    The last box counts, and boxes that "and", "or" or a comma connects with it. An empty box, and
    one whose closing brace is missing, is no answer. Without a box it is what comes after GSM8K's
    mark; the whole text, if that is no sentence; what comes after the last "answer is"; or the
    last formula or number.

    Args:
        together: false: the last box alone.
    """
    boxes = find_boxes(text)
    if boxes:
        return _joined(text, boxes if together else boxes[-1:])
    text = EMPHASIS.sub(r"\1\2", text)
    _, mark, marked = text.rpartition(MARK)
    for whole in [marked, text] if mark else [text]:
        if whole.strip() and not is_prose(whole):
            return whole.strip()
    return _in_prose(text)


class Part(NamedTuple):
    """A piece of a text, and where it is."""

    start: int
    end: int
    content: str | None  # None: its end is missing


def find_boxes(text: str) -> list[Part]:
    """Every \\boxed{...}; without braces TeX puts the next token into the box."""
    boxes: list[Part] = []
    for found in BOX.finditer(text):
        if boxes and found.start() < boxes[-1].end:
            continue  # a box in a box
        at = found.end()
        if text[at : at + 1] == "{":
            end = closing(text, at)
            content = None if end is None else text[at + 1 : end]
            boxes.append(Part(found.start(), len(text) if end is None else end + 1, content))
        else:
            token = re.compile(r"\\[a-zA-Z]+|.?", re.S).match(text, at)
            assert token is not None
            boxes.append(Part(found.start(), token.end(), token[0]))
    return boxes


def closing(text: str, start: int) -> int | None:
    """Where the brace or bracket at `start` is closed; None where it is not."""
    left = text[start]
    right = {"{": "}", "(": ")"}[left]
    depth = 0
    for at in range(start, len(text)):
        if text[at] in left + right and text[at - 1 : at] != "\\":
            depth += 1 if text[at] == left else -1
            if depth == 0:
                return at
    return None


def is_prose(text: str) -> bool:
    """Whether the text is more than an answer: words beside numbers or formulas, or three words."""
    words = [w for w in WORD.findall(COMMAND.sub(" ", text)) if not NO_WORD.match(w)]
    if len(words) >= 3:
        return True
    return bool(words) and re.search(r"[\d$\\]", COMMAND.sub("", text)) is not None


def _in_prose(text: str) -> str | None:
    """The answer that the sentences name."""
    formulas = _formulas(text)
    anchors = list(ANSWER.finditer(text))
    if anchors:
        start = anchors[-1].end()
        start += len(text[start:]) - len(text[start:].lstrip())
        here = [one for one in formulas if one.start >= start]
        stops = (m.start() for m in SENTENCE_END.finditer(text, start))
        inside = [(one.start, one.end) for one in here]
        end = next((s for s in stops if not any(a < s < b for a, b in inside)), len(text))
        here = [one for one in here if one.start < end]
        if here:
            group = [here[0]]
            for one in here[1:]:
                if not JOIN.fullmatch(text[group[-1].end : one.start]):
                    break
                group.append(one)
            return _joined(text, group)
        phrase = text[start:end].strip(" \t:*\"'“”")
        if 0 < len(phrase.split()) <= 2:
            return phrase
    if not formulas:
        return None
    delimited = text[formulas[-1].start] in "$\\"
    return _joined(text, formulas if delimited else formulas[-1:])


def _formulas(text: str) -> list[Part]:
    found = []
    for match in FORMULA.finditer(text):
        kind = match.lastgroup
        assert kind is not None
        if kind == "dollars" and _is_money(match, text):
            found += [
                Part(match.start() + one.start, match.start() + one.end, one.content)
                for one in _formulas(r" " + match[0][1:])
            ]
        elif kind != "plain" or MEANS_SOMETHING.search(match[kind]):
            found.append(Part(match.start(), match.end(), match[kind].strip()))
    # A letter is a name for the answer more often than the answer.
    return [one for one in found if not re.fullmatch("[a-zA-Z]", one.content or "")] or found


def _is_money(match: re.Match[str], text: str) -> bool:
    """Whether the dollars stand before two sums of money: "$5 now and $7", "$5-$7"."""
    between = match["dollars"]
    return between[0].isdigit() and (between[-1].isspace() or text[match.end() :][:1].isdigit())


def _joined(text: str, parts: Sequence[Part]) -> str | None:
    """The last part, with those before it that are one answer with it."""
    together = [parts[-1]]
    for one in reversed(parts[:-1]):
        if not JOIN.fullmatch(text[one.end : together[0].start]):
            break
        together.insert(0, one)
    contents = list(dict.fromkeys((one.content or "").strip() for one in together))
    return None if "" in contents else ",".join(contents)
