"""The program of one math worker, `python -m THIS_MODULE TIMEOUT_S`.

It runs in a process of its own because the checks cannot be stopped otherwise: sympy spends minutes
in a single call on an answer like 9^{9^{9^9}}, where neither an exception nor math-verify's own
alarm reaches it. A job is `{"gold": text}` or `{"gold": text, "completion": text}`, the completion
without its thinking.
"""

import logging
import math
import resource
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from agro_train.rewards.latex import Answer, read
from agro_train.rewards.worker_main import serve

MEMORY = 4 << 30  # bytes of address space: a huge integer ends in MemoryError, not in swapping


def start() -> Callable[[dict[str, str]], dict[str, Any]]:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable(logging.CRITICAL)  # math-verify warns that its own timeouts are off
    # The imports, and what the first parse builds, must not count towards the first job's time.
    work({"gold": "1", "completion": r"$\boxed{1}$"})
    return work


def work(job: dict[str, str]) -> dict[str, Any]:
    """{"gold": can the gold answer be parsed, "equal": is the completion's answer equal to it,
    "answer": the completion's answer in one spelling, to count votes by}.

    An error of the parser or of the comparison, which math-verify raises for odd LaTeX, means that
    the answer was not recognised.
    """
    try:
        gold = parsed_gold(job["gold"])
    except Exception:  # odd LaTeX again: this one cannot be read
        gold = None
    if "completion" not in job or gold is None:
        return {"gold": gold is not None, "equal": False, "answer": None}
    try:
        answer, equal = judged(gold, job["completion"])
    except Exception:  # any of sympy's, MemoryError too: the completion made it, not the run
        return {"gold": True, "equal": False, "answer": None}
    try:
        spelling = spell(answer) if answer else None
    except Exception:  # the same; an answer that cannot be spelled has no vote, and may be right
        spelling = None
    return {"gold": True, "equal": equal, "answer": spelling}


class Parsed(NamedTuple):
    """An answer as math-verify reads it."""

    forms: list[Any]  # sympy's form, if it has one, and the text
    answer: Answer


def judged(gold: Parsed, completion: str) -> tuple[Parsed | None, bool]:
    """The completion's answer, and whether math-verify finds it equal to the gold one.

    Of boxes that are one answer, "$\\boxed{3}$ and $\\boxed{4}$", the last may be right by itself:
    what the others hold is no part of the answer then.
    """
    answer = read(completion)
    parsed = None if answer is None else parsed_answer(_in_base_of(gold, answer))
    if parsed is None:
        return None, False
    last = read(completion, together=False)
    if last is None or last == answer:
        return parsed, _equal(gold, parsed)
    alone = parsed_answer(_in_base_of(gold, last))
    return parsed, _equal(gold, parsed) or (alone is not None and _equal(gold, alone))


def _in_base_of(gold: Parsed, answer: Answer) -> Answer:
    """Where the gold answer names a base and the completion's does not, the question does."""
    base = gold.answer.base
    return answer if base is None or answer.base is not None else answer.in_base(base)


def _equal(gold: Parsed, answer: Parsed) -> bool:
    from math_verify import verify

    # Nor need a gold answer of digits alone name the base of the question.
    unnamed = gold.answer.base is None and gold.answer.latex.lstrip("-").isdigit()
    if answer.answer.base != gold.answer.base and not unnamed:
        return False
    places = decimal_places(gold.forms[0])
    return bool(verify(gold.forms, answer.forms, places, timeout_seconds=None))


def decimal_places(gold: Any) -> int:
    """To how many decimal places numbers are compared: 6, math-verify's default, would make all
    very small ones equal."""
    from sympy import Number, log

    if not isinstance(gold, Number) or not gold.is_finite or not 0 < abs(gold) < 1:
        return 6
    return max(6, 3 - math.floor(float(log(abs(gold), 10))))


def spell(parsed: Parsed) -> str:
    """A text for the answer; decimals and percentages as fractions, so that 0.5, 50\\% and
    \\frac{1}{2} are one vote."""
    from sympy import Expr, UnevaluatedExpr, nsimplify  # type: ignore[import-untyped]

    answer = parsed.forms[0]
    base = "" if parsed.answer.base is None else f"_{parsed.answer.base}"
    if not isinstance(answer, Expr):
        return f"{answer}{base}"
    exact = nsimplify(answer.replace(UnevaluatedExpr, lambda held: held), rational=True)
    return f"{exact}{base}"


@lru_cache(maxsize=1024)
def parsed_gold(text: str) -> Parsed | None:
    answer = read(text)
    return None if answer is None else parsed_answer(answer)


def parsed_answer(answer: Answer) -> Parsed | None:
    """None: not even text is left of it."""
    from math_verify import LatexExtractionConfig, parse

    # The answer has been found already: nothing but the box may be searched for another.
    found = parse(
        rf"\boxed{{{answer.latex}}}",
        extraction_config=[LatexExtractionConfig(boxed_match_priority=0)],
        parsing_timeout=None,
    )
    return Parsed(found, answer) if found else None


if __name__ == "__main__":
    serve(start, timeout_s=float(sys.argv[1]))
